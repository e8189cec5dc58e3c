"""The router's product: float32, whatever the tokens are in."""
# T tokens, D hidden, E experts

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.kernels.blocks import row_blocks
from megatron_moe.kernels.matmul_cpu import matmul


def router_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """logits_TE = x W^T in float32, or in the type of the weight where that is wider."""
    dtype = torch.promote_types(weight_ED.dtype, torch.float32)
    if x_TD.device.type == "cpu" and weight_ED.dtype == dtype == torch.float32 and x_TD.dtype in (torch.bfloat16, torch.float32):
        return _InBlocks.apply(x_TD, weight_ED)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


class _InBlocks(torch.autograd.Function):
    """On a CPU: tokens in float32 are only there block by block, in the cache, and none are kept; nor are their gradients."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        logits_TE = weight_ED.new_empty(len(x_TD), len(weight_ED))
        for rows, x_tD in _in_wide_blocks(x_TD, weight_ED.dtype):
            matmul(x_tD, weight_ED.t(), out=logits_TE[rows])
        return logits_TE

    @staticmethod
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        dweight_ED = torch.zeros_like(weight_ED)
        for rows, x_tD in _in_wide_blocks(x_TD, weight_ED.dtype):
            matmul(grad_TE[rows].t(), x_tD, out=dweight_ED, adds=True)
        if x_TD.dtype == weight_ED.dtype:
            return matmul(grad_TE, weight_ED, out=torch.empty_like(x_TD)), dweight_ED
        return _rounded_once(grad_TE, weight_ED, x_TD.dtype), dweight_ED


def _in_wide_blocks(x_TD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows in `dtype`), all in the same memory; where they are in that type already, all of them."""
    if x_TD.dtype == dtype:
        yield slice(None), x_TD
        return
    room_tD: Tensor | None = None
    # twice the usual: that these two come back from the third-level cache costs less than calling the threads for the products twice as often
    for rows in row_blocks(len(x_TD), max(x_TD.shape[1] // 2, 1), x_TD.device):
        x_tD = x_TD[rows]
        room_tD = torch.empty_like(x_tD, dtype=dtype) if room_tD is None else room_tD
        yield rows, room_tD[: len(x_tD)].copy_(x_tD)


def _rounded_once(a_TE: Tensor, b_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in half precision as if it was computed in float32 and then rounded: both are sums of two numbers in `dtype`, and of their four
    products the smallest is less than float32's rounding."""
    (high_TE, low_TE), (high_ED, low_ED) = (_halves(t, dtype) for t in (a_TE, b_ED))
    return torch.cat([high_TE, low_TE, high_TE], 1) @ torch.cat([high_ED, high_ED, low_ED])


def _halves(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = t.to(dtype)
    return high, (t - high).to(dtype)
