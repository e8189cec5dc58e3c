"""All dispatchers bring the same rows, in the same order, with the same gradients - also when ranks hold unequal tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.moe.dispatch import AllGatherDispatcher, AllToAllDispatcher, Limits, LocalDispatcher, build_dispatcher, room

pytestmark = pytest.mark.distributed

EXPERTS, HIDDEN = 4, 6
TOKENS = {"equal": (5, 5, 5, 5), "unequal": (3, 0, 7, 1)}


def tokens_of(rank: int, counts: tuple[int, ...], k: int):
    """Tokens, expert ids (some dropped, expert 1 idle) and weights of a rank: a function of its number."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(counts[rank], HIDDEN, dtype=torch.float64, generator=generator)
    ids = torch.rand(counts[rank], EXPERTS, generator=generator).argsort(-1)[:, :k]
    ids = torch.where((ids == 1) | (torch.rand(ids.shape, generator=generator) < 0.2), -1, ids)
    weights = torch.rand(counts[rank], k, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), ids, weights.requires_grad_()


def through(kind: str, counts: tuple[int, ...], k: int) -> dict:
    """Dispatch, a fake expert that depends on expert, row and weight, combine, backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    classes = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}
    dispatcher = classes[kind](EXPERTS, dist.group.WORLD)
    x, ids, weights = tokens_of(rank, counts, k)
    rows, offsets, row_weights, plan = dispatcher.dispatch(x, ids, weights)
    y = dispatcher.combine(fake_experts(rows, offsets, row_weights, rank * EXPERTS // ranks), plan)
    (y.square().sum() + y.sum()).backward()
    return {"rows": rows.detach()[: offsets[-1]], "offsets": offsets, "y": y.detach(), "dx": x.grad, "dw": weights.grad}


def fake_experts(rows, offsets, row_weights, first_expert):
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
    scale = torch.cat([torch.full((n,), float(first_expert + e + 1), dtype=rows.dtype) for e, n in enumerate(sizes)])
    scale = torch.nn.functional.pad(scale, (0, len(rows) - len(scale)))  # zeros, and zero gradients, for spare rows
    return (rows * scale[:, None]).sin() * row_weights[:, None]


def expected_on_one_process(counts: tuple[int, ...], k: int) -> dict:
    parts = [tokens_of(r, counts, k) for r in range(len(counts))]
    x, ids, weights = (torch.cat([p[i] for p in parts]).detach() for i in range(3))
    x.requires_grad_(), weights.requires_grad_()
    dispatcher = LocalDispatcher(EXPERTS)
    rows, offsets, row_weights, plan = dispatcher.dispatch(x, ids, weights)
    y = dispatcher.combine(fake_experts(rows, offsets, row_weights, 0), plan)
    (y.square().sum() + y.sum()).backward()
    return {"rows": rows.detach()[: offsets[-1]], "offsets": offsets, "y": y.detach(), "dx": x.grad, "dw": weights.grad}


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("spread", list(TOKENS))
@pytest.mark.parametrize("k", [1, 3])
def test_rows_and_gradients_are_those_of_one_process(kind, world, spread, k):
    counts = TOKENS[spread][:world]
    found, expected = run_distributed(through, world, kind, counts, k), expected_on_one_process(counts, k)
    for name in ("rows", "y", "dx", "dw"):  # expert-major rows: the ranks' rows one after another are the global order
        torch.testing.assert_close(torch.cat([f[name] for f in found]), expected[name], rtol=0, atol=1e-14, msg=name)
    assert torch.equal(torch.cat([f["rows"] for f in found]), expected["rows"])
    rows_per_expert = torch.cat([torch.diff(f["offsets"], prepend=f["offsets"].new_zeros(1)) for f in found])
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
