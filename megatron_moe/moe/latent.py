"""Latent experts: the projections around dispatch that let tokens travel, and experts work, in a smaller width.

x_TD --down--> x_TL --dispatch, experts, combine--> y_TL --up--> y_TD. What travels is k times L instead of k times D numbers per
token; the router sees the token as it is.
"""
# T tokens, D hidden, L latent width

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.kernels.linear import linear
from megatron_moe.utils.dtensor import local_weight


class TokenProjection(nn.Module):
    """x W^T on tokens of which every rank has its own (see `local_weight`). No bias: of a token without an expert nothing comes back."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, local_weight(self.weight))
