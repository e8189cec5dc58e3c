"""How often a training step makes the host wait for the device: never, but for the sizes that an all-to-all must know."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from host_syncs import HostSyncs

from distributed import parity
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.moe.layer import moe_layers
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.distillation import Distillation, build_teacher
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

MODEL = {"dropless": "pyramid", "dropping": "dropping", "every loss": "losses", "taught": "student"}
EP, ETP = "--moe-expert-parallel-size 2", "--expert-tensor-parallel-size 2"
NODES = "--moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2"


def step(config: RunConfig, device: torch.device, expert_factory=None):
    """A function that makes one training step, as the loop does."""
    mesh = build_parallel_mesh(config, device.type)
    model = build_parallel_model(config, parity.VOCAB, mesh, device, expert_factory)
    optimizer = build_optimizer(model, config.optimizer)
    batches = [b.to(device) for b in parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), config.training.micro_batch_size, config)]
    forwards, distillation = len(batches) * len(moe_layers(model)), None
    if config.distillation.is_on:
        teacher = parity.fill_teacher(build_teacher(config, parity.VOCAB, mesh, device), config)
        forwards, distillation = forwards + len(batches) * len(moe_layers(teacher)), Distillation(config.distillation, teacher)
    return lambda i: train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, i, distillation), forwards


def waits(model: str, flags: str) -> tuple[list[str], int]:
    """What the second step of a run waits for, and how many MoE layer forwards it has."""
    run, forwards = step(parity.config(model, flags), torch.device("cpu"), parity.FACTORIES.get(model))
    run(0)
    with HostSyncs() as syncs:
        run(1)
    return syncs.seen, forwards


@pytest.mark.parametrize("routing", list(MODEL))
@pytest.mark.parametrize(
    ("world", "flags", "per_forward"),
    [
        (1, "", 0),
        (2, f"{EP} --moe-token-dispatcher allgather --zero-stage 3", 0),
        (2, f"{EP} --moe-token-dispatcher allgather --tensor-model-parallel-size 2", 0),
        (2, f"{EP} --moe-token-dispatcher allgather --tensor-model-parallel-size 2 --sequence-parallel {parity.DIVISIBLE}", 0),
        (2, f"{EP} --moe-token-dispatcher allgather --context-parallel-size 2 {parity.DIVISIBLE} {parity.DOCUMENTS}", 0),
        (2, f"{EP} --moe-token-dispatcher alltoall", 1),
        (2, f"{EP} --moe-token-dispatcher alltoall --recompute-granularity full --bf16", 1),
    ],
    ids=["local", "allgather", "allgather under TP", "under SP", "under CP", "alltoall", "alltoall recomputed in bf16"],
)
def test_a_step_waits_for_nothing_but_the_sizes_of_an_exchange(world, flags, per_forward, routing):
    for seen, forwards in run_distributed(waits, world, MODEL[routing], flags):
        assert len(seen) == per_forward * forwards, seen
        assert {re.sub(r"\d+", "", s) for s in seen} <= {"tolist in alltoall.py:"}


def test_keys_that_travel_are_not_waited_for():
    flags = f"{EP} --moe-token-dispatcher allgather --context-parallel-size 2 --cp-comm-type p2p {parity.DIVISIBLE}"
    for seen, _ in run_distributed(waits, 2, "ring", flags):
        assert seen == []


@pytest.mark.parametrize("routing", ["dropless", "dropping"])
@pytest.mark.parametrize(
    ("world", "flags", "per_forward"),
    [
        (2, ETP, 0),
        (2, f"{ETP} --moe-token-dispatcher alltoall --bf16", 1),
        (2, f"{EP} --moe-overlap-chunks 3 --recompute-granularity full --bf16", 1),
        (4, f"{EP} {ETP} --moe-token-dispatcher alltoall --moe-overlap-chunks 2", 1),
        (4, f"{NODES} --moe-overlap-chunks 2 --recompute-granularity full", 1),
    ],
    ids=["slices", "slices and alltoall", "parts", "slices in parts", "two stages in parts"],
)
def test_slices_stages_and_parts_wait_no_more_than_an_exchange(world, flags, per_forward, routing):
    test_a_step_waits_for_nothing_but_the_sizes_of_an_exchange(world, flags, per_forward, routing)


@pytest.mark.parametrize("model", ["deepseek", "drawn", "hash", "zipf", "expert_choice", "sinkhorn"])
def test_no_policy_waits(model):
    for seen, _ in run_distributed(waits, 2, model, f"{EP} --moe-token-dispatcher allgather"):
        assert seen == []


@pytest.mark.parametrize(("routing", "per_forward"), [("dropping", 0), ("dropless", 1)])
@pytest.mark.parametrize(
    ("world", "flags"), [(1, ""), (2, EP), (2, f"{EP} --tensor-model-parallel-size 2 --recompute-granularity full --bf16")]
)
def test_rows_padded_to_the_capacity_are_exchanged_without_a_wait(world, flags, routing, per_forward):
    """Without dropping, the capacity is the largest load: one wait, and none in the recomputation."""
    for seen, forwards in run_distributed(waits, world, MODEL[routing], f"{flags} --moe-pad-expert-input-to-capacity"):
        assert len(seen) == per_forward * forwards, seen
        assert {re.sub(r"\d+", "", s) for s in seen} <= {"_local_scalar_dense in padded.py:"}


def test_experts_that_are_modules_wait_once_to_know_where_their_rows_end():
    for seen, forwards in run_distributed(waits, 1, "modules", ""):
        assert len(seen) == forwards
        assert {re.sub(r"\d+", "", s) for s in seen} == {"tolist in module_experts.py:"}


def waits_with(fault: str) -> list[str]:
    from megatron_moe.moe import layer

    def reading(tensor):
        tensor.sum().item()
        return tensor

    original = layer.count_assignments
    faults = {
        "item in the forward": mock.patch.object(layer, "count_assignments", lambda *a: original(*map(reading, a[:1]), *a[1:])),
        "truth in the backward": mock.patch.object(layer.AttachLoss, "backward", staticmethod(lambda ctx, g: (g, g.new_ones(()) if bool(g.isfinite().all()) else None))),
        "mask in the clip": mock.patch("megatron_moe.training.step.clip_gradients", lambda grads, norm, limit, scale: norm[None][norm[None] > limit]),
    }  # fmt: skip
    with faults[fault]:
        return waits("pyramid", "")[0]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("item in the forward", "_local_scalar_dense in layer.py"),
        ("truth in the backward", "_local_scalar_dense in step.py"),
        ("mask in the clip", "index by a mask in step.py"),
    ],
)
def test_a_planted_wait_is_seen(fault, seen):
    assert seen in {s.partition(":")[0] for s in run_distributed(waits_with, 1, fault)[0]}


def losses_of_unequal_evaluations(flags: str, model_name: str = "pyramid") -> float:
    """Data rank r evaluates r + 1 sequences, or all of them."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    whole = parity.microbatches(0, 0, 1, 4)[0]
    mine = [slice(0, 1), slice(1, 3)][mesh.rank("dp")] if mesh.size("dp") == 2 else slice(0, 3)
    batch = Batch(*(None if t is None else t[mine] for t in whole))
    return evaluate(model, [batch], mesh, torch.device("cpu")).lm_loss


def test_ranks_may_evaluate_unequal_batches():
    flags = f"{parity.FP64} {EP} --moe-token-dispatcher allgather"
    losses = run_distributed(losses_of_unequal_evaluations, 2, flags)
    whole = run_distributed(losses_of_unequal_evaluations, 1, parity.FP64)[0]
    assert losses == pytest.approx([whole, whole], abs=1e-10)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, f"{ETP}"),
        (2, f"{ETP} --moe-token-dispatcher alltoall"),
        (2, f"{EP} --moe-overlap-chunks 3"),
        (4, f"{EP} {ETP} --tensor-model-parallel-size 2 --moe-token-dispatcher allgather"),
        (4, f"{EP} {ETP} --tensor-model-parallel-size 2 --moe-pad-expert-input-to-capacity"),
        (4, f"{NODES} --tensor-model-parallel-size 2"),
        (4, f"{NODES} --tensor-model-parallel-size 2 --moe-overlap-chunks 2"),
    ],
)
@pytest.mark.parametrize("model", ["pyramid", "dropping"])
def test_ranks_may_evaluate_unequal_batches_however_tokens_travel(world, flags, model):
    """With an evaluation capacity that none exceeds: it follows from the longest batch, on which all ranks must agree."""
    roomy = "--moe-eval-capacity-factor 16" if model == "dropping" else ""
    losses = run_distributed(losses_of_unequal_evaluations, world, f"{parity.FP64} {flags} {roomy}", model)
    whole = run_distributed(losses_of_unequal_evaluations, 1, f"{parity.FP64} {roomy}", model)[0]
    assert losses == pytest.approx([whole] * world, abs=1e-10)


def waits_of_an_evaluation(model: str, flags: str) -> tuple[list[str], int]:
    c = parity.config(model, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
    with HostSyncs() as syncs:
        evaluate(model, batches, mesh, torch.device("cpu"))
    return syncs.seen, len(batches) * len(moe_layers(model))


@pytest.mark.parametrize(("model", "asked"), [("pyramid", 0), ("dropping", 1)], ids=["dropless", "with a capacity"])
def test_an_evaluation_asks_for_the_longest_batch_only_where_a_capacity_depends_on_it(model, asked):
    for seen, forwards in run_distributed(waits_of_an_evaluation, 2, model, f"{EP} --moe-token-dispatcher alltoall"):
        of_layers = [s for s in seen if "evaluate.py" not in s]  # which reads its sums, once
        assert len(of_layers) == (1 + asked) * forwards, of_layers


def can_check_on_gpu() -> bool:
    # elsewhere torch's grouped_mm is a loop that reads its offsets on the host
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.skipif(not can_check_on_gpu(), reason="needs an NVIDIA GPU of compute capability 9 or newer")
@pytest.mark.parametrize("routing", list(MODEL))
def test_a_step_on_a_gpu_synchronises_nowhere(routing, tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, _ = step(parity.config(MODEL[routing], "--bf16"), torch.device("cuda", 0))
        run(0)
        run(1)
        torch.cuda.set_sync_debug_mode("error")
        run(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
