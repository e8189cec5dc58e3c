"""Our run directories: iter_0000100/, read whatever layout wrote it, written so that any layout reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.files import (
    CheckpointError,
    Manifest,
    file_problems,
    iteration_name,
    iterations_in,
    problems_in,
    read_manifest,
    run_directory,
    write_through,
)
from megatron_moe.config.flags import ConfigError
from megatron_moe.conversion.source import Selection, Tensors, size_of

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.journal import Journal

SOURCE_OPTIONS = TARGET_OPTIONS = ()
RESUMES = True
AT_ONCE = 256 << 20  # bytes read together: each reading parses the metadata of the whole checkpoint anew


def looks_like(directory: Path) -> bool:
    return bool(iterations_in(directory)) or (directory / "manifest.json").is_file()


class NativeSource:
    """One iteration of a run directory."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.iteration, self._files = path, manifest.iteration, manifest.files
        self.meta: dict[str, Any] = {"world_size": manifest.world_size} | manifest.meta
        self.tensors: Tensors = manifest.tensors

    has_checksums = True
    notes = ()

    def files(self) -> dict[str, int]:
        return {name: entry["size"] for name, entry in self._files.items()}

    def file_problems(self, verify: str) -> list[str]:
        return file_problems(self.path, self._files, verify)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        import torch

        from megatron_moe.checkpoint.load import load_tensors
        from megatron_moe.checkpoint.ranks import ALONE

        for group in _groups(names, self.tensors):
            tensors = {n: torch.empty(self.tensors[n]["shape"], dtype=getattr(torch, self.tensors[n]["dtype"])) for n in group}
            load_tensors(self.path, tensors, complete=(), process_group=ALONE)  # other ranks may want other tensors
            for name in group:
                yield name, tensors[name]


def _groups(names: Sequence[str], tensors: Tensors) -> Iterator[list[str]]:
    """Consecutive names whose tensors fit into AT_ONCE together, or a single larger one."""
    group: list[str] = []
    size = 0
    for name in names:
        if group and size + size_of(tensors[name]) > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += size_of(tensors[name])
    if group:
        yield group


def open_source(directory: Path, iteration: int | None = None) -> NativeSource:
    """The checkpoint of `iteration`, or the newest. Never falls back to an older one: what is converted must be what was meant."""
    try:
        directory, iteration = run_directory(directory, iteration)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    present = iterations_in(directory)
    if not present:
        raise ConfigError([f"{directory}: no run directory (looked for {iteration_name(100)} or alike with a manifest.json)"])
    if iteration is None:
        iteration = present[-1]
    elif iteration not in present:
        raise ConfigError([f"{directory}: no checkpoint of iteration {iteration}; there are {', '.join(map(str, present))}"])
    path = directory / iteration_name(iteration)
    try:
        return NativeSource(path, read_manifest(path))
    except CheckpointError as error:
        raise ConfigError([f"{error}{other_iterations(path)}"]) from None


def other_iterations(damaged: Path) -> str:
    """`; --iteration 40 is intact`: the newest other checkpoint whose files have the right sizes, for an error message."""
    directory = damaged.parent
    others = [i for i in iterations_in(directory)[::-1] if directory / iteration_name(i) != damaged]
    intact = next((i for i in others if not problems_in(directory / iteration_name(i), "size")), None)
    return "" if intact is None else f"; --iteration {intact} has all its files"


def write(selection: Selection, directory: Path, journal: Journal | None = None) -> None:
    """A run directory with this one checkpoint. Tensors are read one at a time, each into a file of its own."""
    from megatron_moe.checkpoint.one_by_one import save_one_by_one

    source, folder = selection.source, iteration_name(selection.source.iteration)
    finished = {}
    for file, names in journal.finished.items() if journal else ():
        finished[Path(file).name] = names[0], journal.entries[file]
        selection.credit(names)

    def on_file(file: str, name: str, entry: dict[str, int]) -> None:
        if journal is not None:
            journal.finish(f"{folder}/{file}", entry, [name])

    fetch = lambda name: next(selection.read([name]))[1]  # noqa: E731
    try:
        save_one_by_one(directory, source.iteration, selection.tensors, source.meta, fetch, finished, on_file)
    except CheckpointError as error:
        if (interruption := _interruption(error)) is not None:
            raise interruption from None
        raise
    resolved = {name: value for name, value in source.meta.items() if name != "progress"}
    write_through(directory / "config.json", json.dumps(resolved, indent=2) + "\n")


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """torch reports Ctrl-C during a save as one of the save's failures."""
    while error is not None:
        for cause, _ in getattr(error, "failures", {}).values():
            if isinstance(cause, KeyboardInterrupt):
                return cause
        error = error.__cause__
    return None
