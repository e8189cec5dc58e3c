"""Which dispatcher a layer gets, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_moe.moe.dispatch.allgather import AllGatherDispatcher
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.base import LocalDispatcher
from megatron_moe.moe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_moe.moe.dispatch.overlap import OverlappedDispatcher
from megatron_moe.moe.dispatch.padded import PaddedDispatcher
from megatron_moe.moe.dispatch.slices import Slices

MOST_ROOM = 1.25  # that `auto` lets an all-gather reserve
NEAR_OVER_FAR = 9.0  # speed of links within a node over those between nodes, as `auto` takes it: 450 and 50 GB/s of an H100 node
WORTH_TWO_LEGS = 0.9  # of the time of one leg: a second one waits for the first, and has a start of its own


@dataclass(frozen=True)
class Choice:
    """Of a layer."""

    kind: str  # local, padded, allgather, alltoall, hierarchical, fused
    chunks: int = 1
    why: str = ""  # nothing, where it is what was asked for

    @property
    def name(self) -> str:
        return self.kind if self.chunks == 1 else f"{self.kind} in {self.chunks} chunks"


def choose(
    kind: str, num_experts: int, k: int, ep: int, etp: int = 1, capacity_factor: float = math.inf, pad: bool = False, chunks: int = 1,
    nodes: int = 1, fp8: bool = False,
) -> Choice:  # fmt: skip
    """For experts over `ep` ranks, each cut into `etp` slices. kind: that of --moe-token-dispatcher, whose auto is of a
    machine without GPUs: where kernels may take its place, parallel/fused.py finds out. capacity_factor: inf when nothing is
    dropped. pad: fill up to the capacity. nodes: over how many the `ep` ranks are spread, several of them on each.
    fp8: rows are to travel in FP8.
    """
    if pad:
        return Choice("padded")
    if ep * etp == 1:
        return Choice("local")
    chunks = chunks if ep > 1 else 1
    if kind == "hierarchical" and nodes == 1:
        return Choice("alltoall", chunks, f"EP {ep}: alltoall, there are no two stages: its ranks are all on one node, or each on its own")
    if kind != "auto":
        return Choice(kind, chunks)
    about = f"{num_experts} experts, k {k}, EP {ep}{f', ETP {etp}' if etp > 1 else ''}"
    if fp8 and ep > 1:
        return Choice("alltoall", chunks, f"{about}: alltoall, which is how --moe-fp8-dispatch sends rows")
    crossing = Crossing(num_experts, k, nodes, ep // nodes)
    if chunks > 1:
        name, why = ("hierarchical", f" {crossing}") if crossing.pays_in_two_legs else ("alltoall", "")
        return Choice(name, chunks, f"{about}: {name}, which --moe-overlap-chunks {chunks} cuts{'.' * bool(why)}{why}")
    copies, reserved = ep * etp - 1, room(num_experts, k, ep, capacity_factor)
    name = "allgather" if k >= ep and reserved <= MOST_ROOM else "alltoall"
    if name == "alltoall" and crossing.pays_in_two_legs:
        return Choice("hierarchical", 1, f"{about}: hierarchical. {crossing}")
    return Choice(name, 1, (
        f"{about}: {name}. A token is sent to other ranks {k * copies / ep:.3g} times by an all-to-all, {copies} times by an all-gather, "
        f"which has room for {reserved:.3g} times the rows of equally busy experts (and is taken up to {MOST_ROOM})"
        f"{f'. {crossing}' if nodes > 1 else ''}"
    ))  # fmt: skip


@dataclass(frozen=True)
class Crossing:
    """Rows of a token that leave its node, and those that travel within one, at equally likely experts on `nodes` nodes of `numbers` ranks.

    Row by row k (N - 1) / N cross. In two legs a token crosses once to each of its nodes, N (1 - C(E - E/N, k) / C(E, k)) of them, and its
    k rows then travel within these. Example, 64 experts, k 8, 4 nodes of 8: 6 rows cross, or 2.74, and 7 more stay near.
    """

    num_experts: int
    k: int
    nodes: int
    numbers: int

    @property
    def by_row(self) -> float:
        return self.k * (self.nodes - 1) / self.nodes

    @property
    def once(self) -> float:
        E, N = self.num_experts, self.nodes
        return (N - 1) * (1 - math.comb(E - E // N, self.k) / math.comb(E, self.k))

    @property
    def near(self) -> float:
        return self.k * (self.numbers - 1) / self.numbers

    @property
    def pays_in_two_legs(self) -> bool:
        return self.nodes > 1 and self.once + self.near / NEAR_OVER_FAR < WORTH_TWO_LEGS * self.by_row

    def __str__(self) -> str:
        return (
            f"Over {self.nodes} nodes {self.by_row:.3g} rows of a token cross one by one, {self.once:.3g} if it crosses once to each; "
            f"{self.near:.3g} then travel within a node, where links are taken to be {NEAR_OVER_FAR:g} times as fast"
        )


def room(num_experts: int, k: int, ranks: int, capacity_factor: float) -> float:
    """Rows for which an all-gather has room, over the rows of equally busy experts. Dropless, 8 experts, k 2, 2 ranks: 2.0."""
    return min(ranks * min(k, num_experts // ranks) / k, capacity_factor)


def build_dispatcher(
    kind: str,
    num_experts: int,
    k: int,
    group: dist.ProcessGroup | None,
    capacity_factor: float = math.inf,
    pad: bool = False,
    *,
    slices: dist.ProcessGroup | None = None,
    nodes: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    chunks: int = 1,
    fp8: bool = False,
) -> Any:
    """`group`: ranks that share the experts out; `slices`: ranks that share each of them; nodes: (those of `group` on this node, those of
    equal number on all nodes)."""
    ep, etp = (1 if g is None else dist.get_world_size(g) for g in (group, slices))
    num_nodes = 1 if nodes is None else dist.get_world_size(nodes[1])
    choice = choose(kind, num_experts, k, ep, etp, capacity_factor, pad, chunks, num_nodes, fp8)
    cut = Slices(slices)
    if choice.kind == "local":
        dispatcher: Any = LocalDispatcher(num_experts)
    elif choice.kind == "padded":
        dispatcher = PaddedDispatcher(num_experts, group, cut)
    elif choice.kind == "allgather":
        dispatcher = AllGatherDispatcher(num_experts, group, cut)
    elif choice.kind == "hierarchical":
        dispatcher = HierarchicalDispatcher(num_experts, group, *nodes, cut)
    else:
        dispatcher = AllToAllDispatcher(num_experts, group, cut, fp8 and ep > 1, None if nodes is None else num_nodes)
    if choice.chunks > 1:
        dispatcher = OverlappedDispatcher(dispatcher, choice.chunks)
    assert dispatcher.name == choice.name, f"{dispatcher.name} is not {choice.name}"
    dispatcher.why = choice.why
    return dispatcher
