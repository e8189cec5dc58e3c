"""Grouped products of rows that lie among the tokens: the copy of every token once per choice is never made.

    plain        x_TD --copy--> x_RD --product--> h_RF          keeps x_RD for the backward
    gathered     x_TD ---------product----------> h_RF          keeps x_TD, which is there anyway

The gradient of the tokens is the plain product's, summed over each token's rows.
"""
# T tokens, R rows, D input width, F output width, E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_moe.kernels.grouped_gemm import row_gradient, without_spare
from megatron_moe.kernels.on_gpu import takes_triton


def can_gather(x_TD: Tensor) -> bool:
    """Whether there is a kernel that loads rows from where they are: on a GPU, in bf16 and fp16."""
    return takes_triton(x_TD) and x_TD.dtype != torch.float32


def gathered_gemm(
    x_TD: Tensor, row_R: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, has_spare_rows: bool = False
) -> tuple[Tensor, ...]:
    """grouped_gemm(x_TD[row_R], w, offsets_E) for each of one or two stacks of matrices, [E, D, F] each, all of the dtype of x.

    row_R: int64, the token of each row. For what `can_gather` says.
    """
    return GatheredProducts.apply(x_TD, row_R, offsets_E, has_spare_rows, *weights)


class GatheredProducts(torch.autograd.Function):
    """The Triton kernels: on a GPU, and on a CPU in Triton's interpreter."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, row_R: Tensor, offsets_E: Tensor, has_spare_rows: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        from megatron_moe.kernels import triton_gemm

        x_TD, ctx.has_spare_rows = x_TD.contiguous(), has_spare_rows
        weights = [w.contiguous() for w in weights]
        ctx.save_for_backward(x_TD, row_R, offsets_E, *weights)
        results = [triton_gemm.product(x_TD, row_R, w, offsets_E) for w in weights]
        return tuple(without_spare(y, offsets_E) if has_spare_rows else y for y in results)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        from megatron_moe.kernels import triton_gemm

        x_TD, row_R, offsets_E, *weights = ctx.saved_tensors
        dys = [dy.contiguous() for dy in dys]
        dx_RD = sum(row_gradient(dy, w, offsets_E, False, ctx.has_spare_rows) for dy, w in zip(dys, weights))
        wide = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)  # k roundings to bf16 would be more than one
        dx_TD = wide.index_add_(0, row_R, dx_RD.float()).to(x_TD.dtype)
        return dx_TD, None, None, None, *(triton_gemm.outer(x_TD, row_R, dy, offsets_E) for dy in dys)
