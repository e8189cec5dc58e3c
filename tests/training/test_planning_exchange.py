"""What ranks send, by hand, by simulation, and as the dispatchers count it."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.arguments import parse_args
from megatron_moe.moe.dispatch import build_dispatcher
from megatron_moe.mpu.mesh import build_mesh
from megatron_moe.training.planning.exchange import HOST_WAITS, PATHS, Routed, around, copied, distinct, legs, one_pass, ring, routed
from megatron_moe.training.planning.layout import Layout
from megatron_moe.training.planning.machines import MACHINES, Assumptions
from megatron_moe.training.planning.search import pinned
from megatron_moe.training.planning.time import exchanges, path_of, step_time

H100, EXACT = MACHINES["h100-sxm"], Assumptions(network_efficiency=1.0, collective_latency_us=0.0)
SMALL = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 8 --topk 2 --mock-data --train-iters 2 "
PAIRS = Routed(tokens=6, k=2, experts=4, ranks=4, here=2, row=100.0, weight=0.0)  # the worked example of the module


# ---------------------------------------------------------------- distinct ranks and nodes


def test_experts_of_a_token_are_on_so_many_ranks():
    assert distinct(8, 64, 8) == pytest.approx(5.43, abs=0.005)  # shared/reference: a worked table
    assert distinct(8, 64, 2) == pytest.approx(1.89, abs=0.005)
    assert distinct(8, 8, 2) == pytest.approx(2.0)
    assert distinct(4, 64, 8) == pytest.approx(3.66, abs=0.005)
    assert distinct(1, 64, 8) == pytest.approx(1.0)
    assert distinct(64, 64, 8) == pytest.approx(8.0)  # an expert per rank: as many as choices


@pytest.mark.parametrize(
    ("parts", "experts", "k", "groups", "group_topk"),
    [(4, 16, 3, None, None), (8, 32, 4, 8, 4), (2, 16, 3, 8, 4), (4, 16, 4, 8, 2), (16, 32, 4, 8, 3), (1, 16, 4, 4, 2)],
)
def test_the_closed_form_is_what_chance_gives(parts, experts, k, groups, group_topk):
    draw, count, rounds = random.Random(1), 0, 20_000
    size, part = experts // (groups or 1), experts // parts
    for _ in range(rounds):
        chosen = draw.sample(range(groups or 1), group_topk or groups or 1)
        open_to = [g * size + i for g in chosen for i in range(size)]
        count += len({e // part for e in draw.sample(open_to, k)})
    assert distinct(parts, experts, k, groups, group_topk) == pytest.approx(count / rounds, rel=0.01)


# ---------------------------------------------------------------- bytes of a layer


def test_bytes_of_the_worked_example():
    assert legs("alltoall", PAIRS, 0.0) == [(300.0, 600.0)]
    assert legs("hierarchical", PAIRS, 0.0) == [(0.0, pytest.approx(500.0)), (600.0, 0.0)]
    assert legs("allgather", PAIRS, 0.0) == [(900.0, 900.0)]  # 6 tokens x 3 ranks; one of two links of a ring leaves the node
    assert legs("fused", replace(PAIRS, ranks=2), 0.0) == [(600.0, 0.0)]
    with pytest.raises(AssertionError, match="no other node"):
        legs("fused", PAIRS, 0.0)


@pytest.mark.parametrize("path", ["alltoall", "hierarchical"])
def test_one_node_sends_nothing_far_and_more_experts_per_token_send_more(path):
    near, far = one_pass(path, replace(PAIRS, here=4))
    assert far == 0 and near == 2 * 6 * 2 * 100 * 3 / 4
    assert [one_pass(path, replace(PAIRS, k=k)) for k in (1, 2, 3)] == sorted(one_pass(path, replace(PAIRS, k=k)) for k in (1, 2, 3))
    alone = one_pass(path, replace(PAIRS, ranks=1, here=1))
    assert alone == (0.0, 0.0)


@pytest.mark.parametrize("nodes", [2, 8, 32])
def test_a_token_crosses_at_most_once_to_a_node_so_the_second_way_never_sends_more(nodes):
    r = Routed(tokens=1000, k=8, experts=256, ranks=8 * nodes, here=8, row=14336.0)
    flat, once = one_pass("alltoall", r)[1], one_pass("hierarchical", r)[1]
    assert once < flat
    assert once >= 2 * 1000 * 14336 * (nodes - 1) / nodes  # at least to one node
    bounded = one_pass("hierarchical", replace(r, groups=8, group_topk=4))[1]
    assert bounded <= once + 1e-6  # a bound on the groups of a token bounds its nodes


def test_seconds_are_those_of_the_slower_link_and_of_the_busiest_rank():
    r = replace(PAIRS, tokens=6e9, row=1.0)  # GB
    assert routed("alltoall", r, 1.0, H100, EXACT).seconds == pytest.approx(2 * max(3 / 450, 6 / 50))
    assert routed("alltoall", r, 1.5, H100, EXACT).seconds == pytest.approx(2 * 1.5 * 6 / 50)
    assert routed("hierarchical", r, 1.0, H100, EXACT).seconds == pytest.approx(2 * (5 / 50 + 6 / 450))
    assert routed("allgather", r, 1.5, H100, EXACT).seconds == pytest.approx(2 * 9 / 50)  # whole batches, whatever the load
    late = replace(EXACT, collective_latency_us=10.0)
    assert routed("hierarchical", replace(r, tokens=0), 1.0, H100, late).seconds == pytest.approx(4e-5)


def test_a_ring_over_nodes_leaves_each_node_by_one_link():
    sent = around(800.0, 16, 1, H100, EXACT)
    assert (sent.near, sent.far) == (700.0, 100.0)
    assert sent.seconds == pytest.approx(800 / 400e9)  # eight adapters of 50 GB/s, as fast as they are together
    assert around(800.0, 16, 8, H100, EXACT).far == 800.0  # one rank of the group per node
    assert (ring(800.0, 8, 1, H100, EXACT).near, ring(800.0, 1, 1, H100, EXACT).near) == (700.0, 0.0)


def test_the_fused_path_copies_least_and_waits_for_nothing():
    r = replace(PAIRS, here=4)
    assert copied("fused", r) == 100 * (6 + 12) < copied("alltoall", r) == 100 * 60
    assert {path for path in PATHS if HOST_WAITS[path] == 0} == {"allgather", "fused"}


# ---------------------------------------------------------------- against the dispatchers


def sent_by_dispatchers(kind: str, experts: int, k: int, hidden: int) -> tuple[int, int]:
    """plan.sent_bytes where every rank has one token for each choice of k experts."""
    world = dist.get_world_size()
    mesh = build_mesh("cpu", 1, [world], 0, node_size=2 if kind == "hierarchical" else None)
    dispatcher = build_dispatcher(kind, experts, k, mesh.expert_group(world), nodes=mesh.expert_node_groups(world))
    ids = torch.tensor(list(itertools.combinations(range(experts), k)))
    plan = dispatcher.plan(ids)
    dispatcher.dispatch(torch.ones(len(ids), hidden), ids, torch.ones(ids.shape), plan)
    return plan.sent_bytes


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "world"), [("alltoall", 2), ("alltoall", 4), ("allgather", 4), ("hierarchical", 4)])
def test_the_formula_has_the_bytes_that_a_dispatcher_sends(kind, world):
    r = Routed(tokens=math.comb(8, 3), k=3, experts=8, ranks=world, here=min(world, 2), row=16 * 4.0)
    found = run_distributed(sent_by_dispatchers, world, kind, 8, 3, 16)
    for way in (0, 1):  # forward and backward, mean over ranks
        assert sum(sent[way] for sent in found) / world == pytest.approx(sum(one_pass(kind, r)), rel=1e-12)


# ---------------------------------------------------------------- in a step


def run_of(flags: str = ""):
    return pinned(parse_args((SMALL + flags).split()).run, 16)


def test_bytes_of_a_step_grow_with_what_is_asked_for():
    run = run_of()

    def of(term: str, **values) -> tuple[float, float]:
        sent = exchanges(run, Layout(16, **values), 64, 16, H100, EXACT)[term]
        return sent.near, sent.far

    assert of("tp") == of("ep") == of("cp") == of("p2p") == (0, 0)
    assert of("tp", tp=2)[0] > 0 == of("tp", tp=2)[1]
    assert of("ep", ep=8)[0] > of("ep", ep=2)[0] > 0
    near, far = of("p2p", pp=2)
    assert (near, far) == (0, 2 * 2 * 32 * 64 * 4)  # 2 micro-batches of 32 tokens there, gradients back
    parameters = exchanges(run, Layout(16, zero=0), 64, 16, H100, EXACT)["dp"]
    assert exchanges(run, Layout(16, zero=3), 64, 16, H100, EXACT)["dp"].far == pytest.approx(1.5 * parameters.far)  # 3 rings, not 2


def test_seconds_of_a_step_are_those_of_its_exchanges():
    run, layout = run_of(), Layout(16, tp=2, ep=4, pp=2)
    time, sent = step_time(run, layout, 64, 16, H100, Assumptions()), exchanges(run, layout, 64, 16, H100, Assumptions())
    assert (time.tp, time.ep, time.cp, time.p2p) == tuple(sent[name].seconds for name in ("tp", "ep", "cp", "p2p"))
    assert time.dp + time.hidden == pytest.approx(sent["dp"].seconds)


def test_the_planner_takes_the_path_of_the_command_where_it_can_be_taken():
    flat, two_legs = run_of(), run_of("--moe-token-dispatcher hierarchical --moe-expert-parallel-size 4")
    assert path_of(flat, 8, 8, 64) == path_of(flat, 16, 8, 64) == "alltoall"  # auto, k 2: two rows seldom cross to one node
    assert path_of(run_of("--topk 8 --num-experts 64"), 32, 8, 64) == "hierarchical"
    assert path_of(two_legs, 16, 8, 64) == "hierarchical"
    assert path_of(two_legs, 8, 8, 64) == path_of(two_legs, 8, 1, 64) == path_of(two_legs, 12, 8, 64) == "alltoall"
    assert path_of(run_of("--moe-token-dispatcher allgather --moe-expert-parallel-size 4"), 16, 8, 64) == "allgather"
    nodes = replace(H100, devices_per_node=2)
    assert step_time(two_legs, Layout(16, ep=8), 64, 16, nodes, EXACT) == step_time(
        flat, Layout(16, ep=8), 64, 16, nodes, EXACT, "hierarchical"
    )


def test_waiting_for_the_host_is_time_of_its_own():
    run = run_of()
    of = lambda path, us: step_time(run, Layout(16, ep=8), 64, 16, H100, replace(EXACT, host_wait_us=us), path)  # noqa: E731
    waits = of("alltoall", 100.0).host - of("alltoall", 0.0).host
    assert waits == pytest.approx(run.experts_of_blocks().count(8) * 100e-6)  # once a layer of a micro-batch, not in the backward
    assert of("fused", 100.0).host == of("fused", 0.0).host
