"""All dispatchers bring the same rows, in the same order, with the same gradients - also when ranks hold unequal tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.moe.dispatch import AllGatherDispatcher, Limits, LocalDispatcher, build_dispatcher, room
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import build_mesh
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.plan import _layers

pytestmark = pytest.mark.distributed

EXPERTS, HIDDEN = 4, 6
TOKENS = {"equal": (5,) * 8, "unequal": (3, 0, 7, 1, 2, 0, 4, 6)}


def tokens_of(rank: int, counts: tuple[int, ...], k: int):
    """Tokens, expert ids (some dropped, expert 1 idle) and weights of a rank: a function of its number."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(counts[rank], HIDDEN, dtype=torch.float64, generator=generator)
    ids = torch.rand(counts[rank], EXPERTS, generator=generator).argsort(-1)[:, :k]
    ids = torch.where((ids == 1) | (torch.rand(ids.shape, generator=generator) < 0.2), -1, ids)
    weights = torch.rand(counts[rank], k, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), ids, weights.requires_grad_()


class FakeExperts:
    """Experts whose output depends on expert, row and weight, or a slice of them: `share` of each output. Notes the rows that come."""

    def __init__(self, first_expert: int, share: float = 1.0):
        self.first_expert, self.share = first_expert, share
        self.rows: list[torch.Tensor] = []
        self.offsets: list[torch.Tensor] = []

    def __call__(self, rows, offsets, row_weights, has_spare_rows):
        self.rows.append(rows.detach()[: offsets[-1]])
        self.offsets.append(offsets)
        return self.share * fake_experts(rows, offsets, row_weights, self.first_expert)

    def in_one_call(self, work, x):
        return work(self, x)


def fake_experts(rows, offsets, row_weights, first_expert):
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    scale = torch.cat([torch.full((n,), float(first_expert + e + 1), dtype=rows.dtype) for e, n in enumerate(sizes)])
    scale = torch.nn.functional.pad(scale, (0, len(rows) - len(scale)))  # zeros, and zero gradients, for spare rows
    return (rows * scale[:, None]).sin() * row_weights[:, None]


def build(kind: str, etp: int, chunks: int = 1, node_size: int = 2):
    ep = dist.get_world_size() // etp
    mesh = build_mesh("cpu", 1, [ep], 0, etp=etp, node_size=node_size if kind == "hierarchical" else None)
    groups = {"slices": mesh.expert_tensor_group(ep), "nodes": mesh.expert_node_groups(ep)}
    return build_dispatcher(kind, EXPERTS, 2, mesh.expert_group(ep), pad=kind == "padded", chunks=chunks, **groups)


def through(kind: str, counts: tuple[int, ...], k: int, etp: int, chunks: int, node_size: int) -> dict:
    """To fake experts and back, forward and backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dispatcher = build(kind, etp, chunks, node_size)
    assert dispatcher.name == kind + f" in {chunks} chunks" * (chunks > 1)
    x, ids, weights = tokens_of(rank, counts, k)
    share = (rank % etp + 1) / (etp * (etp + 1) / 2)
    experts = FakeExperts(rank // etp * EXPERTS // (ranks // etp), share)
    y = dispatcher.through(experts, x, ids, weights, dispatcher.plan(ids))
    (y.square().sum() + y.sum()).backward()
    return {"rows": experts.rows, "offsets": experts.offsets, "y": y.detach(), "dx": x.grad, "dw": weights.grad}


def expected_on_one_process(counts: tuple[int, ...], k: int) -> dict:
    parts = [tokens_of(r, counts, k) for r in range(len(counts))]
    x, ids, weights = (torch.cat([p[i] for p in parts]).detach() for i in range(3))
    x.requires_grad_(), weights.requires_grad_()
    dispatcher, experts = LocalDispatcher(EXPERTS), FakeExperts(0)
    y = dispatcher.through(experts, x, ids, weights, dispatcher.plan(ids))
    (y.square().sum() + y.sum()).backward()
    return {"rows": experts.rows[0], "offsets": experts.offsets[0], "y": y.detach(), "dx": x.grad, "dw": weights.grad}


WAYS = [  # kind, ranks, etp, chunks, ranks per node
    ("alltoall", 2, 1, 1, 2),
    ("alltoall", 4, 1, 1, 2),
    ("allgather", 2, 1, 1, 2),
    ("allgather", 4, 1, 1, 2),
    ("hierarchical", 4, 1, 1, 2),
    ("alltoall", 2, 1, 3, 2),
    ("alltoall", 4, 1, 2, 2),
    ("hierarchical", 4, 1, 3, 2),
    ("alltoall", 2, 2, 1, 2),  # all experts on every rank, half of each
    ("allgather", 2, 2, 1, 2),
    ("alltoall", 4, 2, 1, 2),
    ("allgather", 4, 2, 1, 2),
    ("alltoall", 4, 2, 2, 2),
    ("allgather", 4, 4, 1, 2),
    ("hierarchical", 8, 2, 1, 4),
    ("hierarchical", 8, 2, 2, 4),
]


@pytest.mark.parametrize(("kind", "world", "etp", "chunks", "node_size"), WAYS)
@pytest.mark.parametrize("spread", list(TOKENS))
@pytest.mark.parametrize("k", [1, 3])
def test_rows_and_gradients_are_those_of_one_process(kind, world, etp, chunks, node_size, spread, k):
    counts = TOKENS[spread][:world]
    found = run_distributed(through, world, kind, counts, k, etp, chunks, node_size)
    expected = expected_on_one_process(counts, k)
    for name in ("y", "dx", "dw"):
        torch.testing.assert_close(torch.cat([f[name] for f in found]), expected[name], rtol=0, atol=1e-14, msg=name)
    for number in range(1, etp):  # every slice of an expert sees the same rows
        for first, other in zip(found[::etp], found[number::etp]):
            assert all(torch.equal(a, b) for a, b in zip(first["rows"] + first["offsets"], other["rows"] + other["offsets"], strict=True))
    assert all(len(f["rows"]) == chunks for f in found)
    if chunks == 1:  # expert-major rows: the ranks' rows one after another are the global order
        assert torch.equal(torch.cat([f["rows"][0] for f in found[::etp]]), expected["rows"])
        rows_per_expert = torch.cat([torch.diff(f["offsets"][0], prepend=f["offsets"][0].new_zeros(1)) for f in found[::etp]])
        assert rows_per_expert.cumsum(0).tolist() == expected["offsets"].tolist()


def names_of_dispatchers() -> list[str]:
    group = dist.group.WORLD
    cases = (
        ("auto", 1, 1.0),
        ("auto", 2, 1.0),
        ("auto", 2, 2.0),
        ("auto", 2, math.inf),
        ("auto", 4, math.inf),
        ("alltoall", 4, 1.0),
        ("allgather", 1, math.inf),
    )
    return [build_dispatcher(kind, EXPERTS, k, group, factor).name for kind, k, factor in cases]


def test_auto_takes_allgather_when_k_reaches_the_ranks_and_the_room_is_small():
    # 4 experts on 2 ranks: with k 4 every token goes everywhere, so no room is wasted
    gather, exchange = "allgather", "alltoall"
    assert run_distributed(names_of_dispatchers, 2)[0] == [exchange, gather, exchange, exchange, gather, exchange, gather]
    assert build_dispatcher("auto", EXPERTS, 1, None).name == "local"


def names_and_plan(flags: str) -> tuple[str, str]:
    """Of the dispatcher of the last layer, as it is built and as the plan of the run has it."""
    c = parity.config("modern", flags)
    mesh = build_parallel_mesh(c, "cpu")
    built = moe_layers(build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu")))[-1].dispatcher
    return built.name, next(x["dispatcher"] for x in reversed(list(_layers(c, dist.get_world_size()))) if x["dispatcher"])


@pytest.mark.parametrize(("node", "name"), [(2, "hierarchical"), (4, "alltoall"), (1, "alltoall"), (3, "alltoall")])
def test_auto_takes_two_legs_over_two_nodes(node, name):
    found = run_distributed(names_and_plan, 4, f"--zero-stage 0 --moe-expert-parallel-size 4 --moe-node-size {node}")
    assert found == [(name, name)] * 4


@pytest.mark.parametrize(
    ("num_experts", "k", "ranks", "factor", "times"),
    [
        (8, 2, 2, math.inf, 2.0),
        (64, 8, 8, math.inf, 8.0),
        (4, 4, 2, math.inf, 1.0),
        (8, 2, 2, 1.0, 1.0),
        (8, 2, 2, 9.0, 2.0),
        (4, 3, 2, math.inf, 4 / 3),
    ],
)
def test_room_of_an_allgather_is_what_could_come_over_what_does(num_experts, k, ranks, factor, times):
    assert room(num_experts, k, ranks, factor) == pytest.approx(times)


def rows_of_plans() -> list[int]:
    """5 tokens on rank 0 and 4 on rank 1, k = 3 of 4 experts; nothing, the length, and length and capacity known."""
    ids = torch.tensor([[0, 1, 2]] * (5 - dist.get_rank()))
    plans = [AllGatherDispatcher(EXPERTS, dist.group.WORLD).plan(ids, limits)
             for limits in (Limits(), Limits(most_tokens=5), Limits(capacity=2, most_tokens=5), Limits(capacity=9, most_tokens=5))]  # fmt: skip
    return [len(plan.local.slot_R) for plan in plans]


def test_an_allgather_has_room_for_what_capacity_and_different_experts_allow():
    assert run_distributed(rows_of_plans, 2) == [[20, 20, 8, 20]] * 2  # 2 ranks x 5 tokens x 2 experts here; 2 x 2 x 2
