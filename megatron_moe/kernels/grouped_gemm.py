"""Grouped matrix product of the experts: one public function, which picks the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels import reference
from megatron_moe.utils.compat import grouped_mm

_FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_gemm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool = False) -> Tensor:
    """Rows grouped by expert times their expert's matrix: [R, D] x [E, D, F] -> [R, F].

    offsets_E: int32, end of each expert's rows. torch's grouped_mm takes 16-byte aligned widths in bf16, fp16 and fp32;
    everything else, float64 among it, takes the reference.
    """
    if use_reference or not is_fast(x_RD, w_EDF):
        return reference.grouped_mm(x_RD, w_EDF, offsets_E)
    y_RF = grouped_mm(_packed(x_RD), _packed(w_EDF), offs=offsets_E)
    if y_RF.requires_grad:
        y_RF.register_hook(_packed)  # `y.sum().backward()` sends strides of 0
    return y_RF


def is_fast(x_RD: Tensor, w_EDF: Tensor) -> bool:
    """Whether torch's grouped_mm can multiply these."""
    aligned = all(width * x_RD.element_size() % 16 == 0 for width in w_EDF.shape[1:])
    return x_RD.dtype in _FAST_DTYPES and x_RD.dtype == w_EDF.dtype and aligned and x_RD.shape[0] > 0


def _packed(x: Tensor) -> Tensor:
    """Strides of a fresh tensor: torch's kernel refuses expanded, transposed and unaligned ones, forward and backward.

    contiguous() alone leaves the strides of dims of size 1 as they are, and the kernel checks those too.
    """
    return x.contiguous().view(-1).view(x.shape)
