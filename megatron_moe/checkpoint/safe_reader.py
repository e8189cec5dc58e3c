"""Read torch.distributed.checkpoint files without executing anything in them.

torch reads `.metadata` with plain pickle and non-tensor entries with `torch.load(weights_only=False)`: whoever can write
the directory can run code in the process that loads it. Here the metadata may name only the classes below and byte
entries are refused. Tensors are read by `FileSystemReader` with an explicit `weights_only=True`, which
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 does not change.
"""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_moe.checkpoint.files import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # a table look-up: "torch.strided" -> torch.strided
    ("torch", "Size"),
    *(("pathlib", name) for name in _PATHS),
    *(("pathlib._local", name) for name in _PATHS),  # Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f".metadata would import {module}.{name}, which no checkpoint needs: it was not written by a save "
            "(nothing was executed); delete this checkpoint and ask where it comes from"
        )


class SafeReader(FileSystemReader):
    """`FileSystemReader` with a metadata pickle that can only make metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except CheckpointError:
                raise
            except Exception as error:  # pickle raises nearly anything on damaged bytes
                raise CheckpointError(f"{path}: cut off or damaged ({type(error).__name__}: {error})") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds a {type(metadata).__name__}, not checkpoint metadata")
        _check_file_names(path, metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_file_names(path: Path, metadata: Metadata) -> None:
    """Tensors come from files in the checkpoint directory and from nowhere else."""
    for info in (metadata.storage_data or {}).values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{path}: refers to {info.relative_path!r}, outside the checkpoint directory")


class SafePlanner(DefaultLoadPlanner):
    """Tensors only, and counted: `restored[name]` is the number of elements this rank has read."""

    def __init__(self) -> None:
        super().__init__()
        self.restored: Counter[str] = Counter()

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is a pickled object, not a tensor; it was not read and nothing was executed")

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.restored[read_item.dest_index.fqn] += tensor.numel()
