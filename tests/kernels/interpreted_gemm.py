"""Triton's gathered products against the reference, in Triton's interpreter. Run by test_triton_kernels.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import reference, triton_gemm
from megatron_moe.kernels.gathered_gemm import gathered_gemm
from megatron_moe.kernels.grouped_gemm import grouped_gemm

SMALL = {"BM": 16, "BN": 16, "BK": 16}


def operands(counts, spare, D, F, tokens=11, stacks=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator)
    weights = [torch.randn(len(counts), D, F, generator=generator) for _ in range(stacks)]
    rows = torch.randint(0, tokens, (sum(counts) + spare,), generator=generator)
    return x, rows, weights, torch.tensor(counts).cumsum(0).to(torch.int32)


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), spare=st.integers(0, 3), D=st.sampled_from([1, 8, 16, 33]),
    F=st.sampled_from([1, 16, 17, 40]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_rows_and_widths_equal_the_reference(counts, spare, D, F, seed):
    x, rows, (w,), offsets = operands(counts, spare, D, F, seed=seed)
    used = sum(counts)
    want = reference.grouped_mm(x[rows], w, offsets)
    torch.testing.assert_close(triton_gemm.product(x, rows, w, offsets, **SMALL)[:used], want[:used], rtol=1e-4, atol=1e-4)
    dy = torch.randn(len(rows), F, generator=torch.Generator().manual_seed(seed))
    dw = triton_gemm.outer(x, rows, dy, offsets, BR=16, BK=16, BN=16)
    torch.testing.assert_close(dw, reference.grouped_outer(x[rows], dy, offsets), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stacks", [1, 2])
@pytest.mark.parametrize("counts", [[5, 0, 140, 1], [9], [0, 0]], ids=["several tiles", "one expert", "no rows"])
def test_results_and_gradients_are_those_of_copied_rows(counts, stacks):
    x, rows, weights, offsets = operands(counts, 2, 16, 24, stacks=stacks)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    dys = [torch.randn(len(rows), 24) for _ in weights]
    for dy in dys:
        dy[sum(counts) :] = 0.0
    got = gathered_gemm(x, rows, weights, offsets, has_spare_rows=True)
    want = [grouped_gemm(x.index_select(0, rows), w, offsets, use_reference=True) for w in weights]
    assert len(got) == stacks
    for g, w in zip((*got, *torch.autograd.grad(got, leaves, dys)), (*want, *torch.autograd.grad(want, leaves, dys))):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_more_experts_than_a_power_of_two_and_half_precision():
    counts = [3, 0, 0, 17, 1, 0, 2]
    x, rows, (w,), offsets = operands(counts, 0, 32, 16)
    got = triton_gemm.product(x.half(), rows, w.half(), offsets, **SMALL)
    want = reference.grouped_mm(x.half().float()[rows], w.half().float(), offsets)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)
