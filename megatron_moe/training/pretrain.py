"""A whole run: set up -> loop -> last evaluation and checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe import mpu
from megatron_moe.checkpoint.files import CheckpointError, iteration_name, write_through
from megatron_moe.checkpoint.lock import DirectoryLock
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.config.pace import Pace
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch, make_batch
from megatron_moe.data.loader import SplitDatasets, Unread, build_datasets, build_loader
from megatron_moe.metrics.alerts import ExpertAlerts
from megatron_moe.metrics.throughput import Throughput, peak_memory_bytes, tflops_per_device
from megatron_moe.metrics.tracker import Tracker, build_tracker, moe_layer_record
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.moe.metrics import LayerLoad, RoutingStats, summarise
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.optimizer.schedule import LearningRateSchedule, WeightDecaySchedule, build_schedule, build_weight_decay
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.offload import offload_warnings
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.training.checkpoints import Progress, contents, describe, resume, start_from_folder
from megatron_moe.training.distillation import Distillation, build_teacher, load_teacher
from megatron_moe.training.distributed import World, explain_lost_rank, in_turn, init_distributed
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.graphed import StepGraph, build_step_graph
from megatron_moe.training.last_words import LastWords, open_store
from megatron_moe.training.preflight import Prepared
from megatron_moe.training.replicas import ReplicaDriftError, ReplicaWatch
from megatron_moe.training.room import Room, build_room
from megatron_moe.training.saving import Saver, saving_group
from megatron_moe.training.signals import Stopper
from megatron_moe.training.stages import idle_of, layer_ranges, schedule_name, stages_of
from megatron_moe.training.step import StepResult, train_step
from megatron_moe.training.upcycling import Upcycled, compare_with_dense, upcycle, verdict
from megatron_moe.training.verify.ranks import verify_or_exit
from megatron_moe.training.watchdog import Watchdog
from megatron_moe.utils.groups import end_groups
from megatron_moe.utils.logging import logger, setup_logging

EXIT_MARKER = "exit.json"
AGREED = (FloatingPointError, ReplicaDriftError, CheckpointError)  # all ranks raise these together: there is no rank to look for


@dataclass
class Run:
    """All that the loop works with."""

    prepared: Prepared
    world: World
    mesh: mpu.ParallelMesh
    model: GPT | PipelinedGPT
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None  # of fp16
    schedule: LearningRateSchedule
    weight_decay: WeightDecaySchedule
    pace: Pace  # what each step takes
    datasets: SplitDatasets
    tracker: Tracker
    alerts: ExpertAlerts | None
    stopper: Stopper
    watchdog: Watchdog
    replicas: ReplicaWatch | None
    saver: Saver | None  # with --save
    lock: DirectoryLock | None  # on rank 0, with --save
    progress: Progress
    total_iterations: int
    distillation: Distillation | None  # until its stage is over
    room: Room | None  # of rows, where a step may lack it
    graph: StepGraph | None  # with --cuda-graph-impl

    @property
    def config(self) -> RunConfig:
        return self.prepared.run

    def microbatches_of(self, sequences: int) -> int:
        """Micro-batches of this rank in a step of that many sequences."""
        return sequences // (self.config.training.micro_batch_size * self.mesh.size("dp"))

    def close(self) -> None:
        self.watchdog.close()
        self.stopper.close()
        self.tracker.close()
        if self.lock:
            self.lock.close()


def pretrain(prepared: Prepared, warnings: list[str], command: list[str], verify_first: bool = False) -> None:
    """Train as configured, after a proof of the layout with --verify-parallelism. Every rank calls it; collective from here on."""
    setup_logging()
    for warning in warnings:
        logger.warning(warning)
    world = init_distributed(prepared.run.parallel)
    last_words = LastWords(world.rank, world.size, open_store(world.size))
    run = None
    try:
        mesh = build_parallel_mesh(prepared.run, world.device.type)
        if verify_first:
            verify_or_exit(prepared.run, mesh, world)  # before anything is written
        run = set_up(prepared, world, command, mesh, last_words)
        train(run)
        run.close()
        if world.rank == 0:
            print(next_commands(run), flush=True)
    except Exception as error:
        text = explain_lost_rank(error, world.rank, prepared.run.parallel.distributed_timeout_minutes)
        digest = "" if isinstance(error, AGREED) else last_words.digest(error, is_cause=text is None)
        if text is not None:
            raise RuntimeError(f"{text}\n{digest}") from error
        if digest:
            logger.error("%s", digest)
        raise
    finally:
        if run is not None and run.saver:
            run.saver.settle(run.progress.iteration)  # the other ranks' parts go on, also of those that wait for this one's next step
        last_words.close()
        mpu.set_default_mesh(None)
        end_groups()


def set_up(
    prepared: Prepared, world: World, command: list[str], mesh: mpu.ParallelMesh | None = None, last_words: LastWords | None = None
) -> Run:
    """Meshes, model, optimizer, data, checkpoint: in the order in which they need each other."""
    config = prepared.run
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    lock = claim_directory(Path(config.checkpoint.save), prepared, world, command) if config.checkpoint.save else None
    pace, total = config.pace(world.size), config.train_iterations(world.size)
    schedule = build_schedule(config.optimizer, pace, total)
    weight_decay = build_weight_decay(config.optimizer, pace, total)
    mesh = mesh or build_parallel_mesh(config, world.device.type)
    mpu.set_default_mesh(mesh)
    model = build_parallel_model(config, prepared.vocab_size, mesh, world.device)
    for warning in offload_warnings(config, world.device.type):
        logger.warning(warning)
    graph = build_step_graph(config, model)
    optimizer = build_optimizer(model, config.optimizer)  # after FSDP, which replaces the parameters
    loss_scale = LossScale(config.scale, world.device) if config.training.fp16 else None
    tracker = build_tracker(config.logging, config.checkpoint.save, world.rank, total, config.global_batch_size(world.size))
    saver = build_saver(config, world, tracker) if config.checkpoint.save else None
    report_start(prepared, world, mesh, model, tracker, total)
    progress, upcycled = Progress(), None
    if config.upcycling.moe_use_upcycling:
        upcycled = upcycle(prepared, model, world)
        tell_notes(tracker, upcycled.notes)
    elif (resumed := resume(prepared, model, optimizer, world, loss_scale)) is not None:
        progress, path, notes = resumed
        tell_notes(tracker, notes)
        tracker.event("load", iteration=progress.iteration, path=path)
        total = config.train_iterations(world.size, progress.consumed)
        tracker.set_length(total)
        if config.checkpoint.load_hf:
            tell_notes(tracker, [f"--load-hf {config.checkpoint.load_hf} is for a first start: the run goes on from {path}"])
    elif config.checkpoint.load_hf:
        for note in start_from_folder(prepared, model, world):
            logger.info(note)
        tracker.event("load", path=config.checkpoint.load_hf)  # no iteration: it is none of this run
    if saver:
        saver.go_on_from(progress.iteration)
    distillation = set_up_distillation(prepared, mesh, world, progress, tracker)
    if config.data.data_order == "megatron" and progress.ordered_samples is None:
        progress.ordered_samples = list(config.wanted_samples(world.size))
    seq_length, seed = config.training.seq_length, config.training.seed
    datasets = in_turn(world, lambda: build_datasets(config.data, seq_length, seed, prepared.vocab_size, progress.ordered_samples))
    if upcycled is not None:
        report_upcycling(prepared, upcycled, model, mesh, world, datasets, tracker)
    stopper = Stopper(config.training, world.cpu_group, saver.asks if saver else ())
    watchdog = Watchdog(world.rank, config.parallel.distributed_timeout_minutes, last_words)
    replicas = ReplicaWatch(model, optimizer, world.device) if config.training.check_replicas_interval else None
    if replicas and world.size == 1:
        logger.warning("--check-replicas-interval has no effect with one rank: there is nothing to compare")
        replicas = None
    alerts = None
    if config.logging.moe_alerts and config.moe.has_experts:
        alerts = ExpertAlerts(config.moe, config.logging.moe_alert_dropped_fraction)
    return Run(prepared, world, mesh, model, optimizer, loss_scale, schedule, weight_decay, pace, datasets, tracker, alerts, stopper, watchdog,
               replicas, saver, lock, progress, total, distillation, build_room(model, world.device), graph)  # fmt: skip


def build_saver(config: RunConfig, world: World, tracker: Tracker) -> Saver:
    """Collective."""
    c, timeout = config.checkpoint, timedelta(minutes=config.parallel.distributed_timeout_minutes)
    group = saving_group(c, world.cpu_group, timeout=timeout)
    return Saver(c, CheckpointManager(c.save, group, c.keep_last, c.keep_every), tracker, Ranks(world.cpu_group))


def tell_notes(tracker: Tracker, notes: Iterable[str]) -> None:
    for note in notes:
        logger.warning(note)
        tracker.event("alert", reason=note)


def report_upcycling(
    prepared: Prepared, upcycled: Upcycled, model: GPT | PipelinedGPT, mesh: mpu.ParallelMesh, world: World, datasets: SplitDatasets,
    tracker: Tracker,
) -> None:  # fmt: skip
    """How far the first logits are from those of the dense model, on the first micro-batch of every rank. Collective."""
    c = prepared.run
    read = build_loader(
        datasets.train, 0, c.training.micro_batch_size, mesh.rank("dp"), mesh.size("dp"), 1, 0, collate_of(prepared), num_steps=1
    )
    difference = compare_with_dense(prepared, upcycled, model, mesh, world, next(iter(read)))
    path = str(upcycled.source.path)
    logger.info("upcycled from %s: %s", path, verdict(c, difference))
    tracker.event(
        "load", dense=path, difference=difference.largest, of=difference.of, tokens=difference.tokens
    )  # no iteration: it is none of this run


def set_up_distillation(
    prepared: Prepared, mesh: mpu.ParallelMesh, world: World, progress: Progress, tracker: Tracker
) -> Distillation | None:
    """The teacher, unless there is none or the run has left it behind. Collective."""
    config = prepared.run.distillation
    if not config.is_on or config.is_over(progress.iteration, progress.consumed_tokens):
        return None
    teacher = build_teacher(prepared.run, prepared.vocab_size, mesh, world.device)
    found = load_teacher(teacher, config, prepared.run.checkpoint.ckpt_verify, world.cpu_group)
    for note in found.notes:
        logger.warning(note)
        tracker.event("alert", reason=f"teacher: {note}")
    tracker.event("load", teacher=str(found.path))  # no iteration: it is none of this run
    return Distillation(config, teacher)


def train(run: Run) -> None:
    """load -> while there are steps left: step, log, evaluate, save, stop."""
    config, progress = run.config, run.progress
    batches, throughput = loader_of(run), Throughput()
    reason = "done" if progress.iteration >= run.total_iterations else None
    evaluated = progress.iteration if run_evaluation(run) else -1
    if run.saver and run.saver.is_best and reason is None:
        run.saver.save(progress.iteration, *state_of(run))
    throughput.restart()
    while reason is None:
        run.watchdog.step(progress.iteration + 1)
        if run.distillation and config.distillation.is_over(progress.iteration, progress.consumed_tokens):
            run.distillation = None  # frees the teacher
            run.tracker.event("alert", iteration=progress.iteration, reason="distillation is over: the language-model loss goes on alone")
        samples, length = run.pace.step_after(progress.consumed)
        # pinned by the loader: the copy is queued, and the host goes on to queue the step behind it
        microbatches = [
            next(batches).to(run.world.device, non_blocking=True).shortened(length) for _ in range(run.microbatches_of(samples))
        ]
        tokens = samples * length
        # the rates of the step after which this much is consumed: the first step does not run at zero
        rate = run.schedule.at(progress.iteration + 1, progress.consumed_samples + samples, progress.consumed_tokens + tokens)
        decay = run.weight_decay.at(progress.consumed_samples + samples)
        seed, clip = config.training.seed, config.optimizer.clip_grad
        result = train_step(run.model, run.optimizer, microbatches, run.mesh, rate, clip, seed, progress.iteration, run.distillation, decay,
                            run.loss_scale, run.room, run.graph)  # fmt: skip
        progress.advance(samples, tokens)
        tell_repeats(run)
        throughput.add(tokens)
        i = progress.iteration
        if run.replicas and i % config.training.check_replicas_interval == 0:
            stop_if_drifted(run)
        reason = run.stopper.reason(i) or ("done" if i >= run.total_iterations else None)
        if i % config.logging.log_interval == 0 or reason or i == 1:
            log_step(run, result, Step(samples, length, rate, decay), throughput)
        with throughput.excluded():
            is_save_due = run.saver is not None and run.saver.after_step(i, run.stopper.answers)
            if config.training.eval_interval and i % config.training.eval_interval == 0 and reason in (None, "done"):
                evaluated = i if run_evaluation(run) else evaluated
            if run.saver and (is_save_due or run.saver.is_best) and reason is None:
                save_checkpoint(run, result)
    if reason == "done" and evaluated != progress.iteration:
        run_evaluation(run)
    if reason == "done" and run.datasets.test is not None:
        run_evaluation(run, "test")
    if run.saver and progress.iteration:
        save_checkpoint(run)
    run.tracker.event("stop", iteration=progress.iteration, reason=reason)
    if run.saver and run.world.rank == 0:
        write_exit_marker(run, reason)


def tell_repeats(run: Run) -> None:
    """Of the step that has just ended."""
    for repeat in run.room.of_step if run.room else ():
        logger.warning(
            "step %d was done again: experts of a rank got %d rows and had room for %d; now for %d (--moe-fused-capacity-factor)",
            run.progress.iteration, repeat.rows, repeat.room, repeat.new_room,
        )  # fmt: skip
        run.tracker.event(
            "repeat",
            iteration=run.progress.iteration,
            rows=repeat.rows,
            room=repeat.room,
            new_room=repeat.new_room,
            repeats=run.room.repeats,
        )


@dataclass(frozen=True)
class Step:
    """What a step took, and at what rates."""

    samples: int
    length: int
    learning_rate: float
    weight_decay: float


def loader_of(run: Run) -> Iterator[Batch]:
    """Training micro-batches of this rank, from where the run is, without end."""
    c = run.config
    return iter(
        build_loader(
            as_read_here(run, run.datasets.train), run.progress.consumed_samples, c.training.micro_batch_size, run.mesh.rank("dp"),
            run.mesh.size("dp"), lambda samples: run.microbatches_of(run.pace.batch_size(samples)), c.data.num_workers, collate_of(run.prepared),
        )
    )  # fmt: skip


def as_read_here(run: Run, dataset: Any) -> Any:
    """A stage between the first and the last one needs the numbers of the samples alone, as long as positions, documents, masks and
    routes are not made of the tokens."""
    d, model = run.config.data, run.model
    is_between = isinstance(model, PipelinedGPT) and not (model.has_first or model.has_last)
    looks_at_tokens = d.reset_position_ids or d.reset_attention_mask or d.eod_mask_loss or run.config.moe.moe_router_policy == "hash"
    return Unread(run.config.training.seq_length) if is_between and not looks_at_tokens else dataset


def collate_of(prepared: Prepared):
    d = prepared.run.data
    return partial(
        make_batch, eod=prepared.eod, reset_position_ids=d.reset_position_ids,
        reset_attention_mask=d.reset_attention_mask, eod_mask_loss=d.eod_mask_loss,
    )  # fmt: skip


def run_evaluation(run: Run, split: str = "valid") -> bool:
    """Evaluate on the first --eval-iters global batches of the split, the same every time; at most one pass over it."""
    c, dataset = run.config, getattr(run.datasets, split)
    if not c.training.eval_iters or dataset is None:
        return False
    dp, micro = run.mesh.size("dp"), c.training.micro_batch_size
    num_micro = min(c.training.eval_iters * c.num_microbatches(run.world.size), len(dataset) // (micro * dp))
    if num_micro == 0:
        logger.warning("no %s evaluation: %d samples are fewer than one micro-batch per rank (%d)", split, len(dataset), micro * dp)
        return False
    batches = build_loader(
        as_read_here(run, dataset), 0, micro, run.mesh.rank("dp"), dp, 1, 0, collate_of(run.prepared), num_steps=num_micro
    )
    in_flight = c.num_microbatches(run.world.size)
    result = evaluate(run.model, batches, run.mesh, run.world.device, lambda: run.stopper.agreed() is not None, in_flight)
    if result is None:
        return False
    run.tracker.log_eval(iteration=run.progress.iteration, split=split, lm_loss=result.lm_loss, tokens=result.tokens)
    if run.saver and split == "valid":
        run.saver.evaluated(run.progress.iteration, result.lm_loss)
    return True


def expert_loads(run: Run) -> list[LayerLoad]:
    """The last step of every MoE layer, over the whole global batch. Collective; one reduction for all layers of all stages."""
    c, device = run.config, run.world.device
    experts = {layer: n for layer, n in enumerate(c.experts_of_blocks(), start=1) if n > 1}
    if not experts:
        return []
    here = {moe.layer: moe for moe in moe_layers(run.model)}
    parts = [layer_vector(here.get(layer), n, run.mesh, device) for layer, n in experts.items()]
    together = torch.cat(parts)
    dist.all_reduce(together)
    loads = []
    for layer, vector in zip(experts, together.cpu().split([len(part) for part in parts])):
        vector, (sent, far, *bias_range) = vector[:-4], vector[-4:].tolist()
        bias = tuple(bias_range) if c.moe.moe_router_enable_expert_bias else None
        loads.append(replace(summarise(layer, vector), sent_bytes=sent, far_bytes=None if math.isnan(far) else far, bias_range=bias))
    return loads


def layer_vector(moe: MoELayer | None, num_experts: int, mesh: mpu.ParallelMesh, device: torch.device) -> Tensor:
    """float64, to be summed over the world: statistics of a layer, bytes sent by a rank that has it, and to other nodes (NaN where unknown), its smallest and largest bias;
    zeros where the layer is on another stage."""
    if moe is None:
        return torch.zeros(num_experts + RoutingStats.SCALARS + 4, dtype=torch.float64, device=device)
    own = torch.zeros(4, dtype=torch.float64, device=device)
    own[0], own[1] = moe.stats.sent_bytes / mesh.stage_ranks, moe.stats.far_bytes / mesh.stage_ranks
    if moe.gate.expert_bias is not None and dist.get_rank(mesh.stage_group) == 0:  # equal on all ranks of the stage: one says it
        own[2:] = torch.stack([moe.gate.expert_bias.min(), moe.gate.expert_bias.max()])
    return torch.cat([moe.stats.vector(device), own])


def log_step(run: Run, result: StepResult, step: Step, throughput: Throughput) -> None:
    """The one place of a step where the host waits for the device."""
    loads = expert_loads(run)
    lm_loss, norm = float(result.lm_loss), float(result.grad_norm)
    is_skipped = result.found_inf is not None and bool(result.found_inf)
    scale, skipped, is_stuck = run.loss_scale.numbers() if run.loss_scale else (1.0, 0, False)
    window = throughput.restart()
    c = run.config
    flops = flops_per_token(c.model, c.moe, step.length, run.prepared.vocab_size)
    mean = lambda values: sum(values) / len(loads) if loads else 0.0  # noqa: E731
    records = [
        moe_layer_record(load.layer, load.tokens_per_expert, load.dropped_fraction, load.router_entropy, load.z_loss**0.5,
                         load.bias_range, load.sent_bytes, load.far_bytes)
        for load in loads
    ]  # fmt: skip
    run.tracker.log_train(
        iteration=run.progress.iteration, consumed_samples=run.progress.consumed_samples, consumed_tokens=run.progress.consumed_tokens,
        lm_loss=lm_loss, grad_norm=None if is_skipped else norm, learning_rate=step.learning_rate,
        loss_scale=scale, skipped_iterations=skipped,
        weight_decay=step.weight_decay, global_batch_size=step.samples, seq_length=step.length,
        moe_aux_loss=mean(load.aux_loss for load in loads), moe_z_loss=mean(load.z_loss for load in loads),
        kd_loss=None if result.kd_loss is None else float(result.kd_loss),
        mtp_losses=() if result.mtp_losses is None else result.mtp_losses.tolist(),
        iteration_time_ms=window.iteration_time_ms, tokens_per_second=window.tokens_per_second,
        tflops_per_device=tflops_per_device(flops, window.tokens_per_second, run.world.size),
        peak_memory_bytes=largest_peak(run),
        moe=records,
    )  # fmt: skip
    for alert in run.alerts.check(records, step.samples * step.length) if run.alerts else ():
        run.tracker.event(
            "alert", iteration=run.progress.iteration, reason=alert.reason, condition=alert.condition, layer=alert.layer,
            layers=list(alert.layers), value=alert.value, flag=alert.flag,
        )  # fmt: skip
    if is_stuck:
        stop_at_minimum_scale(run)
    if not is_skipped:
        stop_if_not_finite(run, lm_loss, norm)


def stop_at_minimum_scale(run: Run) -> None:
    """The scale is equal on all ranks. The step was skipped: the weights are those before the overflow."""
    minimum = run.config.scale.min_loss_scale
    run.tracker.event("stop", iteration=run.progress.iteration, reason=f"overflow at the lowest loss scale ({minimum:g})")
    raise FloatingPointError(
        f"iteration {run.progress.iteration}: gradients overflow float16 although the loss scale is down at --min-loss-scale ({minimum:g}); "
        f"no step since has moved the weights by them. Use --bf16, lower --lr, or lower --min-loss-scale, and resume from the last checkpoint"
    )


def largest_peak(run: Run) -> int:
    """Of this rank, which speaks for the others of its stage; of the stage that has the largest."""
    peak = peak_memory_bytes(run.world.device.type)
    if run.mesh.size("pp") == 1:
        return peak
    largest = torch.tensor(peak, device=run.world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=run.mesh.group("pp"))
    return int(largest)


def stop_if_not_finite(run: Run, lm_loss: float, norm: float) -> None:
    """Both numbers are equal on all ranks, so all raise together; nothing that is not finite is ever saved."""
    if not (abs(lm_loss) < float("inf") and norm < float("inf")):
        layer = next((load.layer for load in expert_loads(run) if not math.isfinite(load.z_loss)), None)
        where = "" if layer is None else f"; layer {layer} is the first whose router logits are not finite"
        run.tracker.event("stop", iteration=run.progress.iteration, reason=f"loss or gradient norm is not finite{where}")
        raise FloatingPointError(
            f"iteration {run.progress.iteration}: loss {lm_loss}, gradient norm {norm}{where}; the last checkpoint is intact. "
            f"Lower --lr, lengthen the warm-up, or add --moe-router-z-loss-coeff 1e-3, and resume from it"
        )


def stop_if_drifted(run: Run) -> None:
    """Replicas that differ train a model that nobody has: all ranks stop together, and nothing of it is saved."""
    drifts = run.replicas.check()
    if not drifts:
        return
    i, more = run.progress.iteration, f", and {len(drifts) - 1} more tensors" if len(drifts) > 1 else ""
    run.tracker.event(
        "alert", iteration=i, reason=f"replicas have drifted: {drifts[0]}{more}", condition="replica_drift",
        parameters=[d.name for d in drifts], ranks=[list(map(list, d.ranks)) for d in drifts],
    )  # fmt: skip
    run.tracker.event("stop", iteration=i, reason="replicas have drifted")
    raise ReplicaDriftError(
        f"iteration {i}: {drifts[0]}{more}. They were equal at the last check, {run.config.training.check_replicas_interval} steps ago or at "
        f"the start; resume from a checkpoint before that, and look at the memory of those ranks"
    )


def save_checkpoint(run: Run, result: StepResult | None = None) -> None:
    """Between steps, with the step's result, or without one at the end."""
    if result is not None and not (result.found_inf is not None and bool(result.found_inf)):  # a skipped step has moved nothing
        stop_if_not_finite(run, float(result.lm_loss), float(result.grad_norm))
    assert run.saver is not None
    (run.saver.save_last if result is None else run.saver.save)(run.progress.iteration, *state_of(run))


def state_of(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return contents(run.prepared, run.model, run.optimizer, run.progress, run.loss_scale)


def report_start(prepared: Prepared, world: World, mesh: mpu.ParallelMesh, model: GPT | PipelinedGPT, tracker: Tracker, total: int) -> None:
    """What is about to run: sizes, layout, dispatchers."""
    c = prepared.run
    counts = parameter_counts(c.model, c.moe, prepared.vocab_size)
    batch = c.global_batch_size(world.size)
    step_tokens = batch * c.training.seq_length
    flops = flops_per_token(c.model, c.moe, c.training.seq_length, prepared.vocab_size) * step_tokens
    stages = stages_of(c, prepared.vocab_size)
    built, expected = sum(p.numel() for p in model.parameters()), sum(s.parameters for s in stages if s.rank == mesh.rank("pp"))
    assert built == expected, f"parameters: built {built}, counted {expected}"
    experts = [n for n in c.moe.experts_per_layer(c.model.num_layers) if n > 1]
    logger.info("%s parameters, %s active per token; %.3g FLOPs per step", f"{counts.total:,}", f"{counts.active:,}", flops)
    logger.info("%d rank(s) on %s: %s", world.size, world.device.type, kind_of_layout(c, mesh))
    if c.distillation.is_on:
        teacher = parameter_counts(c.teacher().model, c.teacher().moe, prepared.vocab_size)
        logger.info("teacher: %s parameters, %s active per token", f"{teacher.total:,}", f"{teacher.active:,}")
    for warning in c.world_warnings(world.size):
        logger.warning(warning)
    if len(stages) > 1:
        logger.info(
            "%s schedule, about %.0f%% of a step idle; %s", schedule_name(c), 100 * idle_of(c, c.num_microbatches(world.size)),
            ", ".join(f"stage {s.number} on pipeline rank {s.rank}: layers {layer_ranges(s.layers)}" for s in stages),
        )  # fmt: skip
    for layer, (count, dispatcher) in sorted(dispatchers(model, mesh).items()):
        logger.info("layer %d: %d experts of %s, expert-parallel %d, %s dispatch", layer, count, kind_of_experts(c),
                    c.moe.expert_parallel_degree(count), dispatcher)  # fmt: skip
    for why in dict.fromkeys(moe.dispatcher.why for moe in moe_layers(model) if moe.dispatcher.why):
        logger.info("--moe-token-dispatcher %s, %s", c.moe.moe_token_dispatcher, why)
    logger.info("%d iterations of %d sequences (%d tokens), %d microbatch(es) per rank", total, batch, step_tokens,
                c.num_microbatches(world.size))  # fmt: skip
    if len(phases := c.pace(world.size).phases) > 1:
        logger.info("%d sizes of a step: %s", len(phases), ", ".join(
            f"{p.batch} x {p.length} from step {p.start.iterations + 1}" for p in (*phases[:3], *phases[max(3, len(phases) - 1):])
        ))  # fmt: skip
    tracker.event(
        "start", parameters=counts.total, active_parameters=counts.active, flops_per_step=flops, world_size=world.size,
        data_parallel=mesh.size("dp"), tensor_parallel=mesh.size("tp"), context_parallel=mesh.size("cp"), pipeline_parallel=mesh.size("pp"),
        expert_parallel=sorted(mesh.experts), zero_stage=mesh.zero_stage, experts=experts, train_iterations=total, global_batch_size=batch,
    )  # fmt: skip


def kind_of_layout(c: RunConfig, mesh: mpu.ParallelMesh) -> str:
    """As the log names it: `dp 2, tp 2 with sequence parallelism, cp 2, ZeRO 1 in 2 replicas, ep 4`."""
    words = [f"dp {mesh.size('dp')}", f"tp {mesh.size('tp')}"]
    if c.parallel.sequence_parallel and mesh.size("tp") > 1:
        words[-1] += " with sequence parallelism"
    if mesh.size("cp") > 1:
        words.append(f"cp {mesh.size('cp')}")
    if mesh.size("pp") > 1:
        words.append(f"pp {mesh.size('pp')}")
    replicas = c.parallel.num_distributed_optimizer_instances
    words.append(f"ZeRO {mesh.zero_stage}" + (f" in {replicas} replicas" if replicas > 1 else ""))
    etp = f" x etp {c.parallel.etp}" if c.parallel.etp > 1 else ""
    return ", ".join(words + ([f"ep {ep}{etp}" for ep in sorted(mesh.experts)] or ["no experts"]))


def dispatchers(model: GPT | PipelinedGPT, mesh: mpu.ParallelMesh) -> dict[int, tuple[int, str]]:
    """Experts and dispatcher of each MoE layer, those of other pipeline stages too. Collective."""
    here = {moe.layer: (moe.num_experts, moe.dispatcher.name) for moe in moe_layers(model)}
    if mesh.size("pp") == 1:
        return here
    parts: list[dict[int, tuple[int, str]]] = [{}] * mesh.size("pp")
    dist.all_gather_object(parts, here, group=mesh.group("pp"))
    return {layer: told for part in parts for layer, told in part.items()}


def kind_of_experts(c: RunConfig) -> str:
    """As the log names them: `width 512, residual (sum)`."""
    m, words = c.moe, [f"width {c.moe.expert_ffn_size(c.model.ffn_size)}"]
    if m.moe_latent_size:
        words.append(f"latent {m.moe_latent_size}")
    if m.residual:
        words.append(f"residual ({m.residual})")
    if m.moe_shared_expert_intermediate_size:
        words.append(f"{'gated ' if m.moe_shared_expert_gate else ''}shared expert of width {m.moe_shared_expert_intermediate_size}")
    return ", ".join(words)


def claim_directory(directory: Path, prepared: Prepared, world: World, command: list[str]) -> DirectoryLock | None:
    """Lock the run directory, take away the marker of the run before, write config.json. Collective; rank 0 has the lock."""
    held: list[DirectoryLock] = []

    def claim() -> None:
        held.append(DirectoryLock(directory))
        (directory / EXIT_MARKER).unlink(missing_ok=True)
        write_config(directory, prepared, command)

    Ranks(world.cpu_group).first(f"claiming {directory}", claim)
    return held[0] if held else None


def write_config(directory: Path, prepared: Prepared, command: list[str]) -> None:
    """config.json of the run directory: the resolved configuration, versions and the command line."""
    content = describe(prepared, Progress()) | {"command": command, "world_size": int(os.environ.get("WORLD_SIZE", "1"))}
    del content["progress"]
    write_json(directory / "config.json", content)


def write_exit_marker(run: Run, reason: str) -> None:
    """The last file that a run writes. While it is there, the run has ended as it should and its last step is saved.

    torchrun's exit code is 1 after a signal, whatever its workers did: a launcher looks here.
    """
    content = {
        "reason": reason,
        "is_done": reason == "done",
        "iteration": run.progress.iteration,
        "train_iterations": run.total_iterations,
        "checkpoint": iteration_name(run.progress.iteration),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(Path(run.config.checkpoint.save) / EXIT_MARKER, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; of a process that was killed here, the next one replaces the temporary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_through(temporary, json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def next_commands(run: Run) -> str:
    """The last words of a run: what to type next, exactly."""
    c = run.config
    if not c.checkpoint.save:
        return (
            "Done. Next, keep what you train and read what you have:\n"
            "  python pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20 --save runs/tiny --load runs/tiny\n"
            "  torchrun --nproc-per-node 2 pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20 --moe-expert-parallel-size 2\n"
            "  bash scripts/quickstart.sh        # real text: tokenizer, data, training, plot, sample"
        )
    save_dir, step, last = c.checkpoint.save, run.progress.iteration, run.total_iterations
    prompt = "def main" if c.tokenizer.kind not in (None, "NullTokenizer") else "5 17 2"  # ids where there is no text
    return (
        f"{'Done' if step >= last else f'Stopped at iteration {step} of {last}'}. Everything is in {save_dir}. Next:\n"
        f"  python tools/plot_run.py --run {save_dir}\n"
        f"  python tools/generate_text.py --load {save_dir} --prompt '{prompt}'\n"
        f"  add --load {save_dir}{' and a larger --train-iters' if step >= last else ''} to the same command to train on"
    )
