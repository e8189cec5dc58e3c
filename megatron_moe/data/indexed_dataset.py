"""Token sequences on disk: PREFIX.bin (tokens) and PREFIX.idx (where each sequence lies), Megatron's MMIDIDX version 1.

The .idx, little endian and without padding (so arrays may be unaligned):

    bytes 0-8    b"MMIDIDX\\0\\0"
    bytes 9-16   uint64  version, 1
    byte  17     uint8   code of the token type, see DTYPES
    bytes 18-25  uint64  n, number of sequences
    bytes 26-33  uint64  d, length of the document index
    int32[n]     sizes, in tokens
    int64[n]     pointers, byte offsets in the .bin: the exclusive running sum of size x itemsize
    int64[d]     document index: document i is the sequences [index[i], index[i+1])
    int8[n]      modes, only in multimodal data written by Megatron-Core; read over here

Worked example: documents [1, 2, 3] and [4, 5] as uint16 give a .bin of 10 bytes, sizes (3, 2), pointers (0, 6) and the
document index (0, 1, 2); the .idx has 34 + 2*4 + 2*8 + 3*8 = 82 bytes.

Beside them lies PREFIX.meta.json, which says what tokenizer made the tokens. Megatron ignores it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megatron_moe.utils.atomic import atomic_write, remove_if_there, sync, temporary_name

MAGIC = b"MMIDIDX\0\0"
LEGACY_MAGIC = b"TNTIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats, and not the same floats in every Megatron release: they are refused.
DTYPES = {1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
COPY_BYTES = 8 << 20


def best_dtype(vocab_size: int) -> np.dtype:
    """The token type for a vocabulary: uint16 below 65500 entries, else int32 (Megatron's own rule)."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def fit(tokens: Sequence[int] | np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Tokens as `dtype`; ValueError for an id outside its range, which a plain cast would wrap around."""
    wide = np.asarray(tokens)
    if wide.size == 0 or wide.dtype == dtype:
        return wide.astype(dtype, copy=False)
    if wide.dtype.kind not in "iu":
        raise ValueError(f"token ids must be whole numbers, not {wide.dtype}; pass the tokenizer's ids")
    limits = np.iinfo(dtype)
    if wide.min() < limits.min or wide.max() > limits.max:
        culprit = wide.max() if wide.max() > limits.max else wide.min()
        raise ValueError(
            f"token id {culprit} does not fit {np.dtype(dtype).name} ({limits.min} to {limits.max}); "
            f"choose the dtype with best_dtype(vocab_size), and check that the tokenizer's vocabulary is the one you think"
        )
    return wide.astype(dtype)


class IndexedDataset:
    """Read-only sequences of tokens under one prefix, fully checked when opened.

    `tokens`: all sequences end to end, a memoryview of `dtype` for those who copy many pieces: slicing it takes a third of an array's time.
    `sizes` int32[n]: tokens per sequence. `starts` int64[n + 1]: tokens before each, and of all. `document_indices` int64[d]. `meta`: the side file, {} without one.
    Raises ValueError, naming both files, for anything that is missing, cut short or foreign.
    """

    def __init__(self, prefix: str):
        self.prefix = str(prefix)
        self._index = self._map(".idx")
        self.dtype, count, documents = self._header()
        offset = HEADER.size
        # Copies: aligned, and fast to search; 4 + 8 bytes per sequence are small beside the tokens.
        self.sizes = np.frombuffer(self._index, "<i4", count, offset).astype(np.int32)
        pointers = np.frombuffer(self._index, "<i8", count, offset + 4 * count)
        self.document_indices = np.frombuffer(self._index, "<i8", documents, offset + 12 * count).astype(np.int64)
        self.starts = self._checked_starts(pointers)
        self._check_documents()
        # A plain array over the map: slices of np.memmap take twenty times as long (2 us).
        self._tokens = self._map(".bin").view(np.ndarray).view(self.dtype)
        self.tokens = memoryview(self._tokens)
        self.meta = self._read_meta()

    def __reduce__(self):
        # A memory map would be pickled as its whole contents; a spawned data worker opens the files again instead.
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index` as a copy."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of sequence `index`, to its end without a length. A copy of `dtype`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        size = int(self.sizes[index])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens [{offset}, {offset + length}) of sequence {index}, which has {size}, in {self.prefix}")
        return self.read(self.start_of(index % len(self)) + offset, length)

    def start_of(self, index: int) -> int:
        """Tokens before sequence `index`; start_of(len(self)) is the number of tokens."""
        return int(self.starts[index])

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of all sequences laid end to end, as a copy: a view could outlive the map."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + length}) of {self.num_tokens} in {self.prefix}")
        return np.array(self._tokens[start : start + length])

    def digest(self) -> str:
        """Hash of the .idx contents: another one means that sequences moved, so that indices built over them are stale."""
        return hashlib.sha256(self._index).hexdigest()

    # ------------------------------------------------------------ checks at open

    def _bad(self, what: str) -> ValueError:
        return ValueError(
            f"{self.prefix}.idx with {self.prefix}.bin is not a usable dataset: {what}; "
            f"rebuild the pair with tools/preprocess_data.py, or point to the right prefix"
        )

    def _map(self, suffix: str) -> np.ndarray:
        """The bytes of one of the two files; uint8."""
        path = self.prefix + suffix
        try:
            # An empty file cannot be mapped, and is right for a dataset without tokens.
            return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
        except FileNotFoundError:
            hint = "give the prefix without the suffix" if self.prefix.endswith((".bin", ".idx")) else "one of the two is not there"
            raise self._bad(f"{path} does not exist ({hint})") from None
        except OSError as error:
            raise self._bad(f"{path} cannot be read ({error.strerror})") from None

    def _header(self) -> tuple[np.dtype, int, int]:
        """(token type, sequences, length of the document index), after checking that the file has room for them."""
        size = len(self._index)
        if bytes(self._index[:8]) == LEGACY_MAGIC:
            raise self._bad("the .idx is of the legacy lazy/cached kind (TNTIDX), only mmap (MMIDIDX) is read")
        if size < HEADER.size or bytes(self._index[:9]) != MAGIC:
            raise self._bad(f"the .idx ({size} bytes) does not begin with the magic MMIDIDX")
        _, version, code, count, documents = HEADER.unpack(bytes(self._index[: HEADER.size]))
        if version != 1:
            raise self._bad(f"the .idx has version {version}, not 1")
        if code not in DTYPES:
            raise self._bad(f"the .idx has token type code {code}, not one of {sorted(DTYPES)}")
        want = HEADER.size + 12 * count + 8 * documents
        if size not in (want, want + count):
            raise self._bad(f"the .idx has {size} bytes, and {count} sequences with a document index of {documents} take {want}")
        return DTYPES[code], count, documents

    def _checked_starts(self, pointers: np.ndarray) -> np.ndarray:
        """int64[n + 1]: tokens before each sequence. What the sizes imply must be what the pointers and the .bin say."""
        if len(self.sizes) and self.sizes.min() < 0:
            worst = int(self.sizes.argmin())
            raise self._bad(f"sequence {worst} has {self.sizes[worst]} tokens")
        starts = np.zeros(len(self.sizes) + 1, np.int64)
        np.cumsum(self.sizes, dtype=np.int64, out=starts[1:])  # int64: the .bin may be larger than 2 GiB
        wrong = np.flatnonzero(pointers != starts[:-1] * self.dtype.itemsize)
        if len(wrong):
            at = int(wrong[0])
            raise self._bad(f"pointer {at} is {pointers[at]} where the sizes put it at {starts[at] * self.dtype.itemsize}")
        have, want = len(self._map(".bin")), int(starts[-1]) * self.dtype.itemsize
        if have != want:
            raise self._bad(f"the .bin has {have} bytes and the .idx describes {want} ({starts[-1]} {self.dtype.name} tokens)")
        return starts

    def _check_documents(self) -> None:
        index = self.document_indices
        if len(index) == 0 or index[0] != 0 or index[-1] != len(self) or (np.diff(index) < 0).any():
            shown = f"{index[0]} to {index[-1]}" if len(index) else "empty"
            raise self._bad(f"the document index ({shown}) must rise from 0 to the number of sequences, {len(self)}")

    def _read_meta(self) -> dict[str, Any]:
        try:
            with open(self.prefix + ".meta.json", encoding="utf-8") as file:
                meta = json.load(file)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise self._bad(f"{self.prefix}.meta.json is not JSON ({error}): delete it to go on without") from None
        if not isinstance(meta, dict):
            raise self._bad(f"{self.prefix}.meta.json holds {type(meta).__name__}, not an object: delete it to go on without")
        return meta


class IndexedDatasetWriter:
    """Writes PREFIX.bin and PREFIX.idx; as a context manager it publishes at the end, or leaves nothing after an error.

    with IndexedDatasetWriter("corpus_text_document", best_dtype(vocab_size)) as writer:
        writer.add_document([1, 2, 3])
    """

    def __init__(self, prefix: str, dtype: np.dtype | type | str, meta: dict[str, Any] | None = None):
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(f"tokens are stored as one of {', '.join(d.name for d in CODES)}, not {self.dtype.name}")
        self.meta = meta
        self.num_tokens = self.num_documents = 0
        self._sizes: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._sequences = 0
        self._bin = open(temporary_name(self.prefix + ".bin"), "wb")  # noqa: SIM115 - closed by finish or abort

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.end()
        else:
            self.abort()

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document of one sequence. ValueError for an id that the dtype cannot hold."""
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> None:
        """Several documents of one sequence each: their tokens end to end, and the length of each."""
        sizes = _int32_sizes(sizes)
        assert sizes.sum(dtype=np.int64) == len(tokens), f"sizes sum to {sizes.sum(dtype=np.int64)}, tokens are {len(tokens)}"
        self._bin.write(np.ascontiguousarray(fit(tokens, self.dtype)))
        self._record(sizes, np.arange(1, len(sizes) + 1))

    def add_dataset(self, dataset: IndexedDataset, on_bytes: Callable[[int], object] = lambda n: None) -> None:
        """All sequences and documents of another dataset, copied as bytes. ValueError if its dtype differs."""
        if dataset.dtype != self.dtype:
            raise ValueError(
                f"{dataset.prefix} holds {dataset.dtype.name} and {self.prefix} {self.dtype.name}: "
                f"only datasets of one dtype can be merged; preprocess both with the same tokenizer"
            )
        with open(dataset.prefix + ".bin", "rb") as source:
            while chunk := source.read(COPY_BYTES):
                self._bin.write(chunk)
                on_bytes(len(chunk))
        self._record(dataset.sizes, dataset.document_indices[1:])

    def _record(self, sizes: np.ndarray, document_ends: np.ndarray) -> None:
        self._sizes.append(sizes)
        self._ends.append(document_ends + self._sequences)
        self._sequences += len(sizes)
        self.num_documents += len(document_ends)
        self.num_tokens += int(sizes.sum(dtype=np.int64))

    def end(self) -> None:
        """Finish the files and publish them."""
        self.finish()
        self.publish()

    def finish(self) -> None:
        """Complete both files under temporary names. `publish` gives them their names; several writers can do so together."""
        try:
            sync(self._bin)
            self._bin.close()
            with open(temporary_name(self.prefix + ".idx"), "wb") as file:
                self._write_index(file)
                sync(file)
        except BaseException:
            self.abort()
            raise

    def _write_index(self, file) -> None:
        sizes = np.concatenate([*self._sizes, np.zeros(0, np.int32)]).astype("<i4")
        documents = np.concatenate([np.zeros(1, np.int64), *self._ends]).astype("<i8")
        pointers = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(sizes), len(documents)))
        for array in (sizes, pointers, documents):
            file.write(array.tobytes())

    def publish(self) -> None:
        """Rename the finished files. The .idx comes last, and an old one goes first, so that no moment shows a mixed pair."""
        remove_if_there(self.prefix + ".idx")
        remove_if_there(self.prefix + ".meta.json")
        os.replace(temporary_name(self.prefix + ".bin"), self.prefix + ".bin")
        if self.meta is not None:
            with atomic_write(self.prefix + ".meta.json", "w") as file:
                json.dump({**self.meta, "documents": self.num_documents, "tokens": self.num_tokens}, file, indent=1)
        os.replace(temporary_name(self.prefix + ".idx"), self.prefix + ".idx")

    def abort(self) -> None:
        """Drop what was written; nothing under the final names is touched."""
        self._bin.close()
        for suffix in (".bin", ".idx"):
            remove_if_there(temporary_name(self.prefix + suffix))


def _int32_sizes(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    wide = np.asarray(sizes, np.int64)
    if wide.size and wide.max() > np.iinfo(np.int32).max:
        raise ValueError(f"a document has {wide.max()} tokens, and the format holds up to 2147483647: split the document")
    return wide.astype(np.int32)


def merge(prefixes: Iterable[str], output: str, on_bytes: Callable[[int], object] = lambda n: None) -> None:
    """Concatenate datasets in the order given, streaming. ValueError if dtypes or tokenizers differ.

    `on_bytes` is told of every piece of .bin that was copied.
    """
    datasets = [IndexedDataset(p) for p in prefixes]
    if not datasets:
        raise ValueError("there is nothing to merge: name at least one prefix")
    if os.path.abspath(output) in [os.path.abspath(d.prefix) for d in datasets]:
        raise ValueError(f"the output {output} is also an input; choose another --output-prefix")
    with IndexedDatasetWriter(output, datasets[0].dtype, _merged_meta(datasets)) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset, on_bytes)


def _merged_meta(datasets: list[IndexedDataset]) -> dict[str, Any] | None:
    """The common description; None as soon as one dataset has none, because then nobody knows what it holds."""
    if not all(d.meta for d in datasets):
        return None
    first = datasets[0]
    for other in datasets[1:]:
        if other.meta.get("fingerprint") != first.meta.get("fingerprint"):
            raise ValueError(
                f"{first.prefix} and {other.prefix} were made by different tokenizers (fingerprints "
                f"{first.meta.get('fingerprint')} and {other.meta.get('fingerprint')}); preprocess both with the same one"
            )
    return first.meta
