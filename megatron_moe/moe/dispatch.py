"""Token dispatch: bring each routed row to the rank that owns its expert, and the results back.

A dispatcher is an object handed to the layer; all of them have one interface and one row order:

  plan(ids_TK, limits) -> plan                            counts, splits, order: no gradient, never recomputed
  dispatch(x_TD, ids_TK, weights_TK, plan=None) -> rows_RD, offsets_e, row_weights_R, plan
  combine(rows_RD, plan) -> y_TD                          plain sum of a token's rows

Rows arrive sorted by (expert, source rank, token, choice); offsets_e (int32) are the ends of the experts' rows. ids of -1
(dropped) belong to no expert.

Where the number of rows is not known without asking the device, there are as many as there can be at most: those behind the
last expert's are spare (`plan.has_spare_rows`). They have weight 0; the experts owe zeros for them, and zero gradients. Only the
all-to-all asks - once per layer, for the sizes it must know on the host - and has no spare rows. Padded, it need not ask: then
zero rows of weight 0 stand behind each rank's rows of an expert, up to its capacity.

`plan.sent_bytes`, known once rows have travelled: what this rank sends to others for them, in a forward and in its backward.

Worked example, 4 experts on 2 ranks, k = 1: rank 0 routes tokens a b c to experts 2 0 2, rank 1 routes d e to 0 3.
Rank 0 owns experts 0 and 1 and receives [b, d], offsets [2, 2]; rank 1 receives [a, c, e], offsets [2, 3].
"""
# T tokens here, K experts per token, A assignments (T*K), R rows to compute here, E experts, e experts here, P ranks

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.routing import count_assignments
from megatron_moe.utils.compat import all_gather_rows, all_to_all_rows, reduce_scatter_rows

MOST_ROOM = 1.25  # that `auto` lets an all-gather reserve


@dataclass(frozen=True)
class Limits:
    """What the caller knows before the ids: each word saves rows, or a wait for the device."""

    is_dropless: bool = False  # no id is -1
    capacity: int | None = None  # rows that an expert takes from one rank at most
    most_tokens: int | None = None  # of any rank of the group


@dataclass
class LocalPlan:
    """Which assignment fills each row."""

    slot_R: Tensor  # int64: token * K + choice
    offsets_E: Tensor  # int32
    num_tokens: int
    k: int
    has_spare_rows: bool
    sent_bytes: tuple[int, int] = (0, 0)

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.k


class LocalDispatcher:
    """All experts live here."""

    name = "local"

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def plan(self, ids_TK: Tensor, limits: Limits = Limits()) -> LocalPlan:
        return self._plan(ids_TK, most_rows(ids_TK.numel(), self.num_experts, limits.capacity), not limits.is_dropless)

    def _plan(self, ids_TK: Tensor, rows: int, has_spare_rows: bool) -> LocalPlan:
        order_A, counts_E = self._order(ids_TK)
        return LocalPlan(order_A[:rows], counts_E.cumsum(0).to(torch.int32), *ids_TK.shape, has_spare_rows)

    def _order(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments by expert, dropped ones behind the last expert; and how many each expert has."""
        by_expert_A = torch.where(ids_TK < 0, self.num_experts, ids_TK).reshape(-1).argsort(stable=True)
        return by_expert_A, count_assignments(ids_TK, self.num_experts)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: LocalPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_RD, weights_R = x_TD.index_select(0, plan.token_R), weights_TK.reshape(-1).index_select(0, plan.slot_R)
        if plan.has_spare_rows:
            row_R = torch.arange(len(weights_R), device=weights_R.device)
            weights_R = torch.where(row_R < plan.offsets_E[-1], weights_R, 0.0)
        return rows_RD, plan.offsets_E, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: LocalPlan) -> Tensor:
        return _sum_rows(rows_RD, plan.token_R, plan.num_tokens)


def most_rows(assignments: int, num_experts: int, capacity: int | None) -> int:
    """Rows that these experts can get from one rank, of this many assignments."""
    return assignments if capacity is None else min(assignments, num_experts * capacity)


def _sum_rows(rows_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """A token's rows are added in at least float32: k roundings to bf16 would not be those of one process."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    y_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=wide, device=rows_RD.device)
    return y_TD.index_add(0, token_R, rows_RD.to(wide)).to(rows_RD.dtype)


@dataclass
class AllToAllPlan:
    """The local order, how many rows go to and come from each rank, and the order that groups what came by expert."""

    local: LocalPlan
    send_P: list[int]
    receive_P: list[int]
    arrival_R: Tensor  # row r of the experts is the arrival_R[r]-th row received
    offsets_e: Tensor
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)


class AllToAllDispatcher(LocalDispatcher):
    """Experts are split over the ranks of `group`; rows are exchanged with exact, unequal sizes: nothing is padded or dropped."""

    name = "alltoall"

    def __init__(self, num_experts: int, group: dist.ProcessGroup):
        super().__init__(num_experts)
        self.group, self.ranks = group, dist.get_world_size(group)

    def plan(self, ids_TK: Tensor, limits: Limits = Limits()) -> AllToAllPlan:
        order_A, counts_E = self._order(ids_TK)
        send_Pe = counts_E.view(self.ranks, -1)
        receive_Pe = torch.empty_like(send_Pe)
        dist.all_to_all_single(receive_Pe, send_Pe, group=self.group)
        # the one host sync of the layer: collectives want their sizes on the host
        send_P, receive_P = torch.stack([send_Pe.sum(1), receive_Pe.sum(1)]).tolist()
        local = LocalPlan(order_A[: sum(send_P)], counts_E.cumsum(0).to(torch.int32), *ids_TK.shape, False)
        # rows arrive source by source; a stable sort by expert keeps (source, token) order within each expert
        expert_R = torch.arange(send_Pe.shape[1], device=ids_TK.device).repeat(self.ranks)
        expert_R = expert_R.repeat_interleave(receive_Pe.flatten(), output_size=sum(receive_P))
        return AllToAllPlan(local, send_P, receive_P, expert_R.argsort(stable=True), receive_Pe.sum(0).cumsum(0).to(torch.int32))

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: AllToAllPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_AD, _, weights_A, _ = super().dispatch(x_TD, ids_TK, weights_TK, plan.local)
        plan.sent_bytes = self._sent_bytes(plan, row_bytes(rows_AD), weights_A.element_size())
        rows_RD = all_to_all_rows(rows_AD, plan.receive_P, plan.send_P, self.group).index_select(0, plan.arrival_R)
        weights_R = all_to_all_rows(weights_A, plan.receive_P, plan.send_P, self.group).index_select(0, plan.arrival_R)
        return rows_RD, plan.offsets_e, weights_R, plan

    def _sent_bytes(self, plan: AllToAllPlan, row: int, weight: int) -> tuple[int, int]:
        """Exact: rows and weights go out and rows come back; their gradients the other way round."""
        rank = dist.get_rank(self.group)
        out, back = (sum(rows_P) - rows_P[rank] for rows_P in (plan.send_P, plan.receive_P))
        return out * (row + weight) + back * row, back * (row + weight) + out * row

    def combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        back_R = torch.empty_like(plan.arrival_R)
        back_R[plan.arrival_R] = torch.arange(back_R.numel(), device=back_R.device)
        rows_AD = all_to_all_rows(rows_RD.index_select(0, back_R), plan.send_P, plan.receive_P, self.group)
        return super().combine(rows_AD, plan.local)


@dataclass
class AllGatherPlan:
    """Rows of the gathered tokens that this rank's experts take."""

    local: LocalPlan  # over the gathered tokens, of the experts here
    tokens_here: int
    padded_tokens: int  # per rank: every rank contributes as many as the longest
    sent_bytes: tuple[int, int] = (0, 0)

    @property
    def has_spare_rows(self) -> bool:
        return self.local.has_spare_rows


class AllGatherDispatcher(LocalDispatcher):
    """Every rank gathers all tokens of the group and takes the rows of its own experts; results are reduce-scattered.

    Moves P*T rows whatever k is, with one collective instead of three. No shape depends on the routing and no host waits; the
    price is room for all rows that could come here (`room`).
    """

    name = "allgather"

    def __init__(self, num_experts: int, group: dist.ProcessGroup):
        super().__init__(num_experts)
        self.group, self.ranks = group, dist.get_world_size(group)
        self.experts_here = num_experts // self.ranks
        self.first_expert = dist.get_rank(group) * self.experts_here

    def plan(self, ids_TK: Tensor, limits: Limits = Limits()) -> AllGatherPlan:
        padded = limits.most_tokens if limits.most_tokens is not None else self._most_tokens(ids_TK)
        gathered = all_gather_rows(_pad_rows(ids_TK, padded, -1), self.group)
        here = (gathered >= self.first_expert) & (gathered < self.first_expert + self.experts_here)
        # the k experts of a token are different ones, so at most min(k, experts here) of them are here
        rows = self.ranks * most_rows(padded * min(ids_TK.shape[1], self.experts_here), self.experts_here, limits.capacity)
        local = LocalDispatcher(self.experts_here)._plan(torch.where(here, gathered - self.first_expert, -1), rows, True)
        return AllGatherPlan(local, ids_TK.shape[0], padded)

    def _most_tokens(self, ids_TK: Tensor) -> int:
        """Ask the ranks, and wait for the answer: for callers whose ranks may hold unequal numbers of tokens."""
        most = torch.full((), ids_TK.shape[0], device=ids_TK.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: AllGatherPlan | None = None):
        plan = plan or self.plan(ids_TK)
        # as a ring moves them: each rank's rows go to every other rank, and sums of as many come back; gradients likewise
        each_way = (self.ranks - 1) * plan.padded_tokens * (2 * row_bytes(x_TD) + row_bytes(weights_TK))
        plan.sent_bytes = (each_way, each_way)
        x_GD = all_gather_rows(_pad_rows(x_TD, plan.padded_tokens), self.group)
        weights_GK = all_gather_rows(_pad_rows(weights_TK, plan.padded_tokens), self.group)
        rows_RD, offsets_e, weights_R, _ = super().dispatch(x_GD, ids_TK, weights_GK, plan.local)
        return rows_RD, offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: AllGatherPlan) -> Tensor:
        y_GD = super().combine(rows_RD, plan.local)
        return reduce_scatter_rows(y_GD, self.group)[: plan.tokens_here]


@dataclass
class PaddedPlan:
    """Which assignment fills each of the E x C rows of this rank."""

    slot_R: Tensor  # int64: token * K + choice; T*K for a zero row
    offsets_e: Tensor  # int32
    capacity: int  # C
    num_tokens: int
    k: int
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.k


class PaddedDispatcher(LocalDispatcher):
    """Every expert gets exactly C rows from every rank, zeros where there are fewer: DeepSpeed's [E, C, D].

    All sizes follow from the capacity, so nothing is asked and no host waits. Without a capacity C is the largest load of an expert
    on any rank of the group, for which the host waits once.
    """

    name = "padded"

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None):
        super().__init__(num_experts)
        self.group, self.ranks = group, 1 if group is None else dist.get_world_size(group)

    def plan(self, ids_TK: Tensor, limits: Limits = Limits()) -> PaddedPlan:
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
        return PaddedPlan(slot_R, ends_e * (self.ranks * capacity), capacity, *ids_TK.shape)

    def _largest_load(self, counts_E: Tensor) -> int:
        most = counts_E.max()
        if self.ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: PaddedPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_AD = _pad_rows(x_TD, len(x_TD) + 1).index_select(0, plan.token_R)
        weights_A = torch.nn.functional.pad(weights_TK.reshape(-1), (0, 1)).index_select(0, plan.slot_R)
        rows_to_others = len(rows_AD) // self.ranks * (self.ranks - 1)
        each_way = rows_to_others * (2 * row_bytes(rows_AD) + weights_A.element_size())  # rows and weights go out, rows come back
        plan.sent_bytes = (each_way, each_way)
        return self._to_experts(rows_AD, plan), plan.offsets_e, self._to_experts(weights_A, plan), plan

    def _to_experts(self, rows_A: Tensor, plan: PaddedPlan) -> Tensor:
        """[E C, ...] -> [e P C, ...]: what came rank by rank is put in the order of the experts."""
        if self.ranks == 1:
            return rows_A
        return self._exchange(rows_A).unflatten(0, (self.ranks, -1, plan.capacity)).transpose(0, 1).flatten(0, 2)

    def combine(self, rows_RD: Tensor, plan: PaddedPlan) -> Tensor:
        if self.ranks > 1:
            rows_RD = self._exchange(rows_RD.unflatten(0, (-1, self.ranks, plan.capacity)).transpose(0, 1).flatten(0, 2))
        return _sum_rows(rows_RD, plan.token_R, plan.num_tokens + 1)[: plan.num_tokens]

    def _exchange(self, rows: Tensor) -> Tensor:
        each = [len(rows) // self.ranks] * self.ranks
        return all_to_all_rows(rows, each, each, self.group)


def row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def _pad_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]), value=value)


def build_dispatcher(
    kind: str, num_experts: int, k: int, group: dist.ProcessGroup | None, capacity_factor: float = math.inf, pad: bool = False
) -> LocalDispatcher:
    """kind: auto, alltoall or allgather; one rank always dispatches locally. capacity_factor: inf when nothing is dropped.

    auto gathers when that moves no more rows than an exchange would, and a capacity keeps the room small. pad: fill up to the
    capacity, which goes with auto and alltoall.
    """
    if pad:
        assert kind != "allgather", "an all-gather exchanges nothing that could be padded"
        return PaddedDispatcher(num_experts, group)
    if group is None or dist.get_world_size(group) == 1:
        return LocalDispatcher(num_experts)
    if kind == "auto":
        ranks = dist.get_world_size(group)
        kind = "allgather" if k >= ranks and room(num_experts, k, ranks, capacity_factor) <= MOST_ROOM else "alltoall"
    return {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}[kind](num_experts, group)


def room(num_experts: int, k: int, ranks: int, capacity_factor: float) -> float:
    """Rows for which an all-gather has room, over the rows of equally busy experts. Dropless, 8 experts, k 2, 2 ranks: 2.0."""
    return min(ranks * min(k, num_experts // ranks) / k, capacity_factor)
