"""The grouped product against one matrix product per expert, on both of its paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import grouped_gemm as kernel
from megatron_moe.kernels.grouped_gemm import grouped_gemm, is_fast

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def operands(rows_per_expert, D=8, F=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(rows_per_expert), D, generator=generator).to(dtype)
    w = torch.randn(len(rows_per_expert), D, F, generator=generator).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.tensor(rows_per_expert).cumsum(0).to(torch.int32)


def looped(x, w, rows_per_expert):
    """The definition, row by row, in float64."""
    y, row = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64), 0
    for expert, rows in enumerate(rows_per_expert):
        for _ in range(rows):
            y[row] = x[row].double() @ w[expert].double()
            row += 1
    return y


def results(product, x, w, upstream):
    """Output, dx and dw."""
    y = product(x, w)
    return y, *torch.autograd.grad(y, (x, w), upstream.to(y.dtype))


ROWS = {
    "one expert": [7],
    "even": [4, 4, 4],
    "first empty": [0, 5, 3],
    "middle empty": [5, 0, 3],
    "last empty": [5, 3, 0],
    "many empty": [0, 0, 1, 0, 6, 0],
    "one row": [0, 1, 0],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_fast_path_equals_the_loop_and_the_reference_with_gradients(rows, dtype):
    x, w, offsets = operands(rows, dtype=dtype)
    assert is_fast(x, w)
    upstream = torch.randn(sum(rows), 16, generator=torch.Generator().manual_seed(1))
    fast = results(lambda x, w: grouped_gemm(x, w, offsets), x, w, upstream)
    reference = results(lambda x, w: grouped_gemm(x, w, offsets, use_reference=True), x, w, upstream)
    exact = results(lambda x, w: looped(x, w, rows), x, w, upstream.to(dtype))
    for got, also, want in zip(fast, reference, exact):
        scale = want.abs().max().double().clamp_min(1.0)
        assert (got.double() - want.double()).abs().max() / scale < TOLERANCE[dtype]
        assert (also.double() - want.double()).abs().max() / scale < TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 9), min_size=1, max_size=7), D=st.integers(1, 9), F=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_widths_and_counts_equal_the_loop_in_float64(rows, D, F, seed):
    x, w, offsets = operands(rows, D, F, torch.float64, seed)
    torch.testing.assert_close(grouped_gemm(x, w, offsets), looped(x, w, rows), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 9), min_size=1, max_size=7), D=st.integers(1, 9), F=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_widths_and_counts_equal_the_loop_in_float32(rows, D, F, seed):
    x, w, offsets = operands(rows, D, F, torch.float32, seed)
    torch.testing.assert_close(grouped_gemm(x, w, offsets).double(), looped(x, w, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "D", "F"),
    [(torch.float64, 8, 16), (torch.float32, 6, 16), (torch.float32, 8, 15), (torch.bfloat16, 12, 16), (torch.bfloat16, 16, 4)],
)
def test_float64_and_unaligned_widths_take_the_reference(dtype, D, F, monkeypatch):
    x, w, offsets = operands([3, 0, 2], D, F, dtype)
    monkeypatch.setattr(kernel, "grouped_mm", lambda *_, **__: pytest.fail("torch's kernel refuses this"))
    torch.testing.assert_close(grouped_gemm(x, w, offsets).double(), looped(x, w, [3, 0, 2]), rtol=0, atol=0.1)


def test_aligned_float32_takes_torchs_kernel(monkeypatch):
    calls = []
    original = kernel.grouped_mm
    monkeypatch.setattr(kernel, "grouped_mm", lambda *a, **k: calls.append(1) or original(*a, **k))
    x, w, offsets = operands([3, 2])
    grouped_gemm(x, w, offsets)
    assert calls


def test_mixed_dtypes_do_not_reach_torchs_kernel():
    x, w, _ = operands([3, 2])
    assert not is_fast(x.bfloat16(), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows_give_an_empty_output_and_zero_gradients_and_none_missing(dtype):
    x, w, offsets = operands([0, 0, 0], dtype=dtype)
    y = grouped_gemm(x, w, offsets)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert x.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("use_reference", [False, True])
@pytest.mark.parametrize("rows", [[3, 0, 2], [0, 0, 0], [0, 0, 4]])
def test_spare_rows_are_not_read_and_come_out_as_zero_with_zero_gradients(rows, use_reference):
    x, w, offsets = operands(rows)
    y, dx, dw = results(lambda x, w: grouped_gemm(x, w, offsets, use_reference), x, w, torch.ones(sum(rows), 16))
    nan = torch.full((5, 8), float("nan"))
    longer = torch.cat([x.detach(), nan]).requires_grad_()
    # torch's kernel leaves in the output what was in the memory
    garbage = [torch.full((sum(rows) + 5, n), float("nan")) for n in (16, 8) for _ in range(4)]
    del garbage
    upstream = torch.cat([torch.ones(sum(rows), 16), torch.full((5, 16), float("nan"))])
    got = results(lambda x, w: grouped_gemm(x, w, offsets, use_reference, has_spare_rows=True), longer, w, upstream)
    for found, expected in zip(got, (torch.cat([y, torch.zeros(5, 16)]), torch.cat([dx, torch.zeros(5, 8)]), dw)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reference", [False, True])
def test_an_idle_expert_has_a_zero_gradient_and_not_none(use_reference):
    x, w, offsets = operands([4, 0, 3])
    grouped_gemm(x, w, offsets, use_reference).square().sum().backward()
    assert torch.equal(w.grad[1], torch.zeros(8, 16))
    assert (w.grad[0] != 0).any()
    assert (w.grad[2] != 0).any()


UPSTREAM = {
    "all stride 0": lambda y: y.sum(),
    "columns stride 0": lambda y: y.sum(1).square().sum(),
    "rows stride 0": lambda y: y.sum(0).square().sum(),
    "transposed": lambda y: (y.t() * torch.arange(16 * y.shape[0], dtype=y.dtype).view(16, -1)).sum(),
    "slice of a wider row": lambda y: torch.cat([y, y[:, :1]], dim=1).square().sum(),
}


@pytest.mark.parametrize("loss", UPSTREAM.values(), ids=UPSTREAM.keys())
@pytest.mark.parametrize("rows", [[2, 0, 4], [0, 1]], ids=["six rows", "one row"])
def test_a_gradient_of_any_strides_goes_back(loss, rows):
    x, w, offsets = operands(rows)
    fast = torch.autograd.grad(loss(grouped_gemm(x, w, offsets)), (x, w))
    exact = torch.autograd.grad(loss(looped(x, w, rows)), (x, w))
    for got, want in zip(fast, exact):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


VIEWS = {
    "transposed": lambda rows: torch.randn(8, rows).t(),
    "every second row": lambda rows: torch.randn(2 * rows, 8)[::2],
    "unaligned rows": lambda rows: torch.randn(rows, 9)[:, :8],
    "one row repeated": lambda rows: torch.randn(1, 8).expand(rows, 8),
    "offset storage": lambda rows: torch.randn(rows * 8 + 1)[1:].view(rows, 8),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("rows", [[2, 0, 4], [0, 1, 0]], ids=["six rows", "one row"])
def test_rows_of_any_strides_go_in(view, rows):
    torch.manual_seed(0)
    x = view(sum(rows))
    _, w, offsets = operands(rows)
    torch.testing.assert_close(grouped_gemm(x, w, offsets).double(), looped(x, w, rows), rtol=0, atol=1e-5)


def test_weights_that_are_a_slice_of_a_wider_stack_go_in():
    x, _, offsets = operands([2, 3])
    w = torch.randn(2, 9, 17, generator=torch.Generator().manual_seed(0))[:, :8, :16]
    torch.testing.assert_close(grouped_gemm(x, w, offsets).double(), looped(x, w, [2, 3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(grouped_gemm(x[:2], w[:1], offsets[:1]).double(), looped(x[:2], w[:1], [2]), rtol=0, atol=1e-5)
