"""Write checkpoints that either exist completely or not at all.

One save, step by step; a process may be killed between any two of them:

1. rank 0 makes `iter_0000100.tmp-1a2b3c4d/` and tells every rank its name, or why that failed;
2. every rank writes its shards there (torch.distributed.checkpoint) and counts them, with their checksum;
3. all ranks report; when one has failed the directory is removed and all raise the same error;
4. rank 0 writes manifest.json, then renames the directory to `iter_0000100`: from here on it exists;
5. the tracker file is replaced, the note of the best one too, and only then are older checkpoints deleted.

Every `ranks.first` and `ranks.all` is a point where all ranks meet, so no rank waits for one that has failed.
background.py takes the same steps while training goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe.checkpoint.files import (
    Best,
    CheckpointError,
    Manifest,
    describe_file,
    iteration_name,
    iterations_in,
    leftovers_in,
    problems_in,
    read_best,
    read_manifest,
    remove_directory,
    sync_directory,
    temporary_name,
    write_best,
    write_manifest,
    write_tracker,
)
from megatron_moe.checkpoint.load import describe, explain
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.writer import CountingWriter, Seen

log = logging.getLogger(__name__)

# thread_count=1: with more, a write that failed in a thread is reported as a success.
WRITER_OPTIONS = {"sync_files": True, "thread_count": 1}
HEADROOM = 1 << 20  # bytes beyond the tensors: zip headers, .metadata, manifest
# What torch's zip writer says when a write comes back short.
DISK_SIGNS = ("No space left", "Disk quota", "unexpected pos", "file write failed")


@dataclass(frozen=True)
class Place:
    """Where a save that has begun writes, and what its manifest will say."""

    building: Path
    final: Path
    iteration: int
    content: dict[str, dict[str, Any]]  # name -> global shape and dtype
    meta: dict[str, Any]
    best: Best | None = None  # what to note of it, if it is that

    @property
    def size(self) -> int:
        return tensors_size(self.content)


class CheckpointManager:
    """Saves into one run directory, on behalf of all ranks of a process group (a gloo group if there is one).

    Every method is called by all ranks. A second job that saves into the same directory would have its unfinished saves swept.
    keep_last: of the checkpoints, the newest so many stay; None keeps all. keep_every: those of its multiples stay whatever their age.
    """

    def __init__(self, directory: str | Path, process_group=None, keep_last: int | None = None, keep_every: int | None = None):
        assert keep_last is None or keep_last >= 1, f"{keep_last=}"
        self.directory = Path(directory)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.ranks = Ranks(process_group)
        self.seen: Seen = {}  # what this rank has written of the save under way
        self.sweep()

    def sweep(self) -> list[Path]:
        """Delete what killed saves have left behind; returns it."""
        return self.ranks.first("sweeping unfinished saves", self._sweep)

    def save(self, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], best: Best | None = None) -> Path:
        """Write one checkpoint; returns its directory, or raises the same CheckpointError on every rank.

        `tensors` is this rank's flat dict of Tensor and DTensor. Names equal on two ranks are the same tensor.
        An intact checkpoint of this iteration with the same tensors is kept as it is: resuming and stopping at once
        asks for that. With other tensors it is an error; a damaged one is moved out of the way. `best` is noted when it is there.
        """
        place = self.begin(iteration, tensors, meta, best)
        if place is not None:
            self.complete(place, lambda: self._write(place.building, tensors, place.size))
        return self.directory / iteration_name(iteration)

    def begin(self, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], best: Best | None = None) -> Place | None:
        """Agree on what is saved, and make the directory to write into. None where this checkpoint is there already."""
        final = self.directory / iteration_name(iteration)
        self.seen.clear()
        content = self._content(tensors)
        if self.ranks.first(f"saving {final.name}", lambda: self._is_saved(final, content)):
            if best is not None:
                self.ranks.first(f"noting {final.name} as the best", lambda: write_best(self.directory, best))
            return None
        building = self.ranks.first(f"saving {final.name}", lambda: self._begin(final, tensors_size(content), meta))
        place = Place(building, final, iteration, content, meta, best)
        with self._removed_on_failure(place):
            self.ranks.all(f"saving {final.name}", lambda: _check_visible(building))
        return place

    def complete(self, place: Place, write: Callable[[], None]) -> None:
        """`write()` this rank's shards; then check them, publish the checkpoint and delete older ones."""
        with self._removed_on_failure(place):
            self.ranks.all(f"saving {place.final.name}", write)
            written = self.ranks.all(f"checking {place.final.name}", lambda: self._written(place.building))
            files = {name: entry for part in written for name, entry in part.items()}
            manifest = Manifest(place.iteration, self.ranks.size, place.content, files, place.meta)
            self.ranks.first(f"saving {place.final.name}", lambda: self._commit(place, manifest))
        self.ranks.first("deleting older checkpoints", lambda: self._prune(place.iteration))

    @contextmanager
    def _removed_on_failure(self, place: Place) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if self.ranks.rank == 0:
                shutil.rmtree(place.building, ignore_errors=True)
            raise

    # ------------------------------------------------------------ steps; those without "every rank" run on rank 0

    def _sweep(self) -> list[Path]:
        swept = leftovers_in(self.directory)
        for path in swept:
            log.warning("removing %s, left behind by a save that was interrupted", path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return swept

    def _content(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Every rank: global shape and dtype of the tensors of all ranks, each name once."""

        def mine() -> dict[str, dict[str, Any]]:
            for name, tensor in tensors.items():
                if not isinstance(tensor, Tensor):
                    raise CheckpointError(
                        f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors, everything else goes into meta"
                    )
            return describe(tensors)

        content: dict[str, dict[str, Any]] = {}
        for rank, part in enumerate(self.ranks.all("collecting the tensors", mine)):
            for name, entry in part.items():
                if content.setdefault(name, entry) != entry:  # every rank has the same parts, so all raise
                    raise CheckpointError(f"{name} is {entry} on rank {rank} and {content[name]} on a lower rank")
        return content

    def _is_saved(self, final: Path, content: dict[str, dict[str, Any]]) -> bool:
        """Whether this checkpoint is there already. Frees the name when what is there is damaged."""
        if not final.exists():
            return False
        if problems := problems_in(final, "crc"):
            aside = final.with_name(temporary_name(final.name, "damaged"))
            log.warning("%s; moved to %s to save this iteration again", problems[0], aside.name)
            os.rename(final, aside)
            return False
        if read_manifest(final).tensors != content:
            raise CheckpointError(f"{final} holds a checkpoint of other tensors and is not overwritten; save into another directory")
        log.warning("%s exists and is intact: kept, not written again; to replace it, delete it or save into another directory", final)
        return True

    def _begin(self, final: Path, size: int, meta: dict[str, Any]) -> Path:
        """Check what can be checked early, and make the directory to write into."""
        json.dumps(meta)
        self.directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.directory).free < size:
            raise CheckpointError(disk_message(self.directory, size))
        building = self.directory / temporary_name(final.name)
        building.mkdir()
        return building

    def _write(self, building: Path, tensors: Mapping[str, Tensor], size: int) -> None:
        """Every rank: write the shards."""
        writer = CountingWriter(building, self.seen, **WRITER_OPTIONS)
        with warnings.catch_warnings(), self.explained(size):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                process_group=self.ranks.group,
                no_dist=not self.ranks.is_distributed,
            )

    @contextmanager
    def explained(self, size: int) -> Iterator[None]:
        """torch's failure to write so many bytes, as a CheckpointError with what to do."""
        try:
            yield
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            text = explain(error)
            raise CheckpointError(f"{disk_message(self.directory, size)} ({text})" if any(map(is_disk_error, causes)) else text) from error

    def _written(self, building: Path) -> dict[str, dict[str, int]]:
        """Every rank: size and checksum of the files it wrote. Rank 0 also wrote `.metadata`, under another name, and reads it back."""
        names = sorted(path.name for path in building.glob(f"__{self.ranks.rank}_*"))
        names += [".metadata"] if self.ranks.rank == 0 else []
        return {name: describe_file(building / name, self.seen.get(name)) for name in names}

    def _commit(self, place: Place, manifest: Manifest) -> None:
        write_manifest(place.building, manifest)
        sync_directory(place.building)
        os.rename(place.building, place.final)
        sync_directory(self.directory)
        write_tracker(self.directory, manifest.iteration)
        if place.best is not None:
            write_best(self.directory, place.best)

    def _prune(self, committed: int) -> None:
        """Keep the one just written, the newest intact others, the multiples of keep_every and the best. What is damaged does not count and
        is left for a person."""
        if self.keep_last is None:
            return
        try:
            best = read_best(self.directory)
        except CheckpointError as error:  # who knows which one it was
            log.warning("%s; nothing is deleted before that", error)
            return
        others = [self.directory / iteration_name(i) for i in iterations_in(self.directory) if i != committed]
        intact = [path for path in others if not problems_in(path, "size")]
        for path in intact[: max(len(intact) - (self.keep_last - 1), 0)]:
            iteration = int(path.name.removeprefix("iter_"))
            if (self.keep_every and iteration % self.keep_every == 0) or (best is not None and best.iteration == iteration):
                continue
            try:
                remove_directory(path)
            except OSError as error:  # the new checkpoint is safe; a full disk will be noticed at the next save
                log.warning("cannot delete %s: %s", path, error)


# ---------------------------------------------------------------- helpers


def tensors_size(content: dict[str, dict[str, Any]]) -> int:
    """Bytes on disk: every tensor once, however many ranks hold a copy."""
    return HEADROOM + sum(math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize for entry in content.values())


def _check_visible(building: Path) -> None:
    if not building.is_dir():
        raise CheckpointError(f"{building} was made by rank 0 and is not there; --save must be on a file system that all ranks share")


def is_disk_error(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in DISK_SIGNS)


def disk_message(directory: Path, size: int) -> str:
    free = shutil.disk_usage(directory).free
    return (
        f"the disk of {directory} is full: {free / 1e9:.3f} GB free, the checkpoint needs {size / 1e9:.3f} GB; "
        "delete older checkpoints, or let --keep-last do it"
    )
