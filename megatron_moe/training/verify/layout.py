"""What the ranks of a layout compute: the product's own recipe, optimizer, loader and step, looked at from outside.

Nothing is taken apart. Gradients are read by a hook of the optimizer, which runs between clipping and the update, and divided by
what clipping did to them, as the step itself reports it: so a wrong norm does not make every gradient look wrong.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_moe.config.run import RunConfig
from megatron_moe.data.loader import build_loader
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_model
from megatron_moe.training.distillation import Distillation, build_teacher
from megatron_moe.training.replicas import Drift, ReplicaWatch
from megatron_moe.training.room import build_room
from megatron_moe.training.step import train_step
from megatron_moe.training.verify.reference import STEPS, Say, Trace, fill, holed_batch, rates, text


def train_layout(
    run: RunConfig, vocab_size: int, mesh: ParallelMesh, device: torch.device, clip: float, say: Say
) -> tuple[Trace, list[Drift]]:
    """Two steps on all ranks. Collective. The trace is complete on rank 0, and replicas that are none are known everywhere."""
    with gathers_on_purpose():
        return _train_layout(run, vocab_size, mesh, device, clip, say)


@contextmanager
def gathers_on_purpose() -> Iterator[None]:
    """Whole tensors are gathered axis by axis. torch advises against that, in a warning or (2.13) in a line of its log."""
    log = logging.getLogger("torch.distributed.tensor._redistribute")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="While redistributing")
            yield
    finally:
        log.setLevel(level)


def _train_layout(
    run: RunConfig, vocab_size: int, mesh: ParallelMesh, device: torch.device, clip: float, say: Say
) -> tuple[Trace, list[Drift]]:
    trace = Trace(clip=clip)
    model = fill(build_parallel_model(run, vocab_size, mesh, device), run, run.training.seed)
    optimizer, room = build_optimizer(model, run.optimizer), build_room(model, device)
    distillation = None
    if run.distillation.is_on:
        teacher = fill(build_teacher(run, vocab_size, mesh, device), run.teacher(), run.training.seed + 1)
        distillation = Distillation(run.distillation, teacher)
    ranks, micro = mesh.size("dp"), run.training.micro_batch_size
    each = run.training.global_batch_size // (micro * ranks)
    batches = iter(build_loader(text(run, vocab_size), 0, micro, mesh.rank("dp"), ranks, each, 0, partial(holed_batch, run)))
    clipped: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: clipped.update(whole_gradients(model)))
    for step, now in enumerate(rates(run)):
        say(f"the layout: step {step + 1} of {STEPS}")
        mine = [next(batches).to(device) for _ in range(each)]
        done = train_step(
            model, optimizer, mine, mesh, now.learning_rate, clip, run.training.seed, step, distillation, now.weight_decay, None, room
        )  # fmt: skip
        unclip = max((float(done.grad_norm) + 1e-6) / clip, 1.0) if clip else 1.0
        for name, gradient in clipped.items():
            trace.put("gradient", step + 1, name, gradient * unclip)
        clipped.clear()
        trace.put("loss", step + 1, "", done.lm_loss)
        trace.put("gradient norm", step + 1, "", done.grad_norm)
        if done.mtp_losses is not None:
            trace.put("loss further on", step + 1, "", done.mtp_losses)
        if done.kd_loss is not None:
            trace.put("distance to the teacher", step + 1, "", done.kd_loss)
        for moe in moe_layers(model):
            vector = mesh.sum(moe.stats.vector(device).clone(), "dp", "cp", "tp")
            trace.put("routing", step + 1, f"layers.{moe.layer}.moe", vector)
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            trace.put("weight", step + 1, name, whole(t))
    drifts = ReplicaWatch(model, optimizer, device).check()
    return together(trace), drifts


def whole_gradients(model: GPT) -> dict[str, Tensor]:
    return {name: whole(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in model.named_parameters()}


def whole(t: Tensor) -> Tensor:
    """Collective over the ranks that share it."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def together(trace: Trace) -> Trace:
    """On rank 0 also what it does not hold itself: the layers of other pipeline stages. Collective."""
    names: list[set] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, set(trace.values))
    missing = set().union(*names) - names[0]
    if not missing:
        return trace
    owner = {key: min(r for r, has in enumerate(names) if key in has) for key in missing}
    mine = {key: trace.values[key] for key, rank in owner.items() if rank == dist.get_rank()}
    everyone: list[dict] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    for values in everyone or ():
        trace.values |= values
    return trace
