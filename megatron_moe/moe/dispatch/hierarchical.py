"""The all-to-all in two legs, where ranks are on several nodes: each token crosses to a node once, however many of its experts are there.

    source --across--> the rank of its own number on each node that it needs --within--> the owners of its experts there

Between nodes goes one row per (token, node), with the token's experts there and their gate weights; within the node, one per
(token, expert). The results are added up where they crossed, in at least float32, and one row per (token, node) goes back.
Gradients go the same ways. The legs of nodes are rails: a rank exchanges only with those of its own number, N - 1 messages.
(DeepSpeed-MoE, arXiv 2201.05596, section 5.3, and Tutel, arXiv 2206.03382, have two legs and send every row; DeepEP's internode
kernels send a token once.)

Worked example, ranks 0 1 | 2 3 on two nodes, an expert on each, k = 3: a token of rank 0 for experts 1, 2 and 3. To 2 goes one row with
the ids (-1, 0, 1) of the experts of that node, from there one row to 3 and none to others; 0 sends a row to 1. A direct all-to-all
would send two rows to the other node.

The lists of experts are integers that travel with the plan: 4 bytes for each choice of a row that crosses, once per layer and forward.
"""
# N nodes, G ranks of this group on each node, P = N * G ranks, rank = node * G + number; E experts, e experts here, n experts of a node
# T tokens, K experts per token, U (token, node) rows that cross from here, V that cross to here, A rows that go within the node
# R rows to compute here, S slices, C parts of the tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher, Arrival, Leg, arrival_of, on_host, sent_bytes
from megatron_moe.moe.dispatch.base import gather_rows, row_bytes, sum_rows
from megatron_moe.moe.dispatch.exchange import Flight, exchange_counts
from megatron_moe.moe.dispatch.slices import Slices
from megatron_moe.moe.routing import count_assignments


@dataclass
class HierarchicalPlan:
    """Which tokens cross to which node, which rows go on from here, and what is made of those that arrive."""

    token_U: Tensor  # int64: rows leave by (node, token)
    is_there_UK: Tensor  # bool: the choice is an expert of the row's node
    num_tokens: int
    across: Leg
    slot_A: Tensor  # int64: row that came * K + choice; they go on by (expert, source node, token)
    within: Leg
    arrival: Arrival
    has_spare_rows: bool = False
    sent_bytes: tuple[int, int] = (0, 0)
    far_bytes: tuple[int, int] | None = None

    @property
    def offsets_e(self) -> Tensor:
        return self.arrival.offsets_e

    @property
    def row_A(self) -> Tensor:
        return self.slot_A // self.is_there_UK.shape[1]


class HierarchicalDispatcher(AllToAllDispatcher):
    """`within`: the ranks of the group on this node; `across`: those of equal number on all nodes."""

    name = "hierarchical"

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup,
        within: dist.ProcessGroup,
        across: dist.ProcessGroup,
        slices: Slices | None = None,
    ):
        super().__init__(num_experts, group, slices, nodes=dist.get_world_size(across))
        self.within, self.across = within, across
        self.numbers = dist.get_world_size(within)
        assert self.nodes * self.numbers == self.ranks, f"{self.nodes} nodes x {self.numbers} != {self.ranks} ranks"
        self.experts_of_node = num_experts // self.nodes

    # ------------------------------------------------------------ how many rows go where

    def plans(self, parts: Sequence[Tensor]) -> list[Any]:
        """One for each part of the tokens. Sizes of both legs follow from counts, which are waited for together; the lists of experts
        are sent when it is known to how many rows they belong."""
        goes = [self._nodes_of(ids_TK) for ids_TK in parts]
        rows_CN = torch.stack([goes_NT.sum(1) for goes_NT in goes])
        counts_CNn = torch.stack([count_assignments(ids_TK, self.num_experts) for ids_TK in parts]).unflatten(1, (self.nodes, -1))
        coming_CNx = exchange_counts(torch.cat([rows_CN[..., None], counts_CNn], 2), self.across)
        onward_CGNe = coming_CNx[..., 1:].unflatten(2, (self.numbers, -1)).transpose(1, 2)
        arriving_CGNe = exchange_counts(onward_CGNe, self.within)
        arriving_CSGNe = self.slices.all_counts(arriving_CGNe).transpose(0, 1)
        # the one host sync of the layer
        legs = rows_CN, coming_CNx[..., 0], onward_CGNe.sum((2, 3)), arriving_CGNe.sum((2, 3))
        sizes = on_host([*legs, arriving_CSGNe.sum((2, 3, 4))])
        return [self._part(*part) for part in zip(parts, goes, arriving_CSGNe, sizes)]

    def _nodes_of(self, ids_TK: Tensor) -> Tensor:
        """bool [N, T]: the token has an expert on the node."""
        node_KT = torch.where(ids_TK < 0, self.nodes, ids_TK // self.experts_of_node).t()
        goes = torch.zeros(self.nodes + 1, len(ids_TK), dtype=torch.bool, device=ids_TK.device)
        return goes.scatter_(0, node_KT, True)[:-1]

    def _part(self, ids_TK: Tensor, goes_NT: Tensor, arriving_SGNe: Tensor, sizes: list[list[int]]) -> HierarchicalPlan:
        across, within, rows_S = Leg(self.across, *sizes[:2]), Leg(self.within, *sizes[2:4]), sizes[4]
        num_tokens, leaving = len(ids_TK), sum(across.send_P)
        # where the rows are is known by their number, so nothing is asked: they stand before the others
        order_U = (~goes_NT).flatten().to(torch.uint8).argsort(stable=True)[:leaving]
        token_U, node_U = order_U % max(num_tokens, 1), order_U // max(num_tokens, 1)
        there_UK = ids_TK.index_select(0, token_U) - node_U[:, None] * self.experts_of_node
        is_there_UK = (there_UK >= 0) & (there_UK < self.experts_of_node)
        ids_VK = across.launch(torch.where(is_there_UK, there_UK, -1).to(torch.int32)).land()
        slot_A = torch.where(ids_VK < 0, self.experts_of_node, ids_VK).flatten().argsort(stable=True)[: sum(within.send_P)]
        # they lie (slice, number, expert, node, token), and are wanted (expert, node, number, slice, token): by source rank
        arrival = arrival_of(arriving_SGNe.transpose(2, 3), rows_S, (2, 3, 1, 0))
        return HierarchicalPlan(token_U, is_there_UK, num_tokens, across, slot_A, within, arrival)

    # ------------------------------------------------------------ the way out, and back

    def depart(self, x_TD: Tensor, weights_TK: Tensor, plan: HierarchicalPlan) -> list[Flight]:
        """To the nodes."""
        rows_UD = gather_rows(x_TD, plan.token_U)
        weights_UK = torch.where(plan.is_there_UK, weights_TK.index_select(0, plan.token_U), 0.0)
        row, weight, weights = row_bytes(rows_UD), weights_UK.element_size(), row_bytes(weights_UK)
        near = plan.within.sent_rows(), self.slices.sent_rows(plan.arrival.rows_S)
        far = (*plan.across.sent_rows(), row, weights)
        plan.sent_bytes = sent_bytes([far, *((*way, row, weight) for way in near)])
        plan.far_bytes = sent_bytes([far])
        return [plan.across.launch(rows_UD), plan.across.launch(weights_UK)]

    def arrive(self, flights: list[Flight], plan: HierarchicalPlan) -> tuple[Tensor, ...]:
        """Within the node, and by expert."""
        rows_VD, weights_VK = (flight.land() for flight in flights)
        onward = gather_rows(rows_VD, plan.row_A), weights_VK.reshape(-1).index_select(0, plan.slot_A)
        under_way = [plan.within.launch(rows) for rows in onward]
        return tuple(self._to_slices(flight.land(), plan.arrival) for flight in under_way)

    def depart_back(self, rows_RD: Tensor, plan: HierarchicalPlan) -> Flight:
        """Added up where they came into the node."""
        rows_AD = plan.within.launch_back(self._from_slices(rows_RD, plan.arrival)).land()
        return plan.across.launch_back(sum_rows(rows_AD, plan.row_A, sum(plan.across.receive_P)))

    def arrive_back(self, flight: Flight, plan: HierarchicalPlan) -> Tensor:
        return sum_rows(flight.land(), plan.token_U, plan.num_tokens)
