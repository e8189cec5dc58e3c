"""Cross-entropy in blocks against torch's over the whole, and against the definition in float64."""

import pytest
import torch

from megatron_moe.kernels import blocks, reference
from megatron_moe.kernels.cross_entropy import cross_entropy


def operands(tokens=13, width=24, vocab=21, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(tokens, width, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(vocab, (tokens,), generator=generator), torch.rand(tokens, generator=generator)


def losses_and_gradient(function, logits, labels, upstream, vocab):
    losses = function(logits, labels, vocab)
    return losses, *torch.autograd.grad(losses, logits, upstream.to(losses.dtype))


@pytest.mark.parametrize("block", [1, 50, 1 << 18], ids=["row by row", "2 rows", "all at once"])
@pytest.mark.parametrize("vocab", [24, 21, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_losses_and_gradient_are_torchs_whatever_the_blocks(block, vocab, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    logits, labels, upstream = operands(vocab=vocab, dtype=dtype)
    ours = losses_and_gradient(cross_entropy, logits, labels, upstream, vocab)
    exact = losses_and_gradient(reference.cross_entropy, logits.detach().double().requires_grad_(), labels, upstream, vocab)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and ours[1].dtype == dtype
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=tolerance / 100)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=tolerance, atol=tolerance)


def test_padding_columns_get_no_gradient():
    logits, labels, upstream = operands(vocab=21)
    assert not losses_and_gradient(cross_entropy, logits, labels, upstream, 21)[1][:, 21:].any()


def test_large_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([1, 2]), 3)
    torch.testing.assert_close(losses, torch.tensor([1e4, torch.tensor(3.0).log().item()]))
    assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()


def test_small_probabilities_have_gradients_in_float16_under_a_loss_scale():
    logits = torch.tensor([[0.0, -10.0, -14.0, -17.0, -20.0]], dtype=torch.float16, requires_grad=True)
    cross_entropy(logits, torch.tensor([0]), 5).mul(2.0**16).sum().backward()
    exact = torch.softmax(logits.detach().double(), 1)[0, 1:] * 2.0**16
    torch.testing.assert_close(logits.grad[0, 1:].double(), exact, rtol=6e-3, atol=0)


def test_logits_of_no_tokens_have_no_losses():
    logits, labels, upstream = operands(tokens=0)
    losses, gradient = losses_and_gradient(cross_entropy, logits, labels, upstream, 21)
    assert losses.shape == (0,) and gradient.shape == (0, 24)


def test_a_label_outside_the_vocabulary_is_an_error():
    logits, _, _ = operands(tokens=1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(logits, torch.tensor([21]), 21)
