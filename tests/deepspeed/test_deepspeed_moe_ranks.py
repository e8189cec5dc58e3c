"""deepspeed.moe.layer.MoE over several ranks: outputs, losses, counts and gradients are those of one process; so is the state dict."""
# T tokens, D hidden, E experts

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_pool import run_distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from megatron_moe import mpu
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.moe.tokens import Reducer
from megatron_moe.mpu.mesh import build_mesh

pytestmark = pytest.mark.distributed

D, E, SEED = 6, 8, 11
EXACT = {"rtol": 0, "atol": 1e-10}
LAYOUTS = [(2, 2), (4, 2), (4, 4)]  # ranks, ep_size

CASES = {
    "k = 1, random token selection": {"k": 1, "capacity_factor": 0.6},
    "k = 1, residual, all": {"k": 1, "drop_tokens": False, "use_residual": True, "noisy_gate_policy": "RSample"},
    "k = 2, sampled": {"k": 2, "capacity_factor": 0.5},
    "k = 4, residual": {"k": 4, "capacity_factor": 0.5, "use_residual": True, "noisy_gate_policy": "Jitter"},
}
TOKENS = {"equal": (12, 12, 12, 12), "unequal": (5, 0, 9, 2)}


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.scale = nn.Linear(D, 10), nn.Linear(10, D), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x))) * self.scale


def build(ep_size: int, case: str = "k = 4, residual") -> MoE:
    """The same on every rank."""
    torch.manual_seed(0)
    moe = MoE(D, FeedForward(), E, ep_size, min_capacity=0, **CASES[case]).double()
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.7)
    return moe


def data(rank: int, sizes: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and what their outputs count."""
    generator = torch.Generator().manual_seed(100 + rank)
    x, upstream = (torch.randn(TOKENS[sizes][rank], D, dtype=torch.float64, generator=generator) for _ in range(2))
    return x.requires_grad_(), upstream


def step(moe: MoE, rank: int, sizes: str) -> dict[str, torch.Tensor]:
    x, upstream = data(rank, sizes)
    torch.manual_seed(SEED)
    y, l_aux, counts = moe(x)
    ((y * upstream).sum() + 3 * l_aux).backward()
    return {"y": y.detach(), "l_aux": l_aux.detach(), "exp_counts": counts, "gradient of x": x.grad}


class Longest(Reducer):
    """Knows how many tokens the rank has that has most of them: what the ranks of a group ask each other."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def most_tokens(self, tokens: int) -> int:
        return self.tokens


def one_process(ranks: int, ep_size: int, case: str, sizes: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The ranks' tokens one after the other, through all experts: (results of each rank, gradients of the parameters)."""
    moe, results = build(ep_size, case), []
    for rank in range(ranks):
        first = rank // ep_size * ep_size
        moe.data_rank, moe.core.reducer = rank, Longest(max(TOKENS[sizes][first : first + ep_size]))
        results.append(step(moe, rank, sizes))
    return results, {name: p.grad for name, p in moe.named_parameters()}


def in_parallel(ep_size: int, case: str, sizes: str) -> tuple[dict, dict[str, torch.Tensor]]:
    mesh = build_mesh("cpu", 1, [ep_size], 0)
    moe = build(ep_size, case)
    moe.parallelise_(mesh)
    assert moe.core.experts.stack.fc1.weight.to_local().shape[0] == E // ep_size
    result = step(moe, dist.get_rank(), sizes)
    gradients = {}
    for name, p in moe.named_parameters():
        is_expert = name.startswith("core.experts.")
        local = p.grad.to_local() if is_expert else p.grad
        edp = mesh.experts[ep_size]["edp_replicate"].get_group()
        dist.all_reduce(local, group=edp if is_expert else None)  # what FSDP does
        gradients[name] = p.grad.full_tensor() if is_expert else p.grad
    return result, gradients


@pytest.mark.parametrize("sizes", list(TOKENS))
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("ranks", "ep_size"), LAYOUTS)
def test_ranks_that_share_the_experts_out_equal_one_process(ranks, ep_size, case, sizes):
    expected, gradients = one_process(ranks, ep_size, case, sizes)
    assert all(g.any() for g in gradients.values())
    found = run_distributed(in_parallel, ranks, ep_size, case, sizes)
    for rank, (result, grads) in enumerate(found):
        for name, value in expected[rank].items():
            torch.testing.assert_close(result[name], value, **EXACT, msg=lambda m, name=name: f"rank {rank}, {name}: {m}")
        assert grads.keys() == gradients.keys()
        for name, g in gradients.items():
            torch.testing.assert_close(grads[name], g, **EXACT, msg=lambda m, name=name: f"rank {rank}, gradient of {name}: {m}")


def noise_of_ranks() -> torch.Tensor:
    """Who is kept, of the same tokens after the same seed."""
    moe = build(2, "k = 1, random token selection")
    moe.parallelise_(build_mesh("cpu", 1, [2], 0))
    torch.manual_seed(SEED)
    return moe(data(0, "equal")[0])[0].detach().any(1)


def test_ranks_that_seed_alike_do_not_drop_alike():
    first, second = run_distributed(noise_of_ranks, 2)
    assert first.sum() == second.sum()
    assert not torch.equal(first, second)


# ---------------------------------------------------------------- the state dict

SHARDED = {"experts": None, "ZeRO 0": 0, "ZeRO 1": 1, "ZeRO 3": 3}


def sharded(ep_size: int, kind: str) -> MoE:
    """Its weights are zeros: what it has is what it loads. Gathered, where FSDP leaves it so."""
    stage = SHARDED[kind]
    mesh = build_mesh("cpu", 1, [ep_size], stage or 0)
    moe = build(ep_size)
    with torch.no_grad():
        for p in moe.parameters():
            p.zero_()
    moe.parallelise_(mesh)
    if stage is not None:
        fully_shard(moe.core.experts, mesh=mesh.expert_data(ep_size), reshard_after_forward=stage == 3)
        fully_shard(moe, mesh=mesh.data, reshard_after_forward=stage == 3)
        moe.tag_experts()
    with torch.no_grad():
        moe(data(dist.get_rank(), "equal")[0])
    return moe


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def loaded_and_said(ep_size: int, kind: str) -> dict:
    moe, given = sharded(ep_size, kind), build(ep_size).state_dict()
    missing, unexpected = moe.load_state_dict(given)
    assert (missing, unexpected) == ([], [])
    said = {name: whole(t) for name, t in moe.state_dict().items()}
    twice = sharded(ep_size, kind)
    twice.load_state_dict(moe.state_dict())
    again = {name: whole(t) for name, t in twice.state_dict().items()}
    x = data(dist.get_rank(), "equal")[0]
    y = moe.eval()(x)[0].detach()
    marks = {n: (getattr(p, "allreduce", True), getattr(p, "group_name", None)) for n, p in moe.named_parameters()}
    return {"said": said, "again": again, "y": y, "marks": marks}


@pytest.mark.parametrize("kind", list(SHARDED))
@pytest.mark.parametrize(("ranks", "ep_size"), LAYOUTS)
def test_every_rank_says_and_loads_all_experts_by_their_global_numbers(ranks, ep_size, kind):
    plain = build(ep_size).eval()
    expected = plain.state_dict()
    assert len({t.sum().item() for t in expected.values()}) == len(expected)  # no two alike: a swap of experts is seen
    for rank, found in enumerate(run_distributed(loaded_and_said, ranks, ep_size, kind)):
        for said in (found["said"], found["again"]):
            assert said.keys() == expected.keys()
            for name, t in expected.items():
                assert torch.equal(said[name], t), f"rank {rank}: {name}"
        torch.testing.assert_close(found["y"], plain(data(rank, "equal")[0])[0].detach(), **EXACT)
        for name, mark in found["marks"].items():
            assert mark == ((False, f"ep_size_{ep_size}") if name.startswith("core.experts.") else (True, None)), name


def partly_loaded(ep_size: int, kind: str) -> tuple[list[str], dict]:
    moe, given = sharded(ep_size, kind), build(ep_size).state_dict()
    for name in [name for name in given if ".deepspeed_experts.5." in name or "wg" in name]:
        del given[name]
    missing = moe.load_state_dict(given, strict=False).missing_keys
    return sorted(missing), {name: whole(t) for name, t in moe.state_dict().items()}


@pytest.mark.parametrize("kind", list(SHARDED))
def test_an_expert_that_is_missing_stays_as_it_was(kind):
    expected = build(2).state_dict()
    gone = sorted(name for name in expected if ".deepspeed_experts.5." in name or "wg" in name)
    for missing, said in run_distributed(partly_loaded, 4, 2, kind):
        assert missing == gone
        for name, t in expected.items():
            assert torch.equal(said[name], torch.zeros_like(t) if name in gone else t), name


# ---------------------------------------------------------------- what is refused


def refusals() -> dict[str, str]:
    mesh, found = build_mesh("cpu", 1, [2], 0), {}
    mpu.set_default_mesh(None)  # an engine of another test leaves its own
    moe = build(2)
    for name, call in {
        "no mesh": lambda: build(4).parallelise_(mesh),
        "not divisible": lambda: build(2).parallelise_(mesh, 3),
        "no default mesh": lambda: moe.set_deepspeed_parallelism(),
    }.items():
        with pytest.raises(ValueError) as error:
            call()
        found[name] = str(error.value)
    mpu.set_default_mesh(mesh)
    try:
        moe.set_deepspeed_parallelism()
    finally:
        mpu.set_default_mesh(None)
    assert moe.num_local_experts == moe.core.experts.stack.scale.to_local().shape[0] == E // 2
    with pytest.raises(ValueError) as error:
        moe.parallelise_(mesh)
    return found | {"twice": str(error.value)}


def test_layouts_that_cannot_be_are_refused():
    for found in run_distributed(refusals, 2):
        assert "no mesh for ep_size 4, only for [2]" in found["no mesh"]
        assert "num_experts (8) must be divisible by ep_size (3); use ep_size 1, 2, 4, 8" in found["not divisible"]
        assert "not initialised" in found["no default mesh"]
        assert "over 2 ranks already" in found["twice"]
