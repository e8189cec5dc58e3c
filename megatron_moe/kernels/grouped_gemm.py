"""Grouped matrix product of the experts: one public function, which picks the implementation.

It is an operator of its own, opaque to torch.compile: torch traces its grouped_mm in bf16 only, and not the loop at all.
"""
# R rows, D input width, F output width, E experts

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels import reference
from megatron_moe.utils.compat import grouped_mm

_FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_gemm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool = False, has_spare_rows: bool = False) -> Tensor:
    """Rows grouped by expert times their expert's matrix: [R, D] x [E, D, F] -> [R, F].

    offsets_E: int32, end of each expert's rows. Only with `has_spare_rows` may there be rows behind the last one: they cost no
    product, come out as zero, and so does their gradient. torch's grouped_mm takes 16-byte aligned widths in bf16, fp16 and
    fp32; everything else, float64 among it, takes the reference.
    """
    return _product(x_RD, w_EDF, offsets_E, use_reference, has_spare_rows)


def is_fast(x_RD: Tensor, w_EDF: Tensor) -> bool:
    """Whether torch's grouped_mm can multiply these."""
    aligned = all(width * x_RD.element_size() % 16 == 0 for width in w_EDF.shape[1:])
    return x_RD.dtype in _FAST_DTYPES and x_RD.dtype == w_EDF.dtype and aligned and x_RD.shape[0] > 0


@torch.library.custom_op("megatron_moe::grouped_gemm", mutates_args=())
def _product(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool) -> Tensor:
    if x_RD.shape[0] == 0:  # the reference would ask the device where the rows are
        return x_RD.new_empty(0, w_EDF.shape[2])
    if use_reference or not is_fast(x_RD, w_EDF):
        return reference.grouped_mm(x_RD, w_EDF, offsets_E)
    y_RF = grouped_mm(_packed(x_RD), _packed(w_EDF), offs=offsets_E)
    return without_spare(y_RF, offsets_E) if has_spare_rows else y_RF


@torch.library.custom_op("megatron_moe::grouped_gemm_backward", mutates_args=())
def _gradients(
    dy_RF: Tensor, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool
) -> tuple[Tensor, Tensor]:
    if x_RD.shape[0] == 0:
        return torch.empty_like(x_RD), torch.zeros_like(w_EDF)
    dx_RD = row_gradient(dy_RF, w_EDF, offsets_E, use_reference, has_spare_rows)
    return dx_RD, weight_gradient(x_RD, dy_RF, offsets_E, w_EDF, use_reference)


def row_gradient(dy_RF: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool) -> Tensor:
    """[R, D]. Here as in the forward torch's kernel takes any offsets, groups without rows among them."""
    if use_reference or not is_fast(dy_RF, w_EDF):
        return reference.grouped_mm(dy_RF, w_EDF.transpose(1, 2), offsets_E)
    dx_RD = grouped_mm(_packed(dy_RF), _packed(w_EDF).transpose(1, 2), offs=offsets_E)  # `y.sum().backward()` sends strides of 0
    return without_spare(dx_RD, offsets_E) if has_spare_rows else dx_RD


def weight_gradient(x_RD: Tensor, dy_RF: Tensor, offsets_E: Tensor, w_EDF: Tensor, use_reference: bool) -> Tensor:
    """[E, D, F]; of w_EDF only shape and dtype count.

    On a GPU groups of any length, and empty ones, are legal in one layout alone: the first operand column-major, the second row-major.
    Every other one wants groups of multiples of 16 bytes, none of them empty.
    """
    if x_RD.shape[0] == 0:
        return torch.zeros_like(w_EDF)
    if use_reference or not is_fast(x_RD, w_EDF):
        return reference.grouped_outer(x_RD, dy_RF, offsets_E)
    return grouped_mm(_packed(x_RD).t(), _packed(dy_RF), offs=offsets_E)


@_product.register_fake
def _(x_RD, w_EDF, offsets_E, use_reference, has_spare_rows):
    return x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])


@_gradients.register_fake
def _(dy_RF, x_RD, w_EDF, offsets_E, use_reference, has_spare_rows):
    return x_RD.new_empty(x_RD.shape), w_EDF.new_empty(w_EDF.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.use_reference, ctx.has_spare_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy_RF: Tensor):
    return *_gradients(dy_RF, *ctx.saved_tensors, ctx.use_reference, ctx.has_spare_rows), None, None, None


_product.register_autograd(_backward, setup_context=_remember)


def without_spare(y: Tensor, offsets_E: Tensor) -> Tensor:
    """Zero, in place, behind the last expert's rows: torch's kernel leaves there whatever was in the memory."""
    row_R = torch.arange(y.shape[0], dtype=offsets_E.dtype, device=y.device)
    return y.masked_fill_((row_R >= offsets_E[-1])[:, None], 0.0)


def _packed(x: Tensor) -> Tensor:
    """Strides of a fresh tensor: torch's kernel refuses expanded, transposed and unaligned ones, forward and backward.

    contiguous() alone leaves the strides of dims of size 1 as they are, and the kernel checks those too.
    """
    return x.contiguous().view(-1).view(x.shape)
