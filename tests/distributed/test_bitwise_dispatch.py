"""All dispatchers give the same bits in fp32 as the all-to-all: output and dx, with the experts' own GEMMs, whatever the tokens.

What makes it so is the canonical order of a sum (dispatch/base.py: sum_rows) and of the rows at the experts. Weight gradients, and
dispatchers that add in another order, are held to rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.moe.dispatch import build_dispatcher
from megatron_moe.moe.dispatch.allgather import AllGatherDispatcher
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.base import addends_of
from megatron_moe.moe.experts import Experts
from megatron_moe.mpu.mesh import build_mesh

pytestmark = pytest.mark.distributed

# widths of whole vectors: torch computes the last, odd elements of a tensor with another exp, and spare rows move them
EXPERTS, HIDDEN, FFN = 8, 16, 32
K = (1, 2, 3, 4)
SECONDS = 60  # for any row of these tests: ranks that wait for each other must not hang
# tokens of each rank, and the experts that nobody chooses
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "equal": ((9,) * 4, ()),
    "unequal": ((3, 11, 1, 6), ()),
    "a rank without tokens": ((5, 0, 4, 0), ()),
    "no tokens at all": ((0,) * 4, ()),
    "one token": ((0, 1, 0, 0), ()),
    "an idle expert": ((7, 5, 6, 8), (3,)),
    "an idle rank": ((7, 5, 6, 8), (6, 7)),  # of 4 ranks the last one
    "half of them idle": ((7, 5, 6, 8), (0, 1, 2, 3)),
}
EXACT = ("allgather",)
CLOSE = ("padded", "alltoall in 3 chunks", "hierarchical", "hierarchical in 3 chunks")  # other GEMMs, or other sums


def build(kind: str) -> Any:
    """Over all ranks, also where there is only one."""
    group, world = dist.group.WORLD, dist.get_world_size()
    if kind == "alltoall":
        return AllToAllDispatcher(EXPERTS, group)
    if kind == "allgather":
        return AllGatherDispatcher(EXPERTS, group)
    name, _, chunks = kind.removesuffix(" chunks").partition(" in ")
    nodes = build_mesh("cpu", 1, [world], 0, node_size=2).expert_node_groups(world) if name == "hierarchical" else None
    return build_dispatcher(name, EXPERTS, 2, group, pad=name == "padded", nodes=nodes, chunks=int(chunks or 1))


def tokens_of(rank: int, case: str, k: int, dtype: torch.dtype, drops: bool) -> tuple[torch.Tensor, ...]:
    """x, ids, weights and the gradient of the output of a rank: a function of its number."""
    counts, idle = CASES[case]
    generator = torch.Generator().manual_seed(100 * rank + k)
    x, grad = (torch.randn(counts[rank], HIDDEN, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    scores = torch.rand(counts[rank], EXPERTS, generator=generator)
    scores[:, list(idle)] = 2.0
    ids = scores.argsort(-1)[:, :k]
    if drops:
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.25, -1, ids)
    weights = torch.rand(counts[rank], k, dtype=torch.float64, generator=generator).to(dtype)
    return x.requires_grad_(), ids, weights.requires_grad_(), grad


def experts_here(dtype: torch.dtype) -> Experts:
    """The slice of this rank of the same experts everywhere."""
    torch.manual_seed(0)
    whole = Experts(EXPERTS, HIDDEN, FFN, "swiglu").double()
    here = EXPERTS // dist.get_world_size()
    experts = Experts(here, HIDDEN, FFN, "swiglu").to(dtype)
    with torch.no_grad():
        for own, all_of_them in zip(experts.parameters(), whole.parameters()):
            own.copy_(0.3 * torch.randn_like(all_of_them)[dist.get_rank() * here :][:here])
    return experts


def through(kind: str, case: str, k: int, dtype: torch.dtype, drops: bool) -> dict[str, torch.Tensor]:
    x, ids, weights, grad = tokens_of(dist.get_rank(), case, k, dtype, drops)
    dispatcher, experts = build(kind), experts_here(dtype)
    y = dispatcher.through(experts, x, ids, weights, dispatcher.plan(ids))
    y.backward(grad)
    gradients = {name: p.grad for name, p in experts.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad} | gradients


def differences(kind: str, k: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[bool, float]]:
    """Of this kind and the all-to-all: are all bits equal, and the largest difference, relative to the largest value where that
    is above 1 (a gradient that has cancelled out has no digits of its own); worst of all cases."""
    worst: dict[str, tuple[bool, float]] = {}
    for case in CASES:
        for drops in (False, True):
            wanted, found = (through(name, case, k, dtype, drops) for name in ("alltoall", kind))
            for name, one in wanted.items():
                is_equal, most = worst.get(name, (True, 0.0))
                off = (found[name] - one).abs().max() / one.abs().max().clamp_min(1.0) if one.numel() else found[name].sum()
                worst[name] = is_equal and torch.equal(one, found[name]), max(most, float(off))
    return worst


def assert_same_bits(kind: str, world: int, k: int) -> None:
    for found in run_distributed(differences, world, kind, k, timeout=SECONDS):
        assert [found[name][0] for name in ("y", "dx")] == [True, True], found
        assert max(off for _, off in found.values()) < 1e-6, found


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
def test_output_and_dx_are_bitwise_those_of_the_all_to_all(world, kind, k):
    assert_same_bits(kind, world, k)


@pytest.mark.parametrize("kind", EXACT)
def test_sums_of_several_owners_have_one_order_on_four_ranks(kind):
    """Four choices of eight experts on four ranks: pairs at one owner, which are added before the others are."""
    assert_same_bits(kind, 4, 4)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    ("world", "kind"), [(2, "padded"), (2, "alltoall in 3 chunks"), *(pytest.param(4, kind, marks=pytest.mark.matrix) for kind in CLOSE)]
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_other_ways_are_equal_up_to_rounding(world, kind, k, dtype, limit):
    for found in run_distributed(differences, world, kind, k, dtype, timeout=SECONDS):
        assert max(off for _, off in found.values()) < limit, found


def test_choices_of_an_owner_are_one_addend_by_hand():
    ids = torch.tensor([[5, 0, 4, 1], [-1, 7, -1, 2], [6, 4, 2, 0]])  # 2 experts per rank
    addend, most = addends_of(ids, 4, 2)
    assert most == 4 and addend.view(3, 4).tolist() == [[1, 0, 1, 0], [6, 5, 6, 4], [11, 10, 9, 8]]
    assert addends_of(ids[:, :2], 4, 2)[1] == addends_of(ids)[1] == 1
