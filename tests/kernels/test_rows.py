"""Rows that are added up, and the router's product, against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import router_linear as router
from megatron_moe.kernels import rows as kernel
from megatron_moe.kernels.router_linear import router_linear
from megatron_moe.kernels.rows import add_rows, rows_by_number
from megatron_moe.kernels.softmax import softmax_with_logsumexp


def one_after_another(rows, number, numbers):
    """The definition: a number's rows as they lie, each sum in at least float32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    sums = torch.zeros(numbers, rows.shape[1], dtype=wide)
    for row, n in zip(rows, number.tolist()):
        sums[n] += row.to(wide)
    return sums


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40), k=st.integers(1, 5), D=st.integers(1, 7), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_as_many_rows_for_each_are_added_bit_for_bit_in_their_order(tokens, k, D, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    slot = torch.randperm(tokens * k, generator=generator)
    number = slot // k
    rows = torch.randn(tokens * k, D, generator=generator).to(dtype)
    want = one_after_another(rows, number, tokens)
    assert torch.equal(add_rows(rows, number, tokens, rows_by_number(slot, k)).to(dtype), want.to(dtype))
    assert torch.equal(add_rows(rows, number, tokens).to(dtype), want.to(dtype))  # as on a device


@settings(max_examples=40, deadline=None)
@given(number=st.lists(st.integers(0, 4), max_size=12), seed=st.integers(0, 9))
def test_any_numbers_of_rows_are_added_bit_for_bit_in_their_order(number, seed):
    rows = torch.randn(len(number), 3, generator=torch.Generator().manual_seed(seed))
    number = torch.tensor(number, dtype=torch.int64)
    assert torch.equal(add_rows(rows, number, 5), one_after_another(rows, number, 5))


def test_rows_by_number_of_no_rows():
    assert rows_by_number(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_blocks_give_the_same(k, monkeypatch):
    slot = torch.randperm(30 * k)
    rows = torch.randn(30 * k, 5).bfloat16()
    whole = add_rows(rows, slot // k, 30, rows_by_number(slot, k)).bfloat16()
    monkeypatch.setattr(kernel, "row_blocks", lambda rows, width, device: (slice(i, i + 7) for i in range(0, rows, 7)))
    assert torch.equal(add_rows(rows, slot // k, 30, rows_by_number(slot, k)).bfloat16(), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 29, 300])
def test_the_routers_product_in_blocks_equals_that_of_float32_tokens(dtype, tokens, monkeypatch):
    monkeypatch.setattr(router, "row_blocks", lambda rows, width, device: (slice(i, i + 140) for i in range(0, rows, 140)))
    torch.manual_seed(0)
    x, weight, grad = torch.randn(tokens, 12).to(dtype), torch.randn(5, 12), torch.randn(tokens, 5)
    results = []
    for product in (router_linear, lambda x, w: torch.nn.functional.linear(x.float(), w)):
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(leaf, w)
        results.append((y, *torch.autograd.grad(y, (leaf, w), grad)))
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2 if want.dtype == dtype else 1e-5, atol=2e-5)


def test_gradients_of_a_routers_tokens_are_rounded_once():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(300, 64).bfloat16().requires_grad_(), torch.randn(8, 64), torch.randn(300, 8)
    router_linear(x, weight).backward(grad)
    exact, addends = grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs()
    assert ((x.grad.double() - exact).abs() <= exact.abs() * 2.0**-8 + addends * 2.0**-15).all()  # bf16 has eight digits


def test_the_routers_product_is_wide_also_within_autocast():
    x, weight = torch.randn(9, 12), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        for tokens in (x, x.bfloat16()):
            assert router_linear(tokens, weight).dtype == torch.float32
            torch.testing.assert_close(
                router_linear(tokens, weight), tokens.float().double().matmul(weight.double().t()).float(), rtol=0, atol=1e-5
            )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9), experts=st.integers(1, 9), scale=st.sampled_from([1.0, 1e3]), only=st.sampled_from(["probs", "sums", "both"]),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_softmax_with_logsumexp_is_torchs(tokens, experts, scale, only, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    if masked:
        logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(tokens, experts - 1, generator=generator) < 0.5, float("-inf"))
    dprobs, dsums = (
        torch.randn(tokens, experts, generator=generator, dtype=torch.float64),
        torch.randn(tokens, generator=generator, dtype=torch.float64),
    )
    results = []
    for function in (softmax_with_logsumexp, lambda x: (x.softmax(-1), x.logsumexp(-1))):
        leaf = logits.clone().requires_grad_()
        probs, sums = function(leaf)
        loss = {
            "probs": lambda: (probs * dprobs).sum(),
            "sums": lambda: (sums * dsums).sum(),
            "both": lambda: (probs * dprobs).sum() + (sums * dsums).sum(),
        }[only]()
        results.append((probs, sums, *torch.autograd.grad(loss, leaf)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
