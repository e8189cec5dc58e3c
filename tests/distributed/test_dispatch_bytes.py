"""What each dispatcher sends, counted at the process groups, against figures worked out from the routing by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import test_dispatchers as ways
from distributed.collectives import BytesSent
from megatron_moe.moe.dispatch import build_dispatcher
from megatron_moe.mpu.mesh import build_mesh

pytestmark = pytest.mark.distributed

EXPERTS, ROW, WEIGHT = ways.EXPERTS, ways.HIDDEN * 8, 8
K = 3
COUNTS = ways.TOKENS["unequal"]


def sent(kind: str, etp: int, chunks: int, node_size: int, fp8: bool = False) -> dict[str, tuple[int, int] | None]:
    """(forward, backward) of this rank over each group, and as the plan has it. node_size 0: nobody knows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ep = world // etp
    mesh = build_mesh("cpu", 1, [ep], 0, etp=etp, node_size=node_size or None)
    groups = {"ep": mesh.expert_group(ep), "etp": mesh.expert_tensor_group(ep)}
    nodes = mesh.expert_node_groups(ep)
    if nodes is not None and kind == "hierarchical":
        groups |= {"within": nodes[0], "across": nodes[1]}
    dispatcher = build_dispatcher(
        kind, EXPERTS, K, groups["ep"], pad=kind == "padded", slices=groups["etp"], nodes=nodes, chunks=chunks, fp8=fp8
    )
    x, ids, weights = ways.tokens_of(rank, COUNTS, K)
    plan = dispatcher.plan(ids)
    with BytesSent() as forward:
        y = dispatcher.through(ways.FakeExperts(rank // etp * EXPERTS // ep), x, ids, weights, plan)
    with BytesSent() as backward:
        y.sum().backward()
    return {name: (forward.of(g), backward.of(g)) for name, g in groups.items()} | {"plan": plan.sent_bytes, "far": plan.far_bytes}


def routed(world: int, etp: int) -> list[tuple[int, int]]:
    """(source, owner) of every row; the owner is the one with the source's slice number."""
    here = EXPERTS // (world // etp)
    ids = [ways.tokens_of(rank, COUNTS, K)[1].flatten().tolist() for rank in range(world)]
    return [(source, e // here * etp + source % etp) for source, experts in enumerate(ids) for e in experts if e >= 0]


def exchanged(rows: list[tuple[int, int]], rank: int, weights: int = WEIGHT) -> tuple[int, int]:
    """Rows and weights go out and rows come back; their gradients the other way round. Rows to the own rank are not sent."""
    out, back = sum(a == rank != b for a, b in rows), sum(b == rank != a for a, b in rows)
    return out * (ROW + weights) + back * ROW, back * (ROW + weights) + out * ROW


def spread(rows: list[tuple[int, int]], rank: int, etp: int) -> tuple[int, int]:
    """Every row at its owner goes to the other slices, and a part of its result comes from each."""
    return exchanged([(owner, owner // etp * etp + s) for _, owner in rows for s in range(etp)], rank)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("world", "etp"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_an_all_to_all_sends_routed_rows_and_nothing_else(world, etp, chunks):
    rows = routed(world, etp)
    assert 0 < len(rows) < sum(COUNTS[:world]) * K  # some are dropped
    chunks = chunks if world > etp else 1
    for rank, found in enumerate(run_distributed(sent, world, "alltoall", etp, chunks, 0)):
        expected = {"ep": exchanged(rows, rank), "etp": spread(rows, rank, etp)}
        assert found == expected | {"plan": tuple(map(sum, zip(*expected.values()))), "far": None}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("world", "etp"), [(4, 1), pytest.param(8, 2, marks=pytest.mark.matrix)])
def test_rows_of_an_all_to_all_to_other_nodes_are_counted_apart(world, etp, chunks):
    rows, node = routed(world, etp), 2 * etp
    far = [(a, b) for a, b in rows if a // node != b // node]
    assert 0 < len(far) < sum(a != b for a, b in rows)  # some stay near
    for rank, found in enumerate(run_distributed(sent, world, "alltoall", etp, chunks, node)):
        assert found["far"] == exchanged(far, rank)
        assert found["plan"] == tuple(map(sum, zip(exchanged(rows, rank), spread(rows, rank, etp))))


def test_rows_in_fp8_to_other_nodes_are_counted_as_they_travel():
    far = [(a, b) for a, b in routed(4, 1) if a // 2 != b // 2]
    saved = ROW - ways.HIDDEN - 4  # of a row on its way out: an element is a byte, and a scale of four comes along
    for rank, found in enumerate(run_distributed(sent, 4, "alltoall", 1, 1, 2, True)):
        forward, backward = exchanged(far, rank)
        assert found["far"] == (forward - saved * sum(a == rank for a, _ in far), backward)


def crossing(world: int, etp: int, node_size: int) -> list[tuple[int, int]]:
    """(source, the rank of its number on a node) for every token and every node on which it has experts, be they one or three."""
    here = EXPERTS // (world // etp)
    out = []
    for source in range(world):
        for ids in ways.tokens_of(source, COUNTS, K)[1].tolist():
            nodes = {e // here * etp // node_size for e in ids if e >= 0}
            out += [(source, node * node_size + source % node_size) for node in sorted(nodes)]
    return out


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("world", "etp", "node_size"), [(4, 1, 2), pytest.param(8, 2, 4, marks=pytest.mark.matrix)])
def test_a_token_crosses_to_a_node_once_however_many_of_its_experts_are_there(world, etp, node_size, chunks):
    rows, tokens = routed(world, etp), crossing(world, etp, node_size)
    onward = [(owner // node_size * node_size + a % node_size, owner) for a, owner in rows]  # from where it crossed to the owner
    found = run_distributed(sent, world, "hierarchical", etp, chunks, node_size)
    for rank, f in enumerate(found):
        expected = {
            "ep": (0, 0), "etp": spread(rows, rank, etp), "within": exchanged(onward, rank), "across": exchanged(tokens, rank, K * WEIGHT)
        }  # fmt: skip
        assert f == expected | {"plan": tuple(map(sum, zip(*expected.values()))), "far": expected["across"]}
    far_tokens, far_rows = (sum(a // node_size != b // node_size for a, b in pairs) for pairs in (tokens, rows))
    assert 0 < far_tokens < far_rows  # a direct all-to-all sends the second number
    for way in (0, 1):  # out with the weights, and one row back
        assert sum(f["across"][way] for f in found) == far_tokens * (2 * ROW + K * WEIGHT)


@pytest.mark.parametrize(("world", "etp"), [(2, 1), (4, 2), (2, 2)])
def test_an_all_gather_sends_every_token_of_the_longest_batch_to_everyone(world, etp):
    each_way = (world - 1) * max(COUNTS[:world]) * (2 * ROW + K * WEIGHT)
    for found in run_distributed(sent, world, "allgather", etp, 1, 0):
        assert tuple(a + b for a, b in zip(found["ep"], found["etp"])) == found["plan"] == (each_way, each_way)


@pytest.mark.parametrize(("world", "etp"), [(2, 1), (4, 1), (4, 2), (2, 2)])
def test_padded_rows_fill_every_expert_up_to_the_capacity(world, etp):
    ids = [ways.tokens_of(rank, COUNTS, K)[1].flatten().tolist() for rank in range(world)]
    capacity = max(row.count(e) for row in ids for e in range(EXPERTS))
    ep = world // etp
    exchange = EXPERTS * capacity * (ep - 1) // ep * (2 * ROW + WEIGHT)
    gather = EXPERTS * capacity * (etp - 1) * (2 * ROW + WEIGHT)
    for found in run_distributed(sent, world, "padded", etp, 1, 0):
        assert found == {"ep": (exchange,) * 2, "etp": (gather,) * 2, "plan": (exchange + gather,) * 2, "far": None}


def messages(kind: str) -> dict[str, int]:
    """Of the rows that this rank sends out: how many ranks of other nodes get any. Every token goes to every expert."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = build_mesh("cpu", 1, [world], 0, node_size=2 if kind == "hierarchical" else None)
    nodes = mesh.expert_node_groups(world)
    dispatcher = build_dispatcher(kind, world, world, mesh.expert_group(world), nodes=nodes)
    plan = dispatcher.plan(torch.arange(world).expand(5, world))
    leg = plan.across if kind == "hierarchical" else plan.leg
    ranks = dist.get_process_group_ranks(leg.group)
    far = [n for r, n in zip(ranks, leg.send_P) if r // 2 != rank // 2]
    return {"messages": sum(n > 0 for n in far), "rows": sum(far)}


def test_between_nodes_there_are_fewer_messages_and_rows():
    assert run_distributed(messages, 8, "alltoall") == [{"messages": 6, "rows": 30}] * 8
    assert run_distributed(messages, 8, "hierarchical") == [{"messages": 3, "rows": 15}] * 8
