"""What is wrong with --load and --save, before torch is imported and anything is started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.compare import architecture_differences
from megatron_moe.checkpoint.files import CheckpointError, iteration_name, iterations_in, read_manifest
from megatron_moe.config.output import CheckpointConfig


def checkpoint_problems(config: CheckpointConfig, architecture: dict[str, Any]) -> list[str]:
    """One sentence per mistake in the checkpoint flags; `architecture` is what the run is about to build."""
    problems = list(load_problems(config, architecture)) if config.load else []
    return problems + ([*_save_problems(Path(config.save)), *_branch_problems(config)] if config.save else [])


def load_problems(config: CheckpointConfig, architecture: dict[str, Any]) -> Iterator[str]:
    """The part about --load. Only reads."""
    directory = Path(config.load)
    present = iterations_in(directory)
    if config.ckpt_step is not None and config.ckpt_step not in present:
        yield f"--ckpt-step {config.ckpt_step}: {directory} has {_known(present)}"
    elif not present and not _is_same(config.load, config.save):
        yield f"--load {directory}: {_why_empty(directory)}"
    elif not present and config.exit_on_missing_checkpoint:
        yield f"--load {directory}: there is no checkpoint in it, and --exit-on-missing-checkpoint wants one"
    elif present:
        yield from _architecture_problems(directory, [config.ckpt_step] if config.ckpt_step is not None else present[::-1], architecture)


def _known(present: list[int]) -> str:
    return f"iterations {', '.join(map(str, present))}" if present else "no checkpoint"


def _why_empty(directory: Path) -> str:
    if (directory / "manifest.json").exists():
        step = directory.name.removeprefix("iter_").lstrip("0") or "0"
        return f"this is one checkpoint; give --load {directory.parent} --ckpt-step {step}"
    if not directory.is_dir():
        return "there is no such directory; only the directory of --save may be new"
    return f"there is no checkpoint in it (no {iteration_name(100)} or alike); only the directory of --save may be empty"


def _architecture_problems(directory: Path, iterations: list[int], architecture: dict[str, Any]) -> Iterator[str]:
    """Of the first checkpoint whose manifest can be read: that is the one that will be loaded."""
    unreadable = []
    for iteration in iterations:
        try:
            meta = read_manifest(directory / iteration_name(iteration)).meta
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        if table := architecture_differences(meta.get("architecture", architecture), architecture):
            head = f"--load {directory}: {iteration_name(iteration)} is of another architecture"
            yield "\n    ".join([head, *table])
        return
    yield f"--load {directory}: no checkpoint can be read: {'; '.join(unreadable[:3])}"


def _save_problems(directory: Path) -> Iterator[str]:
    """Try it: make the directory and a file in it, then remove whatever was not there before."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        yield f"--save {directory}: cannot write there ({error.strerror or error}); choose another directory"
    finally:
        for path in made:  # deepest first; one that another process has filled meanwhile stays
            try:
                path.rmdir()
            except OSError:
                break


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
