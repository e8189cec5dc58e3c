"""Saved under one layout, loaded under another: every parameter and every Adam moment is bit-equal."""

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state, optimizer_state

pytestmark = pytest.mark.distributed

EXPERTS, WIDTH = 4, 10  # 10 rows over 4 ranks: uneven shards


class Block(nn.Module):
    """Tensor-parallel pair of linears, a stack of experts, a norm; just enough to give every parameter a gradient."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 6, 5))


def sharded(dp: int, tp: int, ep: int) -> Block:
    """TP on the linears, EP on the experts over a mesh of their own, FSDP over what remains."""
    model = Block()
    if dp * tp == 1:
        return model
    dense = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    expert = init_device_mesh("cpu", (dp * tp // ep, ep), mesh_dim_names=("edp", "ep"))
    parallelize_module(model, dense["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    held = nn.Module()
    held.w = nn.Parameter(distribute_tensor(model.experts.detach(), expert["ep"], [Shard(0)]))
    del model.experts
    model.experts = held
    fully_shard(model.experts, mesh=expert["edp"])
    fully_shard(model, mesh=dense["dp"])
    return model


def optimizer_after_a_step(model: nn.Module) -> torch.optim.AdamW:
    """Gradients set by hand: a function of the parameter, so the moments differ everywhere."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        parameter.grad = (parameter.detach() + 1) * 3
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict:
    """One name for the experts, whether they sit in a module of their own or not."""
    tensors = model_state(model) | optimizer_state(model, optimizer)
    return {name.replace("experts.w", "experts"): tensor for name, tensor in tensors.items()}


def full(tensors: dict) -> dict:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def _save(directory, layout):
    model = sharded(*layout)
    tensors = state(model, optimizer_after_a_step(model))
    CheckpointManager(directory).save(1, tensors, {"layout": layout})
    return full(tensors)


def _load(directory, layout):
    model = sharded(*layout)
    nn.init.constant_(next(model.parameters()), 7.0)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = state(model, optimizer)
    assert load_tensors(find_checkpoint(directory).path, tensors) == len(tensors)
    return full(tensors)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """FSDP 2 x TP 2, experts on EP 2 x FSDP 2."""
    directory = tmp_path_factory.mktemp("run")
    tensors = run_distributed(_save, 4, directory, (2, 2, 2))[0]
    assert all(tensor.any() for tensor in tensors.values())  # so that zero state cannot pass for restored state
    return directory, tensors


@pytest.mark.parametrize("layout", [(2, 2, 4), (4, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 1)], ids="dp{0[0]}_tp{0[1]}_ep{0[2]}".format)
def test_dp2_tp2_ep2_loads_bit_exactly_under_another_layout(saved, layout):
    directory, wanted = saved
    for got in run_distributed(_load, layout[0] * layout[1], directory, layout):
        assert got.keys() == wanted.keys() and len(got) == 4 * 7
        assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_one_device_loads_on_four_ranks(tmp_path):
    (wanted,) = run_distributed(_save, 1, tmp_path, (1, 1, 1))
    got = run_distributed(_load, 4, tmp_path, (2, 2, 2))[3]
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def _sharding_of_zero_state():
    model = sharded(2, 2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer_state(model, optimizer)
    same = all(
        optimizer.state[p][slot].placements == p.placements and optimizer.state[p][slot].device_mesh == p.device_mesh
        for p in model.parameters()
        for slot in ("exp_avg", "exp_avg_sq")
    )
    return same and not any(isinstance(optimizer.state[p]["step"], DTensor) for p in model.parameters()), dist.get_rank()


def test_zero_state_is_sharded_like_its_parameter():
    assert run_distributed(_sharding_of_zero_state, 4) == [(True, rank) for rank in range(4)]
