"""Row-wise FP8: how far a value, a product and its gradients are off, what a GPU refuses, and that a model trains in it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import fp8, reference
from megatron_moe.kernels.fp8 import dequantise_rows, fp8_grouped_gemm, gpu_problems, quantise_matrices, quantise_rows
from megatron_moe.utils import compat

COUNTS = [5, 0, 20, 1]


def operands(counts=COUNTS, D=32, F=48, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), D, generator=generator).to(dtype)
    w = torch.randn(len(counts), D, F, generator=generator).to(dtype)
    return x.requires_grad_(), w.requires_grad_(), torch.tensor(counts).cumsum(0).to(torch.int32)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), power=st.integers(-90, 90), seed=st.integers(0, 99))
def test_a_value_is_at_most_a_sixteenth_off_or_2_to_minus_10_scales(rows, width, power, seed):
    x = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scale = quantise_rows(x)
    error = (dequantise_rows(q, scale, torch.float64) - x).abs()
    slack = 1 + 1e-6  # the scale is rounded to float32
    assert (error <= slack * torch.maximum(x.abs() / 16, scale.double()[:, None] * 2.0**-10)).all()
    assert (q.float().abs().amax(1) == fp8.LARGEST).all()  # all of the range is used


def test_worked_example():
    q, scale = quantise_rows(torch.tensor([[448.0, 1.0, 17.0, -0.0015], [0.0, 0.0, 0.0, 0.0], [0.0, 3.5, -1.75, 0.4375]]))
    assert scale.tolist() == [1.0, pytest.approx(fp8.SMALLEST / 448), 0.0078125]
    assert q.float().tolist() == [[448, 1, 16, -0.001953125], [0, 0, 0, 0], [0, 448, -224, 56]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3, 5), (0, 16), (1, 6), (4, 64)])
def test_bytes_that_are_sent_unpack_to_the_quantised_rows(rows, width, dtype):
    x = torch.randn(rows, width).to(dtype)
    sent = fp8.pack_rows(x)
    assert (sent.dtype, sent.shape) == (torch.uint8, (rows, fp8.packed_bytes(width)))
    assert torch.equal(fp8.unpack_rows(sent, dtype), dequantise_rows(*quantise_rows(x), dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_a_nan_or_infinity_becomes_nan_and_no_other(value):
    x = torch.ones(3, 4)
    x[1, 2] = value
    assert dequantise_rows(*quantise_rows(x), torch.float32).isnan().any(1).tolist() == [False, True, False]


def test_matrices_are_quantised_along_what_a_product_sums_over():
    w = torch.randn(2, 32, 48)
    q, scale = quantise_matrices(w)
    assert q.shape == w.shape and q.stride() == (32 * 48, 1, 32)  # column-major, as the GPU's product takes it
    assert torch.equal(scale, w.abs().amax(1) / fp8.LARGEST)
    assert ((q.float() * scale[:, None, :] - w).abs() <= (w.abs() / 16).maximum(scale[:, None, :] * 2.0**-10) * (1 + 1e-6)).all()


def wide(q, scale):
    return q.double() * scale.double()


@pytest.mark.parametrize("use_reference", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, [7], [0, 0, 9]], ids=["usual", "one expert", "idle experts"])
def test_product_and_gradients_are_those_of_quantised_operands(counts, use_reference):
    x, w, offsets = operands(counts)
    dy = torch.randn(sum(counts), 48, generator=torch.Generator().manual_seed(1))
    y = fp8_grouped_gemm(x, w, offsets, use_reference)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    xq, dyq = (wide(*(t if i == 0 else t[:, None] for i, t in enumerate(quantise_rows(a)))) for a in (x, dy))
    by_column = wide(*(t if i == 0 else t[:, None, :] for i, t in enumerate(quantise_matrices(w))))
    by_row = wide(*(t if i == 0 else t[:, None, :] for i, t in enumerate(quantise_matrices(w.transpose(1, 2)))))
    torch.testing.assert_close(y.double(), reference.grouped_mm(xq, by_column, offsets), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx.double(), reference.grouped_mm(dyq, by_row, offsets), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dw, reference.grouped_outer(x, dy, offsets), rtol=1e-5, atol=1e-4)  # that of the matrices is not quantised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_product_is_a_few_percent_of_its_size(dtype):
    x, w, offsets = operands([64, 64], D=256, F=64, dtype=dtype)
    exact = reference.grouped_mm(x.double(), w.double(), offsets)
    y = fp8_grouped_gemm(x, w, offsets)
    assert y.dtype == dtype
    error = (y.double() - exact).norm() / exact.norm()
    # two operands, each with a rounding of 2^-4 at most, which is 2.6 % in the mean square
    assert 0.02 < error < 0.05


def test_rows_do_not_depend_on_each_other():
    x, w, offsets = operands([3, 4])
    alone = fp8_grouped_gemm(x[3:], w, torch.tensor([0, 4], dtype=torch.int32), use_reference=True)
    x.data[:3] *= 1000
    assert torch.equal(fp8_grouped_gemm(x, w, offsets, use_reference=True)[3:], alone)


def test_spare_rows_come_out_as_zero_with_zero_gradients_and_no_rows_are_none():
    x, w, offsets = operands(COUNTS)
    longer = torch.cat([x.detach(), torch.full((4, 32), float("nan"))]).requires_grad_()
    y = fp8_grouped_gemm(longer, w, offsets, has_spare_rows=True)
    dx, dw = torch.autograd.grad(y, (longer, w), torch.ones_like(y))
    assert not y[26:].any() and not dx[26:].any()
    assert y[:26].isfinite().all() and dw.isfinite().all()
    empty = fp8_grouped_gemm(longer[:0], w, torch.zeros(4, dtype=torch.int32))
    assert empty.shape == (0, 48)
    assert not torch.autograd.grad(empty.sum(), w)[0].any()


def test_the_gpus_operator_takes_these_layouts():
    """Its rules are known on the meta device; a matrix that is row-major is one that it refuses."""
    q, scale = quantise_matrices(torch.randn(3, 32, 48))
    x, scale_x = quantise_rows(torch.randn(40, 32))
    offsets = torch.tensor([8, 8, 40], dtype=torch.int32)
    tensors = [t.to("meta") for t in (x, q, scale_x, scale, offsets)]
    assert tensors[1].stride() == (32 * 48, 1, 32)
    y = compat.scaled_grouped_mm(*tensors)
    assert (y.shape, y.dtype) == ((40, 48), torch.bfloat16)
    with pytest.raises(RuntimeError, match="column major"):
        compat.scaled_grouped_mm(tensors[0], q.contiguous().to("meta"), *tensors[2:])


def test_a_gpu_that_cannot_is_told_all_reasons_at_once():
    assert gpu_problems((9, 0), torch.bfloat16, (64, 128)) == []
    assert gpu_problems((10, 3), torch.bfloat16, (64, 128)) == []
    problems = gpu_problems((8, 9), torch.float32, (72, 128))
    assert len(problems) == 3
    for problem, words in zip(problems, (("8.9", "9.0"), ("float32", "--bf16"), ("72 x 128", "16"))):
        assert all(word in problem for word in words)
