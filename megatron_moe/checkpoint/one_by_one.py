"""A checkpoint written tensor by tensor by one process: each in a file of its own, so that memory holds one and an interruption costs one.

Collectives, temporary names and everything else that a save of a training run needs is CheckpointManager's (manager.py).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_moe.checkpoint.files import (
    CheckpointError,
    Manifest,
    describe_file,
    iteration_name,
    sync_directory,
    write_manifest,
    write_tracker,
)
from megatron_moe.checkpoint.load import explain
from megatron_moe.checkpoint.manager import disk_message, is_disk_error, tensors_size
from megatron_moe.checkpoint.writer import CountedFile

Fetch = Callable[[str], Tensor]  # name -> the tensor
Finished = Mapping[str, tuple[str, dict[str, int]]]  # file -> its tensor, its size and CRC-32
OnFile = Callable[[str, str, dict[str, int]], Any]  # file, tensor, size and CRC-32


def save_one_by_one(
    directory: Path, iteration: int, content: dict[str, dict[str, Any]], meta: dict[str, Any], fetch: Fetch,
    finished: Finished, on_file: OnFile,
) -> None:  # fmt: skip
    """The run directory `directory` gets the checkpoint of `iteration`; content: name -> {"shape", "dtype"}, as in the manifest.

    `finished` files, of an attempt before, are taken as they are; `on_file` is told of each new one when it is on the disk. Raises
    CheckpointError; the directory is the caller's to clear away then.
    """
    json.dumps(meta)
    path = directory / iteration_name(iteration)
    path.mkdir(parents=True, exist_ok=True)
    shapes = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"]), device="meta") for name, e in content.items()}
    writer = _OneByOne(path, finished, on_file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(shapes, storage_writer=writer, planner=FetchingPlanner(fetch), no_dist=True)
        except CheckpointException as error:
            is_full = any(is_disk_error(cause) for cause, _ in error.failures.values())
            text = f"{disk_message(directory, tensors_size(content))} ({explain(error)})" if is_full else explain(error)
            raise CheckpointError(text) from error
    files = writer.files | {".metadata": describe_file(path / ".metadata")}
    write_manifest(path, Manifest(iteration, 1, content, files, meta))
    sync_directory(path)
    write_tracker(directory, iteration)


class FetchingPlanner(DefaultSavePlanner):
    """Plans with tensors of the meta device, and asks for the numbers of one when it is written."""

    def __init__(self, fetch: Fetch):
        super().__init__()
        self.fetch = fetch

    def lookup_object(self, index: Any) -> Tensor:
        return self.fetch(index.fqn)


class _OneByOne(FileSystemWriter):
    """torch's files, and its metadata. `files`: size and CRC-32 of each."""

    def __init__(self, path: Path, finished: Finished, on_file: OnFile):
        super().__init__(path, single_file_per_rank=False, sync_files=True, thread_count=1)
        self._directory, self._finished, self._on_file = path, finished, on_file
        self.files: dict[str, dict[str, int]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, item in enumerate(plan.items):
            file, name = f"__0_{number}.distcp", item.index.fqn
            before, entry = self._finished.get(file, (None, {}))
            if before != name:
                written = self._write(file, planner.resolve_data(item))
                entry = describe_file(self._directory / file, written)
                self._on_file(file, name, entry)
            self.files[file] = entry
            results.append(WriteResult(item.index, entry["size"], _StorageInfo(file, 0, entry["size"])))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, file: str, tensor: Any) -> dict[str, int]:
        """Its size and CRC-32."""
        tensor = tensor.detach()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save takes the whole storage along
        with closing(CountedFile(self._directory / file)) as stream:
            torch.save(tensor, stream)
            os.fsync(stream.fileno())
        return stream.entry
