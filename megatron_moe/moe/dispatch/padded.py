"""Every expert gets exactly C rows from every rank, zeros where there are fewer: DeepSpeed's [E, C, D]."""
# T tokens here, K experts per token, E experts, e experts here, C capacity, R = E * C rows, P ranks, S slices

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits, LocalDispatcher, addends_of, gather_rows, pad_rows, row_bytes, sum_rows
from megatron_moe.moe.dispatch.exchange import exchange_rows
from megatron_moe.moe.dispatch.slices import Slices


@dataclass
class PaddedPlan:
    """Which assignment fills each of the E x C rows of this rank."""

    slot_R: Tensor  # int64: token * K + choice; T*K for a zero row
    addend_R: Tensor  # int64: token * addends + addend, see sum_rows; that of token T for a zero row
    addends: int
    offsets_e: Tensor  # int32
    capacity: int  # C
    num_tokens: int
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)
    far_bytes: tuple[int, int] | None = None


class PaddedDispatcher(LocalDispatcher):
    """All sizes follow from the capacity, so nothing is asked and no host waits. Without a capacity C is the largest load of an expert
    on any rank of the group, for which the host waits once.
    """

    name = "padded"

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None, slices: Slices | None = None):
        super().__init__(num_experts)
        self.group, self.ranks, self.slices = group, 1 if group is None else dist.get_world_size(group), slices or Slices()

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> PaddedPlan:
        order_A, counts_E = self._order(ids_TK)
        capacity = self._largest_load(counts_E) if limits.capacity is None else limits.capacity
        if limits.most_tokens is not None:
            capacity = min(capacity, limits.most_tokens)  # the k experts of a token are different ones
        place_C = torch.arange(capacity, device=ids_TK.device)
        index_EC = (counts_E.cumsum(0) - counts_E)[:, None] + place_C
        assignments = ids_TK.numel()
        index_EC = torch.where(place_C < counts_E[:, None], index_EC, assignments)
        slot_R = torch.nn.functional.pad(order_A, (0, 1), value=assignments).index_select(0, index_EC.flatten())
        ends_e = torch.arange(1, self.num_experts // self.ranks + 1, dtype=torch.int32, device=ids_TK.device)
        addend_A, addends = addends_of(ids_TK, self.ranks, self.num_experts // self.ranks)
        addend_R = torch.nn.functional.pad(addend_A, (0, 1), value=len(ids_TK) * addends).index_select(0, slot_R)
        ends_e = ends_e * (self.ranks * self.slices.size * capacity)
        return PaddedPlan(slot_R, addend_R, addends, ends_e, capacity, len(ids_TK))

    def _largest_load(self, counts_E: Tensor) -> int:
        most = counts_E.max()
        if self.ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(self.slices.largest(most))

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: PaddedPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_AD = gather_rows(pad_rows(x_TD, len(x_TD) + 1), plan.addend_R, plan.addends)
        weights_A = torch.nn.functional.pad(weights_TK.reshape(-1), (0, 1)).index_select(0, plan.slot_R)
        rows_to_others = len(rows_AD) // self.ranks * (self.ranks - 1) + len(rows_AD) * (self.slices.size - 1)
        each_way = rows_to_others * (2 * row_bytes(rows_AD) + weights_A.element_size())  # rows and weights go out, rows come back
        plan.sent_bytes = (each_way, each_way)
        return self._to_experts(rows_AD, plan), plan.offsets_e, self._to_experts(weights_A, plan), plan

    def _to_experts(self, rows_A: Tensor, plan: PaddedPlan) -> Tensor:
        """[E C, ...] -> [e P S C, ...]: what came rank by rank is put in the order of the experts."""
        if self.ranks * self.slices.size == 1:
            return rows_A
        blocks = self.slices.gather(self._exchange(rows_A)).unflatten(0, (self.slices.size, self.ranks, len(plan.offsets_e), plan.capacity))
        return blocks.transpose(0, 2).flatten(0, 3)

    def combine(self, rows_RD: Tensor, plan: PaddedPlan) -> Tensor:
        if self.ranks * self.slices.size > 1:
            blocks = rows_RD.unflatten(0, (len(plan.offsets_e), self.ranks, self.slices.size, plan.capacity)).transpose(0, 2)
            rows_RD = self._exchange(self.slices.sum(blocks.flatten(0, 3)))
        return sum_rows(rows_RD, plan.addend_R, plan.num_tokens + 1, plan.addends)[: plan.num_tokens]

    def _exchange(self, rows: Tensor) -> Tensor:
        """[P e C, ...] -> the same from every rank, for the experts here."""
        if self.ranks == 1:
            return rows
        each = [len(rows) // self.ranks] * self.ranks
        return exchange_rows(rows, each, each, self.group)
