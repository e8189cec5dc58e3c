"""A batch of one token under tensor parallelism: one rank has it, the other has none, and nobody waits for anybody."""

from __future__ import annotations

import math

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.data.batch import Batch
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

EP, TP = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2"


def one_token(flags: str, model_name: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss in training and in evaluation, and gradients, of a single token."""
    c = parity.config(model_name, f"{parity.FP64} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(zero + 5, zero + 9, torch.ones(1, 1), zero, None, torch.tensor([3]))
    loss = forward_backward(model, [batch], count_loss_tokens([batch], mesh), mesh, 7, 0)
    assert all(moe.stats.sums is not None for moe in moe_layers(model))
    gradients = {n: parity.whole(p.grad) for n, p in model.named_parameters()}
    return loss.item(), evaluate(model, [batch], mesh, torch.device("cpu")).lm_loss, gradients


@pytest.mark.parametrize("model", ["modern", "dropping", "deepseek", "drawn", "hash", "zipf", "expert_choice", "sinkhorn"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_rank_without_tokens_takes_part_and_changes_nothing(model, dispatcher):
    alone = run_distributed(one_token, 1, "--zero-stage 1", model)[0]
    spread = run_distributed(one_token, 2, f"--zero-stage 3 {TP} {EP} --moe-token-dispatcher {dispatcher}", model)[0]
    assert math.isfinite(alone[0])
    assert spread[:2] == pytest.approx(alone[:2], abs=1e-10)
    for name, gradient in alone[2].items():
        torch.testing.assert_close(spread[2][name], gradient, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


ETP = "--expert-tensor-parallel-size 2"
NODES = "--moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2"


@pytest.mark.parametrize("model", ["modern", "dropping"])
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, f"{TP} {ETP}"),
        (2, f"{TP} {ETP} --moe-token-dispatcher alltoall"),
        (2, f"{TP} {EP} --moe-overlap-chunks 3"),
        (2, f"{TP} {EP} --moe-pad-expert-input-to-capacity"),
        (4, f"--tensor-model-parallel-size 4 {EP} {ETP} --moe-token-dispatcher alltoall --moe-overlap-chunks 2"),
        (4, f"--tensor-model-parallel-size 4 {EP} {ETP} --moe-pad-expert-input-to-capacity"),
        (4, f"--tensor-model-parallel-size 4 {NODES}"),
        (4, f"--tensor-model-parallel-size 4 {NODES} --moe-overlap-chunks 2"),
    ],
)
def test_ranks_without_tokens_take_part_however_tokens_travel(world, flags, model):
    """One token: all experts but a few idle, all ranks but one without tokens, all parts but one empty."""
    alone = run_distributed(one_token, 1, "--zero-stage 1", model)[0]
    for found in run_distributed(one_token, world, f"--zero-stage 3 {flags}", model):
        assert found[:2] == pytest.approx(alone[:2], abs=1e-10)
        for name, gradient in alone[2].items():
            torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def masked_and_short_steps(flags: str, model_name: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of a whole step and of one with half as many samples; of two data ranks the second predicts nothing that counts."""
    c = parity.config(model_name, f"{parity.FP64} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    rank, ranks = mesh.rank("dp"), mesh.size("dp")
    out = {}
    for step in (0, 1):
        batches = parity.microbatches(step, rank, ranks, c.training.micro_batch_size)
        of_second = [(i * ranks + rank) % 2 for i in range(len(batches))]
        batches = [b._replace(loss_mask=torch.zeros_like(b.loss_mask)) if second else b for b, second in zip(batches, of_second)]
        batches = batches[: len(batches) // (1 + step)]
        loss = forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, step)
        out[f"loss {step}"] = mesh.sum(loss, "dp")
        out |= {f"{step} {n}": parity.whole(p.grad) for n, p in model.named_parameters()}
        model.zero_grad()
    return out


@pytest.mark.parametrize("flags", [f"--zero-stage 3 {EP}", f"--zero-stage 1 {EP} --moe-token-dispatcher alltoall", f"--zero-stage 2 {ETP}"])
@pytest.mark.parametrize("model", ["modern", "dropping"])
def test_a_rank_without_labels_and_a_short_last_batch_change_nothing(flags, model):
    alone = run_distributed(masked_and_short_steps, 1, "--zero-stage 1", model)[0]
    assert float(alone["loss 0"]) > 1 and float(alone["loss 1"]) > 1
    for found in run_distributed(masked_and_short_steps, 2, flags, model):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
