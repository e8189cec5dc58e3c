"""What a rank sends to others: how many bytes stay on its node and how many leave it, and how long that takes.

Rings (tensor, data and context parallelism) and routed rows (expert parallelism), which go one of four ways:

    alltoall       every row straight to the rank of its expert
    allgather      every token to every rank
    hierarchical   a token once to each node where it has experts, from there to their ranks
    fused          as alltoall, written by a kernel into the memory of the other ranks; within a node only

Worked example, 2 nodes of 2 ranks, 4 experts, k 2, 6 tokens a rank, one for each pair of experts: by an all-to-all 12 rows leave the
token, 3 of them stay on the rank, 3 go to the neighbour and 6 to the other node. Of the 6 pairs, 1 lies wholly on this node, 1
wholly on the other and 4 on both, so that 5 tokens go to the other node in place of 6 rows.
"""
# T tokens of a rank, K experts per token, E experts, P ranks that share them, N nodes

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_moe.training.planning.machines import Assumptions, Machine

PATHS = ("alltoall", "allgather", "hierarchical", "fused")
# Where the host waits for the device, once a forward of a layer: collectives want to know how many rows come (moe/dispatch/alltoall.py).
HOST_WAITS = {"alltoall": 1, "allgather": 0, "hierarchical": 1, "fused": 0}


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends to ranks of its node and to others, mean over ranks; seconds until the last one has what it waits for."""

    near: float = 0.0
    far: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.near + other.near, self.far + other.far, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Sent:
        return Sent(self.near * times, self.far * times, self.seconds * times)

    __rmul__ = __mul__


NOTHING = Sent()


# ---------------------------------------------------------------- rings


def on_a_node(ranks: int, stride: int, machine: Machine) -> int:
    """How many of a group of ranks that are `stride` apart share a node."""
    return max(min(ranks, machine.devices_per_node // stride), 1)


def ring_rate(ranks: int, stride: int, machine: Machine, assumed: Assumptions) -> float:
    """Bytes per second that a rank of a ring sends, of groups of ranks that are `stride` apart. Over nodes each node's members have a
    network adapter each, and a ring per adapter."""
    here = on_a_node(ranks, stride, machine)
    rate = machine.intra_node_bandwidth
    if ranks > here:
        rate = min(rate, here * machine.inter_node_bandwidth) if here > 1 else machine.inter_node_bandwidth
    return rate * 1e9 * assumed.network_efficiency


def around(sent: float, ranks: int, stride: int, machine: Machine, assumed: Assumptions, messages: float = 1.0) -> Sent:
    """A rank sends `sent` bytes to its neighbours in rings. Over nodes one link in `here` leaves the node."""
    here = on_a_node(ranks, stride, machine)
    far = sent / here if ranks > here else 0.0
    latency = messages * assumed.collective_latency_us * 1e-6
    return Sent(sent - far, far, latency + sent / ring_rate(ranks, stride, machine, assumed))


def ring(bytes_: float, ranks: int, stride: int, machine: Machine, assumed: Assumptions) -> Sent:
    """An all-gather or reduce-scatter of tensors of so many bytes in all; an all-reduce is both."""
    return NOTHING if ranks == 1 else around(bytes_ * (ranks - 1) / ranks, ranks, stride, machine, assumed)


# ---------------------------------------------------------------- routed rows


@dataclass(frozen=True)
class Routed:
    """What one rank routes in one layer. row: bytes of a token's vector; weight: of a gate weight. `here`: of the ranks on each node.
    With groups, a token may go to experts of `group_topk` of them only (DeepSeek-V3)."""

    tokens: float
    k: int
    experts: int
    ranks: int
    here: int
    row: float
    weight: float = 4.0
    groups: int | None = None
    group_topk: int | None = None

    @property
    def nodes(self) -> int:
        return self.ranks // self.here

    def distinct(self, parts: int) -> float:
        return distinct(parts, self.experts, self.k, self.groups, self.group_topk)


def distinct(parts: int, experts: int, k: int, groups: int | None = None, group_topk: int | None = None) -> float:
    """Expected number of `parts` (ranks or nodes, of equally many experts) among which the k experts of a token are, if every choice
    of k is as likely as any other: parts x (1 - C(E - E/parts, k) / C(E, k)). With groups: of k experts in `group_topk` groups."""
    groups, group_topk = groups or 1, group_topk or groups or 1
    size, part = experts // groups, experts // parts
    open_to = group_topk * size  # experts that a token can choose from
    if parts >= groups:  # a part lies within a group
        missed = 1 - group_topk / groups * (1 - _without(open_to, part, k))
    else:  # it has several groups, j of which are among the chosen ones
        own = groups // parts
        chance = [
            math.comb(own, j) * math.comb(groups - own, group_topk - j) / math.comb(groups, group_topk) for j in range(group_topk + 1)
        ]
        missed = sum(p * _without(open_to, min(j * size, open_to), k) for j, p in enumerate(chance))
    return parts * (1 - missed)


def _without(n: int, left_out: int, k: int) -> float:
    """Chance that none of k of n are among `left_out` ones."""
    return math.comb(n - left_out, k) / math.comb(n, k)


def legs(path: str, r: Routed, weight: float) -> list[tuple[float, float]]:
    """(bytes within the node, to other nodes) that a rank sends one way, by leg; each leg waits for the one before. Equally busy
    experts. weight: 0 where gate weights or their gradients do not travel."""
    away, every = r.ranks - r.here, r.tokens * r.k * (r.row + weight)
    if path in ("alltoall", "fused"):
        assert path == "alltoall" or not away, "the fused path reaches no other node"
        return [(every * (r.here - 1) / r.ranks, every * away / r.ranks)]
    if path == "allgather":
        whole = r.tokens * (r.ranks - 1) * (r.row + r.k * weight)
        far = whole / r.here if away else 0.0
        return [(whole - far, far)]
    assert path == "hierarchical", path
    across = r.tokens * r.distinct(r.nodes) * (r.row + r.k * weight) * (r.nodes - 1) / r.nodes  # all weights go with a row
    return [(0.0, across), (every * (r.here - 1) / r.here, 0.0)]


def one_pass(path: str, r: Routed) -> tuple[float, float]:
    """(near, far) bytes of a forward, or of its backward: out with gate weights, and back; gradients the other way round."""
    both = [*legs(path, r, r.weight), *legs(path, r, 0.0)]
    return sum(near for near, _ in both), sum(far for _, far in both)


def routed(path: str, r: Routed, busiest: float, machine: Machine, assumed: Assumptions) -> Sent:
    """The same with its time: that of the rank with `busiest` times the mean rows. Within a node and between nodes a leg goes on at
    once, so the slower of the two counts."""
    seconds = 0.0
    for near, far in (*legs(path, r, r.weight), *legs(path, r, 0.0)):
        slower = max(near / (machine.intra_node_bandwidth * 1e9), far / (machine.inter_node_bandwidth * 1e9))
        skew = 1.0 if path == "allgather" else busiest if near else min(busiest, r.nodes)
        seconds += slower * skew / assumed.network_efficiency + assumed.collective_latency_us * 1e-6
    return Sent(*one_pass(path, r), seconds)


def copied(path: str, r: Routed) -> float:
    """Bytes that a device reads and writes in a pass to put rows into the order in which they travel, beside what is kept for the
    backward (activations.py counts that) and what the network itself moves. Counted in moe/dispatch/.

    alltoall: written to leave; read on arrival; on the way back read, written to leave, read to be added up. hierarchical: as that
    on both legs, whose rows are tokens on the first. allgather: tokens written, rows read; rows read to be added into all tokens of all
    ranks, which are written twice and read. fused: tokens read where they are sent from; rows read when they are added up.
    """
    rows = r.tokens * r.k
    numbers = {
        "alltoall": 5 * rows,
        "hierarchical": 5 * rows + 4 * r.tokens * r.distinct(r.nodes),
        "allgather": 2 * rows + 4 * r.tokens * r.ranks,
        "fused": r.tokens + rows,
    }
    return numbers[path] * r.row
