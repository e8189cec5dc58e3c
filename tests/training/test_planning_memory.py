"""Predicted bytes against measured ones: every storage that is alive in a step, on layouts small enough to run here.

Experts are equally busy (--moe-router-policy balanced), so that a load skew of 1 is the truth.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest
import torch
from distributed.collectives import LiveParameters, elements
from distributed_pool import run_distributed
from live_tensors import LiveTensors

from megatron_moe.arguments import parse_args
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.moe.layer import moe_layers
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.planning import activations as act
from megatron_moe.training.planning.layout import Layout, of_run
from megatron_moe.training.planning.memory import Memory, _activations, memory
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed
VOCAB = 500
WITHIN = 0.10
MODEL = (
    "--num-layers 2 --expert-interval 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--num-experts 4 --topk 2 --moe-router-policy balanced --disable-moe-token-dropping --hidden-dropout 0 --attention-dropout 0 "
    "--moe-token-dispatcher alltoall --mock-data --train-iters 2 --micro-batch-size 4 "
)
MODERN = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --num-key-value-heads 2 "


class Measured(NamedTuple):
    """Bytes on one rank, in the second step of a run."""

    parameters: int
    gathered: int  # in the last forward
    optimizer: int
    kept: int  # between the last forward and its backward, without parameters
    routed: int  # of these, from dispatch to combine
    peak: int


def measure(flags: str) -> Measured:
    run = parse_args((MODEL + flags).split()).run
    mesh = build_parallel_mesh(run, "cpu")
    model = build_parallel_model(run, VOCAB, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, run.optimizer)
    generator = torch.Generator().manual_seed(mesh.rank("dp"))
    size, length = run.training.micro_batch_size, run.training.seq_length
    count = run.num_microbatches(mesh.size("dp") * run.parallel.model_parallel_size)
    tokens = [torch.randint(VOCAB, (size, length + 1), generator=generator) for _ in range(count)]
    positions = torch.arange(length).expand(size, -1).contiguous()
    batches = [Batch(t[:, :-1], t[:, 1:], torch.ones(size, length), positions, None, torch.arange(size)) for t in tokens]
    live_parameters, found = LiveParameters(model), {"routed": 0}
    with LiveTensors(list(model.parameters())) as live:

        def before(*_) -> None:
            found["begin"], found["routed"] = live.look() - 4 * live_parameters.parameters(), 0

        def after(*_) -> None:
            live_parameters.look()
            found["gathered"] = 4 * live_parameters.parameters()
            found["end"] = live.look() - found["gathered"]

        model.register_forward_pre_hook(before, prepend=True)
        model.register_forward_hook(after)
        for moe in moe_layers(model):
            compute = moe.compute

            def now():
                time.sleep(0.05)  # gloo's threads hold what was sent for a moment longer than the wait for it
                live_parameters.look()
                return live.look() - 4 * live_parameters.parameters()

            def counted(*args, compute=compute, now=now):
                start = now()

                def not_counted(meanwhile=args[-1]):  # the dense branch
                    begin = now()
                    meanwhile()
                    found["routed"] -= now() - begin

                out = compute(*args[:-1], not_counted) if callable(args[-1]) else compute(*args)
                found["routed"] += now() - start
                return out

            moe.compute = counted
        for step in range(2):
            live.peak = 0
            train_step(model, optimizer, batches, mesh, 1e-3, 1.0, 1, step)
    shards = 4 * elements(model.parameters())
    moments = 4 * elements(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return Measured(shards, found["gathered"] - shards, moments, found["end"] - found["begin"], found["routed"], live.peak)


def predict(flags: str, world: int) -> tuple[RunConfig, Layout, Memory, act.Kept, act.Kept]:
    run = parse_args((MODEL + flags).split()).run
    layout, batch = of_run(run, world), run.global_batch_size(world)
    kept, _, loss = _activations(run, layout.of_tokens, VOCAB, 1.0, True, torch.get_num_threads(), 0)
    return run, layout, memory(run, layout, VOCAB, batch, 1.0, True, torch.get_num_threads()), kept, loss


LAYOUTS = {
    "one process": (1, ""),
    "one process, modern": (1, MODERN),
    "one process, recompute full": (1, "--recompute-granularity full --mlp-type residual"),
    "one process, recompute selective, dropout": (1, "--recompute-granularity selective --attention-dropout 0.1 --hidden-dropout 0.1"),
    "one process, multi-token prediction": (1, "--mtp-num-layers 2 --hidden-dropout 0.1"),
    "ZeRO 0, EP 2": (2, "--zero-stage 0 --moe-expert-parallel-size 2"),
    "ZeRO 1, EP 2, two micro-batches": (2, "--zero-stage 1 --moe-expert-parallel-size 2 --global-batch-size 16"),
    "ZeRO 3, EP 2": (2, "--zero-stage 3 --moe-expert-parallel-size 2"),
    "ZeRO 1, bf16": (2, MODERN + "--zero-stage 1 --bf16"),
    "TP 2": (2, "--tensor-model-parallel-size 2 --zero-stage 1"),
    "TP 2, EP 2, shared expert": (
        2, "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --zero-stage 1 --moe-shared-expert-intermediate-size 64 "
        "--global-batch-size 8"),
    "one process, latent attention": (
        1, MODERN.replace("--num-key-value-heads 2", "") + "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 24 --qk-head-dim 16 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 16"),
    "one process, norms of q and k, window, sinks": (1, MODERN + "--qk-layernorm --window-size 16 --softmax-type learnable"),
}  # fmt: skip


def share(predicted: float, measured: float) -> float:
    return predicted / measured - 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_bytes_are_within_a_tenth_of_measured_ones(name):
    world, flags = LAYOUTS[name]
    found = run_distributed(measure, world, flags)[0]
    _, _, whole, kept, loss = predict(flags, world)
    errors = {
        "parameters": share(whole.parameters, found.parameters), "optimizer": share(whole.optimizer, found.optimizer),
        "activations and logits": share(kept.total + loss.total, found.kept), "peak": share(whole.total, found.peak),
    }  # fmt: skip
    gathers = world > 1 and "--zero-stage 0" not in flags and "--global-batch-size" not in flags  # FSDP's buffers are among the rows
    if not gathers and "--recompute-granularity full" not in flags:  # what is recomputed is not kept
        errors["dispatch"] = share(kept.routed, found.routed)
    if whole.gathered and "--zero-stage 3" not in flags:  # the largest block has gone when the forward ends
        errors["gathered"] = share(whole.gathered, found.gathered)
    print(name, {part: f"{error:+.1%}" for part, error in errors.items()})
    assert {part: f"{error:+.1%}" for part, error in errors.items() if abs(error) > WITHIN} == {}
    assert whole.parameters == found.parameters
    assert whole.optimizer == found.optimizer


def test_a_planted_fault_in_the_rows_is_seen(monkeypatch):
    """Rows counted once for every expert of a token's own rank alone."""
    found = run_distributed(measure, 2, LAYOUTS["ZeRO 0, EP 2"][1])[0]
    right = act.Shapes.rows
    _activations.cache_clear()
    monkeypatch.setattr(act.Shapes, "rows", lambda self, n: right(self, n) / self.layout.ep)
    _, _, _, kept, _ = predict(LAYOUTS["ZeRO 0, EP 2"][1], 2)
    _activations.cache_clear()
    assert abs(share(kept.routed, found.routed)) > WITHIN


def test_rows_of_a_shared_expert_are_seen_by_all_that_share_it():
    """Expert tensor parallelism: each of the two sees the rows of both, and has half of the inner width."""
    run = parse_args((MODEL + "--disable-bias-linear").split()).run
    alone, shared = (act.Shapes(run, Layout(4, ep=2, etp=etp), 1.0) for etp in (1, 2))
    assert shared.rows(4) == 2 * alone.rows(4)
    inner = 4 * 64 * 3 * alone.rows(4) * 4  # gelu: before, after, weighted; four times as wide as the stream, four bytes
    outer = 64 * alone.rows(4) * 4  # rows
    more = act.compute(shared, 4).routed - act.compute(alone, 4).routed
    assert inner + outer < act.compute(alone, 4).routed
    assert outer <= more < inner  # what is as wide as the rows is there twice, what is inside of the expert once


def test_a_load_skew_counts_where_experts_are_apart_and_a_capacity_bounds_it():
    run = parse_args(MODEL.split()).run
    rows = lambda run, ep, skew: act.Shapes(run, Layout(4, ep=ep, micro_batch=4), skew).rows(4)  # noqa: E731
    assert rows(run, 1, 3.0) == rows(run, 1, 1.0) == 512
    assert rows(run, 4, 3.0) == 3 * 512
    assert rows(run, 2, 3.0) == 2 * 512  # not more than there are
    capacity = parse_args(MODEL.replace("--disable-moe-token-dropping", "--moe-train-capacity-factor 1.25").split()).run
    assert rows(capacity, 4, 3.0) == 1.25 * 512
