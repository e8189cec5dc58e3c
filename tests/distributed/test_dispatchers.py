"""All dispatchers bring the same rows, in the same order, with the same gradients - also when ranks hold unequal tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.moe.dispatch import AllGatherDispatcher, AllToAllDispatcher, LocalDispatcher, build_dispatcher

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
    return [build_dispatcher(kind, EXPERTS, k, group).name for kind, k in (("auto", 1), ("auto", 2), ("alltoall", 4), ("allgather", 1))]


def test_auto_takes_allgather_when_k_reaches_the_ranks():
    assert run_distributed(names_of_dispatchers, 2)[0] == ["alltoall", "allgather", "alltoall", "allgather"]
    assert build_dispatcher("auto", EXPERTS, 1, None).name == "local"
