"""What the parity rows do not look at: who routes how often, steps whose shape changes, evaluation, memory of other stages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity
from distributed.test_parallel_equals_single import INTERLEAVED, PP2, PP4, RECOMPUTE, ZERO_BUBBLE
from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import initialize_parameters
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward
from megatron_moe.utils.random import token_keys

pytestmark = pytest.mark.distributed

SCHEDULES = {
    "1f1b": PP2,
    "gpipe": f"{PP2} --pipeline-schedule gpipe",
    "interleaved": INTERLEAVED,
    "zero-bubble": f"{PP2} {ZERO_BUBBLE}",
    "zero-bubble over virtual stages": f"{INTERLEAVED} {ZERO_BUBBLE}",
}


def build(model_name: str, flags: str):
    c = parity.config(model_name, f"{parity.FP64} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    return c, mesh, build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))


def build_plain(model_name: str) -> GPT:
    c = parity.config(model_name, parity.FP64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(c.model, c.moe, parity.VOCAB)
    finally:
        torch.set_default_dtype(before)
    initialize_parameters(model, c.training.seed, c.model.init_method_std, c.model.num_layers)
    for moe in moe_layers(model):
        moe.experts.use_reference = True
    return model


# ---------------------------------------------------------------- the router


def count_routings(flags: str) -> dict[int, tuple[int, int]]:
    """Per MoE layer here: how often its router ran in a training step, how many assignments its statistics count."""
    _, mesh, model = build("deep", flags)
    ran = Counter()
    for moe in moe_layers(model):
        moe.gate.register_forward_hook(lambda *_, layer=moe.layer: ran.update([layer]))
    for _ in range(2):  # a schedule finds its bearings in its first step
        ran.clear()
        batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, 0)
        found = {moe.layer: (ran[moe.layer], int(moe.stats.counts_E.sum())) for moe in moe_layers(model)}
    dist.barrier()
    return found


@pytest.mark.parametrize("recompute", ["", RECOMPUTE])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_router_is_called_once_per_microbatch_and_layer(schedule, recompute):
    found = run_distributed(count_routings, 2, f"{SCHEDULES[schedule]} {recompute}")
    layers = {layer: counted for rank in found for layer, counted in rank.items()}
    # four micro-batches of 2 x 15 tokens, two experts each
    assert layers == dict.fromkeys((2, 3, 4), (4, 4 * 2 * 15 * 2))
    assert not set(found[0]) & set(found[1])


# ---------------------------------------------------------------- steps whose shape changes

SHAPES = [(4, 15), (2, 15), (4, 9), (1, 9), (4, 15)]  # micro-batches, tokens of a sequence: a ramp-up, a curriculum


def steps_of(mesh_rank: int, ranks: int) -> list[list[Batch]]:
    return [[b.shortened(length) for b in parity.microbatches(step, mesh_rank, ranks, 2)[:n]] for step, (n, length) in enumerate(SHAPES)]


def gradients_of_shapes(flags: str) -> dict[str, torch.Tensor]:
    _, mesh, model = build("deep", flags)
    out = {}
    for step, batches in enumerate(steps_of(mesh.rank("dp"), mesh.size("dp"))):
        loss = forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, step)
        out[f"loss {step}"] = mesh.sum(loss, "dp", "pp")
        out |= {f"{step} {name}": parity.whole(p.grad) for name, p in model.named_parameters()}
        model.zero_grad()
    return parity.of_all_stages(out, mesh)


def plain_gradients_of_shapes() -> dict[str, torch.Tensor]:
    model, out = build_plain("deep"), {}
    for step, batches in enumerate(steps_of(0, 1)):
        divisor, tokens = sum(b.loss_mask.sum() for b in batches), sum(b.tokens.numel() for b in batches)
        total = 0.0
        for moe in moe_layers(model):
            moe.begin_step(1 / tokens)
        for b in batches:
            keys = token_keys(parity.SEED, step, b.sample_ids, b.tokens.shape[1])
            loss = (model(b.tokens, b.position_ids, b.labels, None, keys) * b.loss_mask).sum() / divisor
            loss.backward()
            total += loss.detach()
        out[f"loss {step}"] = total
        out |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
    return out


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
def test_steps_of_other_shapes_are_those_of_one_process(schedule):
    found, expected = run_distributed(gradients_of_shapes, 2, SCHEDULES[schedule])[0], plain_gradients_of_shapes()
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name].double(), t.double(), rtol=1e-10, atol=1e-13, msg=name)


# ---------------------------------------------------------------- evaluation


def evaluation_here(flags: str, in_flight: int):
    """Before and after a training step, which must not change what evaluation of the same weights says."""
    _, mesh, model = build("late", flags)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
    more = [*batches, *parity.microbatches(1, mesh.rank("dp"), mesh.size("dp"), 2)[:1]]
    results = [evaluate(model, more, mesh, torch.device("cpu"), in_flight=in_flight)]
    assert all(moe.stats.sums is None for moe in moe_layers(model))
    forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, 0)
    model.zero_grad()
    results.append(evaluate(model, more, mesh, torch.device("cpu"), in_flight=in_flight))
    return results, all(p.grad is None for p in model.parameters()), model.training


@pytest.mark.parametrize(
    ("world", "flags", "in_flight"),
    [
        (2, PP2, 3),
        (2, f"{PP2} {ZERO_BUBBLE}", 4),
        (2, INTERLEAVED, 5),  # 5 do not fit two rounds: 4 and 1
        (4, f"--zero-stage 3 {INTERLEAVED} --moe-expert-parallel-size 2", 2),
        (4, f"--zero-stage 2 {PP2} --moe-expert-parallel-size 2", 2),
        (4, f"--zero-stage 1 {PP4}", 5),
    ],
)
def test_evaluation_through_the_pipeline_is_that_of_one_process(world, flags, in_flight):
    found = run_distributed(evaluation_here, world, flags, in_flight)
    ranks = world // (4 if "size 4" in flags else 2)
    plain = build_plain("late").eval()
    seen = [b for r in range(ranks) for b in [*parity.microbatches(0, r, ranks, 2), *parity.microbatches(1, r, ranks, 2)[:1]]]
    with torch.no_grad():
        total = sum((plain(b.tokens, b.position_ids, b.labels) * b.loss_mask).sum() for b in seen)
    tokens = sum(int(b.loss_mask.sum()) for b in seen)
    for results, has_no_gradient, is_training in found:
        assert has_no_gradient and is_training
        for result in results:
            assert result.tokens == tokens
            assert result.lm_loss == pytest.approx(float(total) / tokens, rel=1e-12)


# ---------------------------------------------------------------- what a stage holds


def names_here(flags: str) -> tuple[list[str], int]:
    _, mesh, model = build("deep", flags)
    return [name for name, _ in model.named_parameters()], sum(p.numel() for p in model.counted_parameters())


@pytest.mark.parametrize(("world", "flags"), [(2, PP2), (2, INTERLEAVED), (4, f"--zero-stage 1 {PP4}")])
def test_stages_hold_each_parameter_once_and_the_tied_embedding_twice(world, flags):
    found, plain = run_distributed(names_here, world, flags), build_plain("deep")
    names = [name for rank, _ in found for name in rank]
    assert sorted(names) == sorted([*(name for name, _ in plain.named_parameters()), "embedding.weight"])
    assert "embedding.weight" in found[0][0] and "embedding.weight" in found[-1][0]
    assert sum(counted for _, counted in found) == sum(p.numel() for p in plain.parameters())
