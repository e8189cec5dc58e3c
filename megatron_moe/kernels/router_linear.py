"""The router's product: float32, whatever the tokens are in."""
# T tokens, D hidden, E experts

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.kernels.blocks import row_blocks


def router_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """logits_TE = x W^T in float32, or in the type of the weight where that is wider."""
    dtype = torch.promote_types(weight_ED.dtype, torch.float32)
    if x_TD.device.type == "cpu" and x_TD.dtype in (torch.bfloat16, torch.float16) and weight_ED.dtype == dtype:
        return _InBlocks.apply(x_TD, weight_ED)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


class _InBlocks(torch.autograd.Function):
    """On a CPU: tokens in float32 are only there block by block, in the cache, and none are kept; nor are their gradients."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        logits_TE = weight_ED.new_empty(len(x_TD), len(weight_ED))
        for rows in row_blocks(*x_TD.shape, x_TD.device):
            torch.mm(x_TD[rows].to(weight_ED.dtype), weight_ED.t(), out=logits_TE[rows])
        return logits_TE

    @staticmethod
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        dx_TD, dweight_ED = torch.empty_like(x_TD), torch.zeros_like(weight_ED)
        for rows in row_blocks(*x_TD.shape, x_TD.device):
            dx_TD[rows] = grad_TE[rows] @ weight_ED
            dweight_ED.addmm_(grad_TE[rows].t(), x_TD[rows].to(weight_ED.dtype))
        return dx_TD, dweight_ED
