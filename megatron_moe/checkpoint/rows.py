"""Rows of saved tensors, read where they lie, without the rest of the tensor: one expert of a stack of many.

A checkpoint directory holds each chunk of a tensor as torch.save writes it: a zip archive, uncompressed, within a larger file. The
first look at a chunk finds where the numbers begin and that they are in order; from then on a row is one read. Nothing in the files
is executed: the metadata by SafeReader, the chunk's own description by torch's weights_only loader, without its numbers.

    __0_0.distcp    ... | zip: data.pkl, data/0 = chunk [4, D, F] ... | zip ... |
                                          ^ row 2 of the chunk is one run of D x F numbers
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.safe_reader import SafeReader

MOST_BUFFERS = 512  # of one call to the system; Linux takes 1024


@dataclass
class _Chunk:
    """A box of a tensor: where it begins, how large it is, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int  # bytes
    length: int
    data: int | None = None  # where its numbers begin; None: not looked at


class RowReader:
    """`read(name, row, out)`: out = tensor[row], whatever layout wrote the checkpoint. Files stay open until `close`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._metadata = SafeReader(self.path).read_metadata()
        self._chunks: dict[str, list[_Chunk]] = {}
        self._files: dict[str, Any] = {}

    def read(self, name: str, row: int, out: Tensor) -> int:
        """Fills `out`, a contiguous CPU tensor; returns the bytes read. CheckpointError where the files do not have it."""
        entry = self._metadata.state_dict_metadata[name]
        assert tuple(entry.size[1:]) == tuple(out.shape) and entry.properties.dtype == out.dtype, f"{name}: {entry.size} {out.shape}"
        bytes_out, elements = out.view(torch.uint8).numpy(), 0
        for chunk in self._chunks_of(name):
            inside = row - chunk.offsets[0]
            if 0 <= inside < chunk.sizes[0]:
                elements += self._read_part(name, chunk, inside, bytes_out, out.element_size())
        if elements != out.numel():
            raise CheckpointError(f"{self.path.name}: {name}[{row}] has {out.numel()} numbers, and the files {elements} of them")
        return elements * out.element_size()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _chunks_of(self, name: str) -> list[_Chunk]:
        if name not in self._chunks:
            chunks = []
            for saved in self._metadata.state_dict_metadata[name].chunks:
                info = self._metadata.storage_data[MetadataIndex(name, saved.offsets)]
                if getattr(info, "transform_descriptors", None):
                    raise CheckpointError(f"{self.path.name}: {name} is stored transformed (compressed, say): a row cannot be read alone")
                chunks.append(_Chunk(tuple(saved.offsets), tuple(saved.sizes), info.relative_path, info.offset, info.length))
            self._chunks[name] = chunks
        return self._chunks[name]

    def _read_part(self, name: str, chunk: _Chunk, row: int, out: np.ndarray, itemsize: int) -> int:
        """Row `row` of the chunk, into its place; how many numbers that are."""
        sizes, offsets = chunk.sizes[1:], chunk.offsets[1:]
        count = int(np.prod(sizes, dtype=np.int64))
        if count == 0:
            return 0
        if chunk.data is None:
            chunk.data = self._find_numbers(name, chunk, itemsize)
        box = tuple(slice(o, o + n) for o, n in zip(offsets[:-1], sizes[:-1]))
        box = (*box, slice(offsets[-1] * itemsize, (offsets[-1] + sizes[-1]) * itemsize))
        place, position = out[box], chunk.data + row * count * itemsize
        if place.flags.c_contiguous:
            self._fill(chunk.file, [memoryview(place).cast("B")], position)
        else:  # a part of the width: each line has a place of its own
            lines = [memoryview(place[index]) for index in np.ndindex(*place.shape[:-1])]
            for first in range(0, len(lines), MOST_BUFFERS):
                some = lines[first : first + MOST_BUFFERS]
                self._fill(chunk.file, some, position + first * sizes[-1] * itemsize)
        return count

    def _fill(self, file: str, buffers: list[memoryview], position: int) -> None:
        wanted = sum(len(b) for b in buffers)
        descriptor, got = self._open(file).fileno(), 0
        while got < wanted:
            read = os.preadv(descriptor, _after(buffers, got), position + got)
            if read == 0:
                raise CheckpointError(f"{self.path.name}/{file}: cut off; {wanted} bytes wanted at {position}, {got} found")
            got += read

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = open(self.path / file, "rb", buffering=0)  # noqa: SIM115 - open until close()
        return self._files[file]

    def _find_numbers(self, name: str, chunk: _Chunk, itemsize: int) -> int:
        """Byte of the file at which the chunk's first number is. CheckpointError unless all follow it in order."""
        where = f"{self.path.name}/{chunk.file}: {name}"
        try:
            window = _Window(self._open(chunk.file), chunk.start, chunk.length)
            with FakeTensorMode():  # shape and strides; no memory for the numbers
                saved = torch.load(window, weights_only=True, map_location="cpu")
            archive = zipfile.ZipFile(window)
            (record,) = [info for info in archive.infolist() if "/data/" in info.filename]
            window.seek(record.header_offset)
            header = struct.unpack("<4s5H3L2H", window.read(30))
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes raise nearly anything
            raise CheckpointError(f"{where} is cut off, damaged or not a tensor ({type(error).__name__}: {error})") from error
        in_order = saved.is_contiguous() and saved.storage_offset() == 0 and tuple(saved.shape) == chunk.sizes
        if not in_order or record.compress_type != zipfile.ZIP_STORED or record.file_size != saved.numel() * itemsize:
            raise CheckpointError(f"{where} is not stored as {list(chunk.sizes)} numbers in order: a row cannot be read alone")
        return chunk.start + record.header_offset + 30 + header[9] + header[10]


def _after(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of them behind the first `done` bytes."""
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(done - len(buffer), 0)
    return left


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: Any, start: int, length: int):
        self._descriptor, self._start, self._length, self._at = file.fileno(), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence], 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        read = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += read
        return read
