"""Every rank gathers all tokens and takes the rows of its own experts; results come back summed."""
# T tokens here, K experts per token, G gathered tokens, R rows to compute here, P ranks, S slices

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits, LocalDispatcher, LocalPlan, most_rows, pad_rows, row_bytes
from megatron_moe.moe.dispatch.exchange import gather_from_ranks, sum_over_ranks
from megatron_moe.moe.dispatch.slices import Slices


@dataclass
class AllGatherPlan:
    """Rows of the gathered tokens that this rank's experts take."""

    local: LocalPlan  # over the gathered tokens, of the experts here
    tokens_here: int
    padded_tokens: int  # per rank: every rank contributes as many as the longest
    sent_bytes: tuple[int, int] = (0, 0)
    far_bytes: tuple[int, int] | None = None

    @property
    def has_spare_rows(self) -> bool:
        return self.local.has_spare_rows


class AllGatherDispatcher(LocalDispatcher):
    """Moves P*T rows whatever k is, with one collective instead of three - two where experts are cut, whose slices gather first and
    sum last. No shape depends on the routing and no host waits; the price is room for all rows that could come here (`room`).
    """

    name = "allgather"

    def __init__(self, num_experts: int, group: dist.ProcessGroup, slices: Slices | None = None):
        super().__init__(num_experts)
        self.group, self.slices = group, slices or Slices()
        self.ranks = dist.get_world_size(group)
        self.sources = self.ranks * self.slices.size
        self.experts_here = num_experts // self.ranks
        self.first_expert = dist.get_rank(group) * self.experts_here

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> AllGatherPlan:
        padded = limits.most_tokens if limits.most_tokens is not None else self._most_tokens(ids_TK)
        gathered = self._gather(pad_rows(ids_TK, padded, -1))
        here = (gathered >= self.first_expert) & (gathered < self.first_expert + self.experts_here)
        # the k experts of a token are different ones, so at most min(k, experts here) of them are here
        rows = self.sources * most_rows(padded * min(ids_TK.shape[1], self.experts_here), self.experts_here, limits.capacity)
        local = LocalDispatcher(self.experts_here)._plan(torch.where(here, gathered - self.first_expert, -1), rows, True)
        return AllGatherPlan(local, ids_TK.shape[0], padded)

    def _most_tokens(self, ids_TK: Tensor) -> int:
        """Ask the ranks, and wait for the answer: for callers whose ranks may hold unequal numbers of tokens."""
        most = torch.full((), ids_TK.shape[0], device=ids_TK.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(self.slices.largest(most))

    def _gather(self, x: Tensor) -> Tensor:
        """By rank, and by slice within it."""
        x = self.slices.gather(x)
        return gather_from_ranks(x, self.group) if self.ranks > 1 else x

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: AllGatherPlan | None = None):
        plan = plan or self.plan(ids_TK)
        # each rank's rows go to every other rank, and a sum for each of them comes back; gradients likewise
        each_way = (self.sources - 1) * plan.padded_tokens * (2 * row_bytes(x_TD) + row_bytes(weights_TK))
        plan.sent_bytes = (each_way, each_way)
        x_GD, weights_GK = (self._gather(pad_rows(x, plan.padded_tokens)) for x in (x_TD, weights_TK))
        rows_RD, offsets_e, weights_R, _ = super().dispatch(x_GD, ids_TK, weights_GK, plan.local)
        return rows_RD, offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: AllGatherPlan) -> Tensor:
        y_GD = super().combine(rows_RD, plan.local)
        y_GD = sum_over_ranks(y_GD, self.group) if self.ranks > 1 else y_GD
        return self.slices.sum(y_GD)[: plan.tokens_here]
