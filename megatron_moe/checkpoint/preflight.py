"""What is wrong with --load and --save, before torch is imported and anything is started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.compare import architecture_differences
from megatron_moe.checkpoint.files import (
    TRACKER,
    CheckpointError,
    Manifest,
    iteration_name,
    iterations_in,
    other_format,
    read_best,
    read_manifest,
    run_directory,
)
from megatron_moe.config.data import DataConfig
from megatron_moe.config.flags import fields_of
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.output import CheckpointConfig
from megatron_moe.config.run import RunConfig

# What else a run that goes on must have in common with its checkpoint.
ORDER_SETTINGS = ("data_order", "train_data_exact_num_epochs")


def checkpoint_problems(run: RunConfig, architecture: dict[str, Any]) -> list[str]:
    """One sentence per mistake in the checkpoint flags; `architecture` is what the run is about to build.

    What --moe-use-upcycling loads is another model: `dense_problems` looks at it.
    """
    config, is_upcycled = run.checkpoint, run.upcycling.moe_use_upcycling
    problems = list(load_problems(run, architecture)) if config.load and not is_upcycled else []
    if config.save:
        problems += [*_save_problems(Path(config.save)), *_branch_problems(config, is_upcycled), *_best_problems(config)]
    return problems


def load_problems(run: RunConfig, architecture: dict[str, Any]) -> Iterator[str]:
    """The part about --load. Only reads."""
    config = run.checkpoint
    try:
        directory, step = run_directory(config.load, config.ckpt_step)
    except ValueError as error:
        yield str(error)
        return
    present = iterations_in(directory)
    if step is not None and step not in present:
        asked = f"--ckpt-step {step}: {directory}" if config.ckpt_step is not None else f"--load {config.load}: {directory}"
        yield f"{asked} has {_known(present)}"
    elif not present and config.exit_on_missing_checkpoint:
        yield f"--load {directory}: there is no checkpoint in it, and --exit-on-missing-checkpoint wants one"
    elif not present and not _is_same(config.load, config.save):
        yield f"--load {directory}: {_why_empty(directory)}"
    elif not present and (tracker := directory / TRACKER).exists():
        yield (
            f"--load {directory}: {TRACKER} says {tracker.read_text(errors='replace')[:40]!r}, but there is no checkpoint in it; "
            "bring the checkpoints back, or delete that file to start from nothing"
        )
    elif present:
        yield from _content_problems(run, directory, [step] if step is not None else present[::-1], architecture)


def _known(present: list[int]) -> str:
    return f"iterations {', '.join(map(str, present))}" if present else "no checkpoint"


def _why_empty(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such directory; only the directory of --save may be new"
    return (
        other_format(directory)
        or f"there is no checkpoint in it (no {iteration_name(100)} or alike); only the directory of --save may be empty"
    )


def _content_problems(run: RunConfig, directory: Path, iterations: list[int], architecture: dict[str, Any]) -> Iterator[str]:
    """Of the first checkpoint whose manifest can be read: that is the one that will be loaded."""
    unreadable = []
    for iteration in iterations:
        try:
            manifest = read_manifest(directory / iteration_name(iteration))
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        where = f"--load {directory}: {iteration_name(iteration)}"
        then, now = manifest.meta.get("architecture", architecture), architecture
        if run.checkpoint.finetune:  # weights are all that it takes: modules that only one of them has are drawn, or left out
            then, now = without_mtp(then), without_mtp(now)
        if table := architecture_differences(then, now):
            yield "\n    ".join([f"{where} is of another architecture", *table, *_mtp_remedy(then, now)])
        saved = manifest.meta.get("config") or run.to_dict()
        yield from _state_problems(where, run, saved, manifest)
        if not run.checkpoint.finetune:
            yield from _order_problems(where, run, saved)
        return
    yield f"--load {directory}: no checkpoint can be read: {'; '.join(unreadable[:3])}"


def without_mtp(architecture: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in architecture.items() if name != "mtp_num_layers"}


def _mtp_remedy(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Where multi-token prediction is all that differs: which tensors that is about, and what takes the others."""
    before, wanted = (a.get("mtp_num_layers", 0) for a in (then, now))
    if without_mtp(then) == without_mtp(now) and before != wanted:
        names = ", ".join(f"model.mtp.{n}.*" for n in range(min(before, wanted) + 1, max(before, wanted) + 1))
        missing = f"the checkpoint has no {names}" if wanted > before else f"this run has no {names}"
        yield f"{missing}; give --mtp-num-layers {before} to go on, or --finetune to start a run of its own from the weights they share"


def _state_problems(where: str, run: RunConfig, saved: dict[str, Any], manifest: Manifest) -> Iterator[str]:
    """What the tensors depend on besides the architecture, and whether those of the optimizer are there."""
    wants_optimizer = not (run.checkpoint.finetune or run.checkpoint.no_load_optim)
    if table := architecture_differences(*(_state_settings(s, wants_optimizer) for s in (saved, run.to_dict()))):
        remedy = "give them again" + (", or --no-load-optim where it is only the optimizer" if wants_optimizer else "")
        yield "\n    ".join([f"{where} was saved with other settings; {remedy}", *table])
    if wants_optimizer and run.optimizer.has_state and manifest.tensors and not any(n.startswith("optimizer.") for n in manifest.tensors):
        yield (
            f"{where} holds weights without optimizer state (saved with --no-save-optim, or converted without --include-optimizer); "
            "add --no-load-optim to go on from its iteration and place in the data with a fresh optimizer, or --finetune to start at "
            "iteration 0"
        )


def _state_settings(settings: dict[str, Any], with_optimizer: bool) -> dict[str, Any]:
    training = settings.get("training", {})
    dtype = {"params_dtype": training.get("params_dtype")}
    if training.get("fp16_master_weights_and_grads"):  # named only where it is used: older checkpoints do not know it
        dtype["fp16_master_weights_and_grads"] = True
    return dtype | ({"optimizer": settings.get("optimizer", {}).get("optimizer")} if with_optimizer else {})


def _order_problems(where: str, run: RunConfig, saved: dict[str, Any]) -> Iterator[str]:
    """Another order would repeat some of the samples that were consumed and leave out others."""
    for field in fields_of(DataConfig):
        then = saved.get("data", {}).get(field.name, field.default)  # a checkpoint from before there was this flag
        now = getattr(run.data, field.name)
        if field.name in ORDER_SETTINGS and now != then:
            wanted = f"give {field.option} {then}" if then is not None else "leave it out"
            yield (
                f"{where} has read its data with {field.option} {_shown(then)} and this run has {_shown(now)}: {wanted}, "
                f"or start anew from its weights with --finetune and another --save"
            )


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


# ---------------------------------------------------------------- the teacher


def teacher_problems(run: RunConfig, architecture: dict[str, Any], fingerprint: str | None) -> Iterator[str]:
    """What keeps --load-teacher from being the teacher that the flags describe, whose `architecture` this is. Only reads.

    fingerprint: of the run's tokenizer: a teacher of another vocabulary would teach nonsense.
    """
    given = run.distillation.load_teacher
    directory, step = run_directory(given, None)
    present = iterations_in(directory)
    if not present or step not in (None, *present):
        why = _known(present) if present else _why_missing(directory)
        yield f"--load-teacher {given}: {why}"
        return
    iteration = step if step is not None else present[-1]
    where = f"--load-teacher {given}: {iteration_name(iteration)}"
    try:
        meta = read_manifest(directory / iteration_name(iteration)).meta
    except CheckpointError as error:
        yield f"--load-teacher {given}: {error}"
        return
    if table := architecture_differences(without_mtp(meta.get("architecture", architecture)), without_mtp(architecture)):
        remedy = "see --num-layers-teacher, --num-experts-teacher, --hidden-size-teacher and --num-attention-heads-teacher"
        yield "\n    ".join([f"{where} is not the teacher of these flags; {remedy}; all else it shares with the student", *table])
    saved = meta.get("config", {})
    then, now = ({"params_dtype": s.get("training", {}).get("params_dtype")} for s in (saved or run.to_dict(), run.to_dict()))
    if saved and run.teacher().moe.has_experts:
        then, now = then | _routing_settings(saved["moe"]), now | _routing_settings(run.to_dict()["moe"])
    if table := architecture_differences(then, now):
        yield "\n    ".join([f"{where} was trained with settings that the teacher shares with the student; make them equal", *table])
    made_by = meta.get("tokenizer", {}).get("fingerprint")
    if fingerprint and made_by and made_by != fingerprint:
        yield f"{where} was trained with another tokenizer (fingerprint {made_by}) than this run has (fingerprint {fingerprint})"


def _why_missing(directory: Path, of: str = "teacher") -> str:
    if not directory.is_dir():
        return f"there is no such directory; give the run directory (--save) of the {of}'s training"
    return other_format(directory) or f"there is no checkpoint in it (no {iteration_name(100)} or alike)"


# ---------------------------------------------------------------- the dense model of --moe-use-upcycling


def dense_problems(run: RunConfig, architecture: dict[str, Any], fingerprint: str | None) -> Iterator[str]:
    """What keeps --load from being the dense model that the experts are made of, whose `architecture` this is. Only reads."""
    given, step = run.checkpoint.load, run.checkpoint.ckpt_step
    try:
        directory, step = run_directory(given, step)
    except ValueError as error:
        yield str(error)
        return
    present = iterations_in(directory)
    if not present or step not in (None, *present):
        why = _known(present) if present else _why_missing(directory, "dense model")
        yield f"--load {given}: {why} (--moe-use-upcycling)"
        return
    where = f"--load {given}: {iteration_name(step if step is not None else present[-1])}"
    try:
        meta = read_manifest(directory / iteration_name(step if step is not None else present[-1])).meta
    except CheckpointError as error:
        yield f"--load {given}: {error}"
        return
    saved = meta.get("architecture", architecture)
    if max(saved.get("experts_per_layer", [1])) > 1:
        yield (f"{where} has experts already ({' '.join(map(str, saved['experts_per_layer']))} per layer), and --moe-use-upcycling starts "
               "from a dense model; drop the flag to go on with these experts, or change their number with tools/edit_experts.py")  # fmt: skip
    elif table := architecture_differences(saved, architecture):
        yield "\n    ".join([f"{where} is not the dense model of these flags; only what is about experts may differ", *table])
    then, now = ({"params_dtype": s.get("training", {}).get("params_dtype")} for s in (meta.get("config") or run.to_dict(), run.to_dict()))
    if table := architecture_differences(then, now):
        yield "\n    ".join([f"{where} was trained with another type of parameters; make them equal", *table])
    made_by = meta.get("tokenizer", {}).get("fingerprint")
    if fingerprint and made_by and made_by != fingerprint:
        yield f"{where} was trained with another tokenizer (fingerprint {made_by}) than this run has (fingerprint {fingerprint})"


def _routing_settings(moe: dict[str, Any]) -> dict[str, Any]:
    """What decides where a token goes and with what weight, and leaves no trace in the shapes of the weights."""
    names = ["topk", *(s.name for s in fields_of(MoEConfig) if s.name.startswith("moe_router_"))]
    defaults = {s.name: s.default for s in fields_of(MoEConfig)}  # for a checkpoint from before there was a flag
    of_training = ("moe_router_z_loss_coeff", "moe_router_bias_update_rate")
    return {name: moe.get(name, defaults[name]) for name in names if name not in of_training}


def _save_problems(directory: Path) -> Iterator[str]:
    """Try it, with a file that never has a name. Nothing is made: every rank asks, and one would remove what another just used."""
    try:
        nearest = next(path for path in (directory, *directory.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        yield f"--save {directory}: cannot write there ({error.strerror or error}); choose another directory"


def _branch_problems(config: CheckpointConfig, is_upcycled: bool) -> Iterator[str]:
    """A directory holds one run. Checkpoints left from another, or ahead of where this one starts, would win the next resume."""
    present = iterations_in(Path(config.save))
    goes_on = _is_same(config.load or "", config.save) and not (config.finetune or config.reset_iteration or is_upcycled)
    goes_on = goes_on and config.ckpt_step in (None, *present[-1:])
    without = (", --moe-use-upcycling" + (", --load-hf" if config.load_hf else "")) if is_upcycled else ""
    if present and not goes_on:
        yield (
            f"--save {config.save} already holds {_known(present)}, and this run does not go on from the newest ({present[-1]}): "
            f"add --load {config.save} (without --ckpt-step, --finetune{without} and --reset-iteration) to go on, or choose another --save"
        )


def _best_problems(config: CheckpointConfig) -> Iterator[str]:
    try:
        read_best(Path(config.save))
    except CheckpointError as error:
        if config.save_best:
            yield f"--save-best: {error}"


def _is_same(a: str, b: str | None) -> bool:
    return b is not None and os.path.realpath(a) == os.path.realpath(b)
