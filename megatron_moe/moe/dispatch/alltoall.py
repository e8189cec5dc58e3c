"""Each row travels to the rank of its expert, in exact sizes: nothing is padded, dropped or sent in vain.

How many rows go where is known on the device. It is exchanged there, and read by the host once for the layer - also when the tokens
travel in several parts (overlap.py).
"""
# A rows that leave, R rows to compute here, E experts, e experts here, P ranks, S slices, C parts of the tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.kernels.fp8 import packed_bytes
from megatron_moe.kernels.rows import rows_by_number
from megatron_moe.moe.dispatch.base import (
    NO_LIMITS,
    Limits,
    LocalDispatcher,
    addends_of,
    gather_rows,
    inverse,
    reorder_rows,
    row_bytes,
    sum_rows,
)
from megatron_moe.moe.dispatch.exchange import Flight, exchange_counts, launch
from megatron_moe.moe.dispatch.slices import Slices


@dataclass
class Leg:
    """One exchange on the way of the rows: how many go to and come from each rank."""

    group: dist.ProcessGroup
    send_P: list[int]
    receive_P: list[int]

    def launch(self, rows: Tensor, fp8: bool = False) -> Flight:
        return launch(rows, self.receive_P, self.send_P, self.group, fp8)

    def launch_back(self, rows: Tensor) -> Flight:
        return launch(rows, self.send_P, self.receive_P, self.group)

    def sent_rows(self) -> tuple[int, int]:
        """To others: on the way out, and on the way back."""
        rank = dist.get_rank(self.group)
        return sum(self.send_P) - self.send_P[rank], sum(self.receive_P) - self.receive_P[rank]

    def far_rows(self, nodes: int) -> tuple[int, int]:
        """Of these, those to other nodes, where the group's ranks are on so many, one node's behind another's."""
        numbers = len(self.send_P) // nodes
        first = dist.get_rank(self.group) // numbers * numbers
        near = slice(first, first + numbers)
        return sum(self.send_P) - sum(self.send_P[near]), sum(self.receive_P) - sum(self.receive_P[near])


@dataclass
class Arrival:
    """What came to the owners of the experts, and the order that groups it by expert."""

    rows_S: list[int]  # how many come to each slice of the experts here
    order_R: Tensor  # row r of the experts is the order_R[r]-th row here
    back_R: Tensor  # the way back
    offsets_e: Tensor  # int32


@dataclass
class AllToAllPlan:
    """The order in which rows leave, where they go, and what is made of what comes."""

    slot_A: Tensor  # int64: token * K + choice
    addend_A: Tensor  # int64: token * addends + addend, see sum_rows
    addends: int
    num_tokens: int
    leg: Leg
    arrival: Arrival
    row_TK: Tensor | None = None  # of the rows that leave: see `sum_rows`
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)
    far_bytes: tuple[int, int] | None = None

    @property
    def offsets_e(self) -> Tensor:
        return self.arrival.offsets_e


class AllToAllDispatcher(LocalDispatcher):
    """Experts are split over the ranks of `group`, which exchange rows directly. fp8: on the way out in e4m3, also rows to themselves. nodes: over how many the
    ranks are spread, where that is known; it counts, and changes nothing."""

    name = "alltoall"
    has_gap = True

    def __init__(
        self, num_experts: int, group: dist.ProcessGroup, slices: Slices | None = None, fp8: bool = False, nodes: int | None = None
    ):
        super().__init__(num_experts)
        self.fp8, self.nodes = fp8, nodes
        self.group, self.ranks = group, dist.get_world_size(group)
        self.slices = slices or Slices()

    # ------------------------------------------------------------ how many rows go where

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> AllToAllPlan:
        return self.plans([ids_TK])[0]

    def plans(self, parts: Sequence[Tensor]) -> list[AllToAllPlan]:
        """One for each part of the tokens; the counts of all of them are exchanged, and waited for, together."""
        orders = [self._order(ids_TK) for ids_TK in parts]
        send_CPe = torch.stack([counts_E for _, counts_E in orders]).unflatten(1, (self.ranks, -1))
        receive_CPe = exchange_counts(send_CPe, self.group)
        arriving_CSPe = self.slices.all_counts(receive_CPe).transpose(0, 1)
        # the one host sync of the layer: collectives want their sizes on the host
        sizes = on_host([send_CPe.sum(2), receive_CPe.sum(2), arriving_CSPe.sum((2, 3))])
        plans = []
        for ids_TK, (order_A, _), arriving_SPe, (send_P, receive_P, rows_S) in zip(parts, orders, arriving_CSPe, sizes):
            slot_A = order_A[: sum(send_P)]
            addend_A, addends = addends_of(ids_TK, self.ranks, self.num_experts // self.ranks)
            has_all = addends == 1 and len(slot_A) == ids_TK.numel()
            # they lie (slice, source, expert, token), and are wanted (expert, source, slice, token)
            arrival = arrival_of(arriving_SPe, rows_S, (2, 1, 0))
            leg = Leg(self.group, send_P, receive_P)
            row_TK = rows_by_number(slot_A, ids_TK.shape[1]) if has_all else None
            plans.append(AllToAllPlan(slot_A, addend_A.index_select(0, slot_A), addends, len(ids_TK), leg, arrival, row_TK))
        return plans

    # ------------------------------------------------------------ the way out, and back

    def through(
        self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """`meanwhile` is called when rows have set off, and its backward when the gradients of rows have."""
        flights = self.depart(x_TD, weights_TK, plan)
        if meanwhile is not None:
            meanwhile()
        rows_RD, row_weights_R = self.arrive(flights, plan)
        return self.combine(experts(rows_RD, plan.offsets_e, row_weights_R, plan.has_spare_rows), plan)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: AllToAllPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_RD, weights_R = self.arrive(self.depart(x_TD, weights_TK, plan), plan)
        return rows_RD, plan.offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        return self.arrive_back(self.depart_back(rows_RD, plan), plan)

    def depart(self, x_TD: Tensor, weights_TK: Tensor, plan: AllToAllPlan) -> list[Flight]:
        """Rows and their gate weights set off."""
        rows, weights = gather_rows(x_TD, plan.addend_A, plan.addends, plan.row_TK), weights_TK.reshape(-1).index_select(0, plan.slot_A)
        out, among = plan.leg.sent_rows(), self.slices.sent_rows(plan.arrival.rows_S)
        plan.sent_bytes = self._bytes_of(out, rows, weights, also=among)
        plan.far_bytes = None if self.nodes is None else self._bytes_of(plan.leg.far_rows(self.nodes), rows, weights)
        return [plan.leg.launch(rows, self.fp8), plan.leg.launch(weights)]

    def _bytes_of(
        self, way: tuple[int, int], rows: Tensor, weights: Tensor, also: tuple[int, int] = (0, 0)
    ) -> tuple[int, int]:  # fmt: skip
        """(forward, backward) of rows that go out and back, in FP8 where that is how they go, and of those that go in their own type."""
        forward, backward = sent_bytes([(*each, row_bytes(rows), weights.element_size()) for each in (way, also)])
        if self.fp8:
            forward -= way[0] * (row_bytes(rows) - packed_bytes(rows.shape[1]))
        return forward, backward

    def arrive(self, flights: list[Flight], plan: AllToAllPlan) -> tuple[Tensor, ...]:
        """By expert, as the experts take them."""
        return tuple(self._to_slices(flight.land(), plan.arrival) for flight in flights)

    def depart_back(self, rows_RD: Tensor, plan: AllToAllPlan) -> Flight:
        return plan.leg.launch_back(self._from_slices(rows_RD, plan.arrival))

    def arrive_back(self, flight: Flight, plan: AllToAllPlan) -> Tensor:
        return sum_rows(flight.land(), plan.addend_A, plan.num_tokens, plan.addends, plan.row_TK)

    def _to_slices(self, rows: Tensor, arrival: Arrival) -> Tensor:
        return reorder_rows(self.slices.gather(rows, arrival.rows_S), arrival.order_R, arrival.back_R)

    def _from_slices(self, rows_RD: Tensor, arrival: Arrival) -> Tensor:
        return self.slices.sum(reorder_rows(rows_RD, arrival.back_R, arrival.order_R), arrival.rows_S)


def sent_bytes(ways: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """(forward, backward), exact, of ways on which (`out`, `back`) rows go to others, of `row` bytes with `weights` bytes of gate weights.
    Rows and weights go out and rows come back; their gradients the other way round."""
    forward = sum(out * (row + weights) + back * row for out, back, row, weights in ways)
    return forward, sum(back * (row + weights) + out * row for out, back, row, weights in ways)


def arrival_of(blocks: Tensor, rows_S: list[int], wanted: tuple[int, ...]) -> Arrival:
    """Of rows that lie in `blocks`, the last dim fastest, and are wanted with the dims in the order `wanted`: experts first."""
    per_expert_e = blocks.movedim(wanted[0], -1).flatten(0, -2).sum(0)
    order_R = turned(blocks, sum(rows_S), wanted)
    return Arrival(rows_S, order_R, inverse(order_R), per_expert_e.cumsum(0).to(torch.int32))


def turned(blocks: Tensor, rows: int, wanted: tuple[int, ...]) -> Tensor:
    """Rows lie in blocks of these sizes, the last dim of `blocks` fastest: their order with the last dim of `wanted` fastest. The rows
    of a block stay together, in their order.

    Example: blocks [[1, 2], [1, 0]], rows a | b c | d |, wanted (1, 0) -> a d b c: [0, 3, 1, 2].
    """
    place = torch.arange(blocks.numel(), device=blocks.device).view([blocks.shape[dim] for dim in wanted])
    place = place.permute(*(wanted.index(dim) for dim in range(blocks.ndim)))
    return place.flatten().repeat_interleave(blocks.flatten(), output_size=rows).argsort(stable=True)


def on_host(tables: Sequence[Tensor]) -> list[list[list[int]]]:
    """Tables [C, n] -> for each of the C parts a list for each table. The host waits, once for all of them."""
    ends = [0, *accumulate(t.shape[1] for t in tables)]
    return [[row[start:end] for start, end in pairwise(ends)] for row in torch.cat(list(tables), 1).tolist()]
