"""The router's linear layer: float32 whatever the rest computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.kernels.router_linear import router_linear
from megatron_moe.utils.dtensor import local_weight


class Gate(nn.Module):
    """logits_TE = x_TD W_ED^T, no bias. float32 (float64 in parity tests): bf16 has 8 significant bits, so close scores
    would tie and the choice of experts would depend on rounding."""

    def __init__(self, hidden_size: int, num_experts: int, has_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        # no parameter: it has a rule of its own (move_bias). float32: it moves by a thousandth at a time
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32) if has_bias else None)

    def forward(self, x_TD: Tensor) -> Tensor:
        return router_linear(x_TD, local_weight(self.weight))

    @torch.no_grad()
    def move_bias(self, counts_E: Tensor, rate: float | Tensor) -> None:
        """One step of the balancing without a loss (arXiv 2408.15664, algorithm 1). counts_E: of the global batch, before dropping."""
        self.expert_bias += rate * torch.sign(counts_E.mean() - counts_E).to(self.expert_bias.dtype)
