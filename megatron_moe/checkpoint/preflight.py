"""What is wrong with --load and --save, before torch is imported and anything is started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.compare import architecture_differences
from megatron_moe.checkpoint.files import TRACKER, CheckpointError, iteration_name, iterations_in, read_manifest
from megatron_moe.config.output import CheckpointConfig


def checkpoint_problems(config: CheckpointConfig, architecture: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """One sentence per mistake in the checkpoint flags.

    `architecture` is what the run is about to build, `settings` its whole configuration by groups.
    """
    problems = list(_load_problems(config, architecture, settings)) if config.load else []
    return problems + ([*_save_problems(Path(config.save)), *_branch_problems(config)] if config.save else [])


def _load_problems(config: CheckpointConfig, architecture: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    directory = Path(config.load)
    present = iterations_in(directory)
    if config.ckpt_step is not None and config.ckpt_step not in present:
        yield f"--ckpt-step {config.ckpt_step}: {directory} has {_known(present)}"
    elif not present and not _is_same(config.load, config.save):
        yield f"--load {directory}: {_why_empty(directory)}"
    elif not present and (tracker := directory / TRACKER).exists():
        yield (
            f"--load {directory}: {TRACKER} says {tracker.read_text(errors='replace')[:40]!r}, but there is no checkpoint in it; "
            "bring the checkpoints back, or delete that file to start from nothing"
        )
    elif present:
        yield from _fit_problems(config, present[::-1], architecture, settings)


def _known(present: list[int]) -> str:
    return f"iterations {', '.join(map(str, present))}" if present else "no checkpoint"


def _why_empty(directory: Path) -> str:
    if (directory / "manifest.json").exists():
        step = directory.name.removeprefix("iter_").lstrip("0") or "0"
        return f"this is one checkpoint; give --load {directory.parent} --ckpt-step {step}"
    if not directory.is_dir():
        return "there is no such directory; only the directory of --save may be new"
    return f"there is no checkpoint in it (no {iteration_name(100)} or alike); only the directory of --save may be empty"


def _fit_problems(config: CheckpointConfig, newest_first: list[int], architecture: dict, settings: dict) -> Iterator[str]:
    """Of the first checkpoint whose manifest can be read: that is the one that will be loaded."""
    directory, unreadable = Path(config.load), []
    for iteration in newest_first if config.ckpt_step is None else [config.ckpt_step]:
        try:
            meta = read_manifest(directory / iteration_name(iteration)).meta
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        if table := architecture_differences(meta.get("architecture", architecture), architecture):
            head = f"--load {directory}: {iteration_name(iteration)} is of another architecture"
            yield "\n    ".join([head, *table])
        with_optimizer = not (config.finetune or config.no_load_optim)
        if table := architecture_differences(*(_state_settings(s, with_optimizer) for s in (meta.get("config") or settings, settings))):
            remedy = "give them again" + (", or --no-load-optim where it is only the optimizer" if with_optimizer else "")
            yield "\n    ".join([f"--load {directory}: {iteration_name(iteration)} was saved with other settings; {remedy}", *table])
        return
    yield f"--load {directory}: no checkpoint can be read: {'; '.join(unreadable[:3])}"


def _state_settings(settings: dict[str, Any], with_optimizer: bool) -> dict[str, Any]:
    """What the tensors of a checkpoint depend on besides the architecture."""
    dtype = {"params_dtype": settings.get("training", {}).get("params_dtype")}
    return dtype | ({"optimizer": settings.get("optimizer", {}).get("optimizer")} if with_optimizer else {})


def _save_problems(directory: Path) -> Iterator[str]:
    """Try it, with a file that never has a name. Nothing is made: every rank asks, and one would remove what another just used."""
    try:
        nearest = next(path for path in (directory, *directory.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        yield f"--save {directory}: cannot write there ({error.strerror or error}); choose another directory"


def _branch_problems(config: CheckpointConfig) -> Iterator[str]:
    """A directory holds one run. Checkpoints left from another, or ahead of where this one starts, would win the next resume."""
    present = iterations_in(Path(config.save))
    goes_on = _is_same(config.load or "", config.save) and not config.finetune and config.ckpt_step in (None, *present[-1:])
    if present and not goes_on:
        yield (
            f"--save {config.save} already holds {_known(present)}, and this run does not go on from the newest ({present[-1]}): "
            f"add --load {config.save} (without --ckpt-step and --finetune) to go on, or choose another --save"
        )


def _is_same(a: str, b: str | None) -> bool:
    return b is not None and os.path.realpath(a) == os.path.realpath(b)
