"""DeepSpeed's MoE layer in plain PyTorch: every expert sees every token, and a table of weights says what counts. The slow oracle.

Names are DeepSpeed's, so that weights come from the state dict of the real layer.
"""
# T tokens, D hidden, E experts

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.deepspeed.moe.layer import MoE


class PlainMoE(nn.Module):
    """`hidden -> (output, l_aux, counts)` for k of 1 or 2, tokens in their order where there are too many for an expert."""

    def __init__(self, expert: nn.Module, hidden_size: int, num_experts: int, k: int, capacity: tuple[float, int] | None, residual: bool):
        super().__init__()
        self.num_experts, self.k, self.capacity = num_experts, k, capacity
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(num_experts))
        if residual:
            self.mlp, self.coefficient = copy.deepcopy(expert), nn.Linear(hidden_size, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        gates_TE = self.deepspeed_moe.gate.wg(x_TD).softmax(-1)
        choices = gates_TE.topk(self.k).indices
        chosen = [F.one_hot(choices[:, i], self.num_experts) for i in range(self.k)]  # k masks, [T, E]
        l_aux = self.num_experts * (gates_TE.mean(0) * chosen[0].to(gates_TE).mean(0)).sum()
        kept = self._kept(chosen, len(x_TD))
        weights_TE = gates_TE * kept
        if self.k > 1:  # those of the experts that took the token add up to 1
            weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(gates_TE.dtype).eps)
        outputs = [expert(x_TD) * weights_TE[:, e, None] for e, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts)]
        y = sum(outputs).view_as(hidden)
        if hasattr(self, "mlp"):
            c = self.coefficient(hidden).softmax(-1)
            y = y * c[..., :1] + self.mlp(hidden) * c[..., 1:]
        return y, l_aux, sum(mask.sum(0) for mask in chosen)

    def _kept(self, chosen: list[Tensor], tokens: int) -> Tensor:
        """0 or 1 [T, E]: all second choices queue behind all first ones."""
        if self.capacity is None:
            return sum(chosen)
        factor, least = self.capacity
        rows = max(math.ceil(tokens / self.num_experts * factor * self.k), least)
        kept, taken_E = 0, torch.zeros(self.num_experts, dtype=torch.int64)
        for mask in chosen:
            kept = kept + mask * (mask.cumsum(0) + taken_E <= rows)
            taken_E = taken_E + mask.sum(0)
        return kept


def plain(model: nn.Module) -> nn.Module:
    """The same network, each MoE in it exchanged for the oracle with the same weights."""
    for name, moe in [(n, m) for n, m in model.named_modules() if isinstance(m, MoE)]:
        c = moe.core.config
        assert not c.moe_token_dropping or c.topk > 1 or not c.moe_rts, "the oracle drops in order, and nothing at random"
        capacity = (c.moe_train_capacity_factor, c.moe_min_capacity) if c.moe_token_dropping else None
        expert = copy.deepcopy(moe.core.experts.stack)
        for p_name, p in list(expert.named_parameters()):
            owner, _, own = p_name.rpartition(".")
            setattr(expert.get_submodule(owner), own, nn.Parameter(p[0].detach().clone()))
        oracle = PlainMoE(expert, moe.hidden_size, moe.num_experts, c.topk, capacity, moe.use_residual)
        oracle.load_state_dict(moe.state_dict())
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, oracle)
    return model
