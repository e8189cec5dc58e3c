"""Each row travels to the rank of its expert, in exact sizes: nothing is padded, dropped or sent in vain.

A journey has legs, one exchange each; this dispatcher's has one. How many rows go where is known on the device. It is exchanged
there, and read by the host once for all legs - and for all parts, when the tokens travel in several (overlap.py).
"""
# A rows that leave, R rows to compute here, E experts, e experts here, P ranks, S slices, C parts of the tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits, LocalDispatcher, addends_of, gather_rows, row_bytes, sum_rows
from megatron_moe.moe.dispatch.exchange import Flight, exchange_counts, launch
from megatron_moe.moe.dispatch.slices import Slices


@dataclass
class Leg:
    """One exchange on the way of the rows: how many go to and come from each rank, and how they set off again."""

    group: dist.ProcessGroup
    send_P: list[int]
    receive_P: list[int]
    onward_R: Tensor | None = None  # the rows that came, in the order of the next leg

    def launch(self, rows: Tensor) -> Flight:
        return launch(rows, self.receive_P, self.send_P, self.group)

    def land(self, flight: Flight) -> Tensor:
        rows = flight.land()
        return rows if self.onward_R is None else rows.index_select(0, self.onward_R)

    def launch_back(self, rows: Tensor) -> Flight:
        rows = rows if self.onward_R is None else rows.index_select(0, inverse(self.onward_R))
        return launch(rows, self.send_P, self.receive_P, self.group)

    def sent_rows(self) -> tuple[int, int]:
        """To others: on the way out, and on the way back."""
        rank = dist.get_rank(self.group)
        return sum(self.send_P) - self.send_P[rank], sum(self.receive_P) - self.receive_P[rank]


@dataclass
class Traffic:
    """Sizes of a leg, still on the device, for every part of the tokens."""

    group: dist.ProcessGroup
    send_CP: Tensor
    receive_CP: Tensor
    blocks_CPN: Tensor | None = None  # of the rows from P, those for rank N of the next leg

    def leg(self, part: int, send_P: list[int], receive_P: list[int]) -> Leg:
        onward_R = None if self.blocks_CPN is None else turned(self.blocks_CPN[part], sum(receive_P))
        return Leg(self.group, send_P, receive_P, onward_R)


@dataclass
class AllToAllPlan:
    """The order in which rows leave, the legs, and the order that groups what came by expert."""

    slot_A: Tensor  # int64: token * K + choice
    addend_A: Tensor  # int64: token * addends + addend, see sum_rows
    addends: int
    num_tokens: int
    legs: list[Leg]
    rows_S: list[int]  # how many come to each slice of the experts here
    arrival_R: Tensor  # row r of the experts is the arrival_R[r]-th row here
    offsets_e: Tensor  # int32
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)


class AllToAllDispatcher(LocalDispatcher):
    """Experts are split over the ranks of `group`, which exchange rows directly."""

    name = "alltoall"

    def __init__(self, num_experts: int, group: dist.ProcessGroup, slices: Slices | None = None):
        super().__init__(num_experts)
        self.group, self.ranks = group, dist.get_world_size(group)
        self.slices = slices or Slices()

    # ------------------------------------------------------------ how many rows go where

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> AllToAllPlan:
        return self.plans([ids_TK])[0]

    def plans(self, parts: Sequence[Tensor]) -> list[AllToAllPlan]:
        """One for each part of the tokens; the counts of all of them are exchanged, and waited for, together."""
        orders = [self._order(self._numbered(ids_TK)) for ids_TK in parts]
        traffic, arriving_CPe = self._count(torch.stack([counts_E for _, counts_E in orders]))
        arriving_CSPe = self.slices.all_counts(arriving_CPe).transpose(0, 1)
        tables = [*(sizes for t in traffic for sizes in (t.send_CP, t.receive_CP)), arriving_CSPe.sum((2, 3))]
        # the one host sync of the layer: collectives want their sizes on the host
        rows = torch.cat(tables, 1).tolist()
        plans = []
        for part, (ids_TK, (order_A, _), row) in enumerate(zip(parts, orders, rows)):
            sizes = _split(row, [t.shape[1] for t in tables])
            legs = [t.leg(part, next(sizes), next(sizes)) for t in traffic]
            slot_A = order_A[: sum(legs[0].send_P)]
            addend_A, addends = addends_of(ids_TK, self.ranks, self.num_experts // self.ranks)
            rows_S, arriving_SPe = next(sizes), arriving_CSPe[part]
            # they lie (slice, source, expert, token), and are wanted (expert, source, slice, token)
            arrival_R = turned(arriving_SPe, sum(rows_S))
            offsets_e = arriving_SPe.sum((0, 1)).cumsum(0).to(torch.int32)
            plans.append(AllToAllPlan(slot_A, addend_A.index_select(0, slot_A), addends, len(ids_TK), legs, rows_S, arrival_R, offsets_e))
        return plans

    def _numbered(self, ids_TK: Tensor) -> Tensor:
        """Experts numbered in the order in which their rows leave; -1 stays."""
        return ids_TK

    def _count(self, counts_CE: Tensor) -> tuple[list[Traffic], Tensor]:
        """Rows of each leg, and [C, P, e]: from each rank, for each expert here."""
        send_CPe = counts_CE.unflatten(1, (self.ranks, -1))
        receive_CPe = exchange_counts(send_CPe, self.group)
        return [Traffic(self.group, send_CPe.sum(2), receive_CPe.sum(2))], receive_CPe

    # ------------------------------------------------------------ the way out, and back

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: AllToAllPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_RD, weights_R = self.arrive(self.depart(x_TD, weights_TK, plan), plan)
        return rows_RD, plan.offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: AllToAllPlan) -> Tensor:
        return self.arrive_back(self.depart_back(rows_RD, plan), plan)

    def depart(self, x_TD: Tensor, weights_TK: Tensor, plan: AllToAllPlan) -> list[Flight]:
        """Rows and their gate weights, on the last leg."""
        rows, weights = gather_rows(x_TD, plan.addend_A, plan.addends), weights_TK.reshape(-1).index_select(0, plan.slot_A)
        plan.sent_bytes = self._sent_bytes(plan, row_bytes(rows), weights.element_size())
        *first, last = plan.legs
        for leg in first:
            rows, weights = leg.land(leg.launch(rows)), leg.land(leg.launch(weights))
        return [last.launch(rows), last.launch(weights)]

    def arrive(self, flights: list[Flight], plan: AllToAllPlan) -> tuple[Tensor, ...]:
        """By expert, as the experts take them."""
        landed = (plan.legs[-1].land(flight) for flight in flights)
        return tuple(self.slices.gather(rows, plan.rows_S).index_select(0, plan.arrival_R) for rows in landed)

    def depart_back(self, rows_RD: Tensor, plan: AllToAllPlan) -> Flight:
        """The last leg is the first one of the way back."""
        return plan.legs[-1].launch_back(self.slices.sum(rows_RD.index_select(0, inverse(plan.arrival_R)), plan.rows_S))

    def arrive_back(self, flight: Flight, plan: AllToAllPlan) -> Tensor:
        rows = flight.land()
        for leg in reversed(plan.legs[:-1]):
            rows = leg.launch_back(rows).land()
        return sum_rows(rows, plan.addend_A, plan.num_tokens, plan.addends)

    def _sent_bytes(self, plan: AllToAllPlan, row: int, weight: int) -> tuple[int, int]:
        """Exact: rows and weights go out and rows come back; their gradients the other way round."""
        ways = [*(leg.sent_rows() for leg in plan.legs), self.slices.sent_rows(plan.rows_S)]
        out, back = (sum(n) for n in zip(*ways))
        return out * (row + weight) + back * row, back * (row + weight) + out * row


def turned(blocks: Tensor, rows: int) -> Tensor:
    """Rows lie in blocks of these sizes, the last dim of `blocks` fastest: their order with the first dim fastest. The rows of a block
    stay together, in their order.

    Example: blocks [[1, 2], [1, 0]], rows a | b c | d | -> a d b c: [0, 3, 1, 2].
    """
    place = torch.arange(blocks.numel(), device=blocks.device).view(blocks.shape[::-1]).permute(*reversed(range(blocks.ndim)))
    return place.flatten().repeat_interleave(blocks.flatten(), output_size=rows).argsort(stable=True)


def inverse(order_R: Tensor) -> Tensor:
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return back_R


def _split(numbers: list[int], widths: list[int]) -> Iterator[list[int]]:
    ends = [0, *accumulate(widths)]
    return (numbers[start:end] for start, end in pairwise(ends))
