"""Experts that are modules, as DTensors: where they live, checkpoints of any layout, footprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_pool import run_distributed
from torch.distributed.tensor import DTensor, Shard

from distributed import parity
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.model.gpt import GPT
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.footprint import footprint
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

LAYOUT = "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"
OTHERS = [(1, "--zero-stage 0"), (2, "--zero-stage 1 --moe-expert-parallel-size 2"), (4, "--zero-stage 2 --moe-expert-parallel-size 4")]


def build(flags: str):
    c = parity.config("modules", f"{parity.FP32} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"), parity.OddExpert)
    return c, mesh, model, build_optimizer(model, c.optimizer)


def whole_state(model, optimizer) -> dict[str, torch.Tensor]:
    return {name: parity.whole(t) for name, t in (model_state(model) | optimizer_state(model, optimizer)).items()}


def trained_and_saved(directory: Path, flags: str) -> dict[str, torch.Tensor]:
    c, mesh, model, optimizer = build(flags)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, 0)
    CheckpointManager(directory).save(1, model_state(model) | optimizer_state(model, optimizer), {})
    return whole_state(model, optimizer)


def loaded(directory: Path, flags: str) -> dict[str, torch.Tensor]:
    _, _, model, optimizer = build(flags)
    load_tensors(find_checkpoint(directory).path, model_state(model) | optimizer_state(model, optimizer))
    return whole_state(model, optimizer)


def test_a_checkpoint_of_module_experts_loads_bit_equal_under_every_layout(tmp_path):
    saved = run_distributed(trained_and_saved, 4, tmp_path, LAYOUT)[0]
    names = [name for name in saved if ".experts.stack." in name]
    assert {name.partition(".")[0] for name in names} == {"model", "optimizer"}
    assert saved["model.layers.3.moe.experts.stack.inner.0.weight"].shape == (8, 20, 32)
    for world, flags in OTHERS:
        found = run_distributed(loaded, world, tmp_path, flags)[0]
        assert found.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(found[name], tensor), f"{name} under {flags}"


def placements_and_counts(flags: str) -> tuple[bool, int, int]:
    c, mesh, model, _ = build(flags)
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    on_ep = all(isinstance(p, DTensor) and Shard(0) in p.placements for p in experts)
    return on_ep, footprint(model, c.optimizer, mesh.zero_stage, False).expert_parameters, sum(p.to_local().numel() for p in experts)


def test_every_rank_holds_its_share_of_the_stacks():
    c = parity.config("modules")
    whole = GPT(c.model, c.moe, parity.VOCAB, parity.OddExpert)
    total = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
    found = run_distributed(placements_and_counts, 4, "--zero-stage 3 --moe-expert-parallel-size 4")
    assert all(on_ep for on_ep, _, _ in found)
    assert [counted for _, counted, _ in found] == [held for _, _, held in found]
    assert sum(held for _, _, held in found) == total  # ep 4 has 2 experts a rank; ep 2 is cut once more over its 2 data ranks
