"""One conversion: written beside the target, looked at again, and only then given its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_moe.checkpoint.files import CheckpointError, best_directory, sync_directory
from megatron_moe.checkpoint.lock import DirectoryLock
from megatron_moe.config.flags import ConfigError
from megatron_moe.conversion import flat, hf, megatron_deepspeed, native
from megatron_moe.conversion.journal import LOCK, SUFFIX, Journal, partial_directory
from megatron_moe.conversion.source import Selection, Source, human_bytes

FORMATS: dict[str, ModuleType] = {"native": native, "hf": hf, "safetensors": flat, "megatron-deepspeed": megatron_deepspeed}
HEADROOM = 8 << 20  # bytes beyond the tensors: headers, manifest, configuration


class ConversionError(RuntimeError):
    """What was written is not what was meant. `lines`: the tensors, or the counts, that are wrong."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        super().__init__("\n".join(lines))


def format_of(directory: Path) -> str | None:
    """The name of the format a directory looks like."""
    directory = named(directory)
    return next((name for name, module in FORMATS.items() if module.looks_like(directory)), None)


def named(directory: Path) -> Path:
    """With `best` for the checkpoint that it stands for."""
    try:
        return best_directory(directory)
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def open_source(format_name: str, directory: Path, iteration: int | None, **options: Any) -> Source:
    """ConfigError when there is nothing of this format; says so when it is of another. `options`: of the format's SOURCE_OPTIONS."""
    directory = named(directory)
    if not directory.is_dir():
        raise ConfigError([f"{directory}: there is no such directory"])
    found = format_of(directory)
    if found not in (None, format_name) and not FORMATS[format_name].looks_like(directory):
        raise ConfigError([f"{directory} holds {found}, not {format_name}: pass --from {found}"])
    return FORMATS[format_name].open_source(directory, iteration, **options)


def target_problems(directory: Path, size: int) -> list[str]:
    """What is wrong with writing `size` bytes of tensors there."""
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        return [f"--save {directory}: is a file; choose another name"]
    if directory.is_dir() and any(directory.iterdir()):
        return [f"--save {directory}: is not empty, and nothing is overwritten; choose another directory, or delete it"]
    there = next(path for path in directory.parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return [f"--save {directory}: cannot write in {there}; choose another directory"]
    free = shutil.disk_usage(there).free
    if free < size + HEADROOM:
        return [f"--save {directory}: needs {human_bytes(size + HEADROOM)}, the disk has {human_bytes(free)} free; choose another disk"]
    return []


def convert(
    selection: Selection,
    directory: Path,
    write: Callable[[Selection, Path, Journal], None],
    reopen: Callable[[Path], Source],
    check: Callable[[Source], list[str]],
    conversion: dict[str, Any] | None = None,
) -> Source:
    """Write, re-open, check, rename. The name `directory` appears when all that has gone well, or not at all.

    `check` sees the finished files under a temporary name and returns what is wrong with them: ConversionError then. After an error
    nothing is left behind. After an interruption, or a kill, the finished files are, in a directory beside the target: the same
    `conversion` (what is converted, from where, how), started again, goes on from there.
    """
    directory = directory.resolve()
    building = partial_directory(directory)
    lock = _locked(building)
    try:
        journal = Journal(building, conversion or {})
    except ConfigError:  # somebody else's: left as it is
        lock.close()
        raise
    try:
        write(selection, building, journal)
        written = reopen(building)
        if lines := counts(selection, written) or check(written):
            raise ConversionError(lines)
        journal.remove()
        (building / LOCK).unlink()
        sync_directory(building)
        os.rename(building, directory)  # replaces an empty directory
        sync_directory(directory.parent)
    except KeyboardInterrupt:
        if not journal.finished:
            shutil.rmtree(building, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        lock.close()
    return reopen(directory)


def _locked(building: Path) -> DirectoryLock:
    """Against a second conversion into the same target. ConfigError names the process that is at it."""
    try:
        return DirectoryLock(building)
    except CheckpointError as error:
        raise ConfigError([str(error).replace(str(building), str(building).removesuffix(SUFFIX))]) from None


def counts(selection: Selection, written: Source) -> list[str]:
    """Every chosen tensor of the source was read exactly once, and every tensor of the target is one of them."""
    lines = [f"{name}: read {selection.reads[name]} times" for name in selection.tensors if selection.reads[name] != 1]
    lines += [f"{name}: not written" for name in selection.tensors if name not in written.tensors]
    return lines + [f"{name}: written, but not asked for" for name in written.tensors if name not in selection.tensors]


def unfinished(directory: Path) -> Path | None:
    """What an interrupted conversion into `directory` has left behind."""
    partial = partial_directory(directory)
    return partial if partial.exists() else None
