"""The loss of a projection in chunks of the vocabulary against the loss of whole logits, and the bytes that it never needs."""

import pytest
import torch
from live_bytes import LiveBytes

from megatron_moe.kernels import reference
from megatron_moe.kernels.cross_entropy import cross_entropy
from megatron_moe.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_moe.model.loss import LOGITS_AT_A_TIME, MOST_LOGITS, columns_at_a_time


def operands(tokens=13, hidden=6, width=24, vocab=21, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    h, w = ((scale * torch.randn(n, hidden, generator=generator)).to(dtype).requires_grad_() for n in (tokens, width))
    return h, w, torch.randint(vocab, (tokens,), generator=generator), torch.rand(tokens, generator=generator)


def whole(h, w, labels, vocab):
    return reference.cross_entropy(h @ w.t(), labels, vocab)


@pytest.mark.parametrize("chunk", [1, 5, 7, 20, 21, 24])
@pytest.mark.parametrize("vocab", [24, 21, 1])
def test_losses_and_gradients_are_those_of_whole_logits(chunk, vocab):
    h, w, labels, upstream = operands(vocab=vocab)
    found = linear_cross_entropy(h, w, labels, vocab, chunk)
    expected = whole(h, w, labels, vocab)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(losses, (h, w), upstream.double()) for losses in (found, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_types_lose_no_more_than_whole_logits_do(dtype, tolerance):
    h, w, labels, upstream = operands(tokens=40, hidden=16, width=64, vocab=60, dtype=dtype)
    found = linear_cross_entropy(h, w, labels, 60, 16)
    assert found.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (h, w)]
    grads = torch.autograd.grad(found, (h, w), upstream)
    assert [g.dtype for g in grads] == [dtype, dtype]
    for a, b in zip(grads, torch.autograd.grad(whole(*exact, labels, 60), exact, upstream.double())):
        assert float((a.double() - b).abs().max() / b.abs().max()) < tolerance


def test_padding_gets_no_gradient_and_a_label_outside_the_vocabulary_is_no_number():
    h, w, labels, _ = operands(vocab=21)
    losses = linear_cross_entropy(h, w, labels, 21, 8)
    assert not torch.autograd.grad(losses.sum(), w)[0][21:].any()
    for label in (-1, 21):
        assert linear_cross_entropy(h, w, torch.full_like(labels, label), 21, 8).isnan().all()


def test_large_logits_neither_overflow_nor_vanish():
    h, w = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.tensor([[1e4], [0.0], [-1e4]], requires_grad=True)
    losses = linear_cross_entropy(h, w, torch.tensor([1, 2]), 3, 2)
    torch.testing.assert_close(losses, torch.tensor([1e4, 0.0]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (h, w)))


def test_gradcheck():
    h, w, labels, _ = operands(tokens=4, hidden=3, width=8, vocab=7)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 7, 3), (h, w))


def test_the_logits_never_exist_as_a_whole():
    tokens, hidden, vocab, chunk = 512, 16, 8192, 256
    h, w, labels, _ = operands(tokens, hidden, vocab, vocab, torch.float32)
    logits = 4 * tokens * vocab

    def peak(function) -> int:
        with LiveBytes() as live:
            function().sum().backward()
        h.grad = w.grad = None
        return live.peak

    assert peak(lambda: cross_entropy(h @ w.t(), labels, vocab)) > 2 * logits
    weights = 4 * vocab * hidden
    assert peak(lambda: linear_cross_entropy(h, w, labels, vocab, chunk)) < weights + 5 * 4 * tokens * chunk < logits / 4


@pytest.mark.parametrize(
    ("asked", "tokens", "columns", "wanted"),
    [
        (None, 512, 50304, 0),
        (None, 1024, 50304, LOGITS_AT_A_TIME // 1024),
        (None, 8192, 128256, LOGITS_AT_A_TIME // 8192),
        (None, MOST_LOGITS, 2, 0),  # fewer columns than one chunk
        (0, 8192, 128256, 0),
        (1000, 2, 128256, 1000),
        (1000, 2, 1000, 0),
    ],
)
def test_chunks_are_chosen_by_the_number_of_logits(asked, tokens, columns, wanted):
    assert columns_at_a_time(asked, tokens, columns) == wanted
