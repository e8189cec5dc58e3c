"""Which checkpoint to load: the newest that verifies, or exactly the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.files import (
    CheckpointError,
    Manifest,
    file_problems,
    iteration_name,
    iterations_in,
    other_format,
    read_manifest,
    tracker_note,
)
from megatron_moe.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Found:
    """A checkpoint that may be loaded, and what a person should know about how it was chosen."""

    path: Path
    iteration: int
    meta: dict[str, Any]
    notes: tuple[str, ...]


def find_checkpoint(directory: str | Path, step: int | None = None, verify: str = "crc", process_group=None) -> Found:
    """The newest checkpoint in `directory` that verifies; with `step` that one or an error. The same answer on every rank.

    1. Rank 0 lists the directories. The tracker file is only compared with them.
    2. Newest first: rank 0 reads the manifest, then every rank checks its share of the files.
    3. A damaged checkpoint becomes a note and the next older one is tried, unless `step` was given.
    """
    directory, ranks, notes = Path(directory), Ranks(process_group), []
    candidates = ranks.first("listing the checkpoints", lambda: _candidates(directory, step))
    if step is None and (note := ranks.first("reading the tracker", lambda: tracker_note(directory, candidates[0]))):
        notes.append(note)
    for index, iteration in enumerate(candidates):
        path = directory / iteration_name(iteration)
        manifest, problems = _verified(path, verify, ranks)
        if not problems:
            return Found(path, iteration, manifest.meta, tuple(notes))
        older = candidates[index + 1 :]
        notes += [f"{problem}{_consequence(iteration, older, step)}" for problem in problems[:10]]
    raise CheckpointError("\n".join([f"no checkpoint in {directory} can be loaded:", *notes]))


def _candidates(directory: Path, step: int | None) -> list[int]:
    """Iterations to try, in this order; an error when there is nothing to try."""
    present = iterations_in(directory)
    if not present:
        why = other_format(directory) or f"it has no directory named {iteration_name(100)} or alike"
        raise CheckpointError(f"no checkpoint in {directory}: {why}")
    if step is None:
        return present[::-1]
    if step not in present:
        raise CheckpointError(f"no checkpoint of iteration {step} in {directory}; there are {', '.join(map(str, present))}")
    return [step]


def _verified(path: Path, verify: str, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    """The manifest and the problems of one checkpoint. Every rank reads a part of the files."""
    try:
        manifest = ranks.first(f"reading {path.name}", lambda: read_manifest(path))
    except CheckpointError as error:
        return None, [str(error)]
    mine = list(manifest.files)[ranks.rank :: ranks.size]
    shares = ranks.all(f"verifying {path.name}", lambda: file_problems(path, manifest.files, verify, mine))
    return manifest, [problem for share in shares for problem in share]


def _consequence(iteration: int, older: list[int], step: int | None) -> str:
    if step is not None:
        return ""
    insist = f"pass --ckpt-step {iteration} --ckpt-verify off to insist"
    return f"; falling back to {iteration_name(older[0])}; {insist}" if older else f"; {insist}"
