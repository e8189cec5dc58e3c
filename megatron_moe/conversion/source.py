"""A checkpoint in our names, whatever it is stored as.

torch is imported where numbers are touched: looking at names and shapes does not wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, dict[str, Any]]  # name -> {"shape": [4, 2], "dtype": "float32"}, as manifest.json spells it
ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


class Source(Protocol):
    """What every format gives. `meta` is that of manifest.json, with the number of ranks that trained as `world_size`."""

    path: Path
    iteration: int
    meta: dict[str, Any]
    tensors: Tensors
    notes: Sequence[str]  # what a person should know of it, one sentence each

    def files(self) -> dict[str, int]:
        """Name and size in bytes of each file that belongs to it."""
        ...

    def file_problems(self, verify: str) -> list[str]:
        """Compare the files with the checksums that were written with them: "size" or "crc"."""
        ...

    @property
    def has_checksums(self) -> bool: ...

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """These tensors on the CPU, whole, in this order and one after the other."""
        ...


class Selection:
    """What is taken from a source, and in which types. Counts how often each tensor is read.

    `express` (name, tensor -> tensor): leaves out of a tensor what the target cannot hold, such as the rows of padding.
    """

    def __init__(self, source: Source, tensors: Tensors, on_bytes: Callable[[int], Any] = lambda _: None,
                 express: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor):  # fmt: skip
        self.source, self.tensors, self.on_bytes, self.express = source, tensors, on_bytes, express
        self.reads: Counter[str] = Counter()

    def credit(self, names: Iterable[str]) -> None:
        """These were read and written before the conversion was interrupted."""
        for name in names:
            self.reads[name] += 1
            self.on_bytes(size_of(self.tensors[name]))

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        import torch

        for name, tensor in self.source.read(names):
            self.reads[name] += 1
            self.on_bytes(size_of(self.tensors[name]))
            yield name, self.express(name, tensor.to(getattr(torch, self.tensors[name]["dtype"])))


class ReadAhead:
    """Single tensors of a source, each read together with those that follow in its order: where a reading has a price of its own, many
    small tensors would pay it each. Memory: `most` bytes, or one larger tensor."""

    def __init__(self, source: Source, most: int = 64 << 20):
        self.source, self.most = source, most
        self._order = list(source.tensors)
        self._place = {name: i for i, name in enumerate(self._order)}
        self._ahead: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """Its memory is the caller's from then on."""
        if name not in self._ahead:
            self._ahead = dict(self.source.read(self._following(name)))
        return self._ahead.pop(name)

    def _following(self, name: str) -> list[str]:
        names, size = [name], size_of(self.source.tensors[name])
        for other in self._order[self._place[name] + 1 :]:
            size += size_of(self.source.tensors[other])
            if size > self.most:
                break
            names.append(other)
        return names


def count_of(entry: dict[str, Any]) -> int:
    """Elements of one tensor."""
    count = 1
    for n in entry["shape"]:
        count *= n
    return count


def size_of(entry: dict[str, Any]) -> int:
    """Bytes of one tensor."""
    return count_of(entry) * ITEM_SIZE[entry["dtype"]]


def total_size(tensors: Tensors) -> int:
    return sum(map(size_of, tensors.values()))


def human_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
