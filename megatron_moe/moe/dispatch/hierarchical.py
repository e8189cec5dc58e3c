"""The all-to-all in two legs (DeepSpeed-MoE, arXiv 2201.05596, section 5.3; Tutel, arXiv 2206.03382, calls it 2DH).

Among P ranks on N nodes a direct all-to-all sends P - N small messages from each rank to other nodes. Here a rank first hands its rows
to a neighbour on its own node: to the one whose number on the node is that of the row's owner. Then ranks of equal number
exchange between nodes. Each row crosses between nodes once, or not at all, and a rank sends N - 1 messages to other nodes, which
have the rows of all its neighbours in them. The price is a second journey within the node, where links are fast.

Worked example, ranks 0 1 | 2 3 on two nodes: a row from 0 for an expert of 3 goes 0 -> 1 (3 is number 1 of its node) -> 3.
"""
# N nodes, G ranks of this group on each node, P = N * G ranks, rank = node * G + number; E experts, e experts here, C parts

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher, Traffic
from megatron_moe.moe.dispatch.exchange import exchange_counts
from megatron_moe.moe.dispatch.slices import Slices


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
        super().__init__(num_experts, group, slices)
        self.within, self.across = within, across
        self.nodes, self.numbers = dist.get_world_size(across), dist.get_world_size(within)
        assert self.nodes * self.numbers == self.ranks, f"{self.nodes} nodes x {self.numbers} != {self.ranks} ranks"

    def _numbered(self, ids_TK: Tensor) -> Tensor:
        """(node, number, expert) -> (number, node, expert): the first leg goes by number."""
        experts_here = self.num_experts // self.ranks
        rank_TK = ids_TK // experts_here
        turned_TK = rank_TK % self.numbers * self.nodes + rank_TK // self.numbers
        return torch.where(ids_TK < 0, ids_TK, turned_TK * experts_here + ids_TK % experts_here)

    def _count(self, counts_CE: Tensor) -> tuple[list[Traffic], Tensor]:
        send_CGNe = counts_CE.unflatten(1, (self.numbers, self.nodes, -1))
        here_CGNe = exchange_counts(send_CGNe, self.within)  # from neighbour G, through this rank, to node N
        onward_CNGe = here_CGNe.transpose(1, 2)
        arriving_CNGe = exchange_counts(onward_CNGe, self.across)
        first = Traffic(self.within, send_CGNe.sum((2, 3)), here_CGNe.sum((2, 3)), here_CGNe.sum(3))
        second = Traffic(self.across, onward_CNGe.sum((2, 3)), arriving_CNGe.sum((2, 3)))
        return [first, second], arriving_CNGe.flatten(1, 2)  # from rank node * G + number, as if sent directly
