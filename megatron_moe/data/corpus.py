"""Text on its way in: files, globs and standard input -> blocks of whole records -> the texts of each record.

    expand_inputs -> Input -> Block, Block, ... -> records_of (here or in another process)

A record is one line of JSONL, one row of Parquet, or a whole file of plain text (one document per file). Compression and Parquet
are told from the first bytes, never from the name. A block is bytes as they were read, or columns as they were stored: decoding and
parsing are separate, so that they can run in other processes.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, NamedTuple

from megatron_moe.data import parquet
from megatron_moe.data.parquet import BadRecordError

READ_BYTES = 1 << 18
BLOCK_BYTES = 1 << 19  # large enough to hide the passing around, small enough to share the end evenly
BOM = b"\xef\xbb\xbf"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
FOREIGN = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
JSONL_NAMES = (".jsonl", ".json", ".ndjson")
TEXT_NAMES = (".txt", ".text", ".md", ".rst", ".py")


class Block(NamedTuple):
    """Some whole records of one input, one after another."""

    name: str
    kind: Literal["jsonl", "text", "parquet"]
    content: Any  # bytes: lines, or one file; a pyarrow.RecordBatch with a column per key
    first: int  # number of its first record, counted from 1

    def place(self, index: int) -> str:
        """Where record `index` of this block came from: "file:line", or "file"."""
        return self.name if self.kind == "text" else f"{self.name}:{self.first + index}"


class Input:
    """One opened input: its blocks, and how far the reading is."""

    def __init__(self, path: str, input_format: str = "auto"):
        self.path = path
        self.bytes_read = 0  # compressed bytes, to compare with the size of the file
        self._file: IO[bytes] = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115 - closed by close
        self.name = "standard input" if path == "-" else path
        self._chunks: Iterator[bytes] = iter(())
        self.kind = self._kind(input_format)

    def _kind(self, input_format: str) -> Literal["jsonl", "text", "parquet"]:
        if self.path != "-" and self._file.peek(4)[:4] == parquet.MAGIC:  # type: ignore[attr-defined]
            return "parquet"
        self._chunks = self._text_chunks()
        is_jsonl = input_format == "jsonl" or (input_format == "auto" and self._looks_like_jsonl())
        return "jsonl" if is_jsonl else "text"

    def close(self) -> None:
        if self.path != "-":
            self._file.close()

    def blocks(self, keys: tuple[str, ...], block_bytes: int | None = None) -> Iterator[Block]:
        """Lines of JSONL (empty ones included: they are for the reader to judge), rows of Parquet, or the file as one block.

        A block has about `block_bytes` (BLOCK_BYTES), more when one record is longer. Of Parquet only the columns `keys` are read.
        """
        block_bytes, first = block_bytes or BLOCK_BYTES, 1
        if self.kind == "text":
            yield Block(self.name, "text", b"".join(self._chunks), first)
        elif self.kind == "jsonl":
            for content in whole_lines(self._chunks, block_bytes):
                yield Block(self.name, "jsonl", content, first)
                first += content.count(b"\n")
        else:
            for columns, bytes_read in parquet.batches(self.path, keys, block_bytes):
                self.bytes_read = bytes_read
                yield Block(self.name, "parquet", columns, first)
                first += columns.num_rows

    def _looks_like_jsonl(self) -> bool:
        """By the name without .gz or .zst; if that says nothing, by whether the text begins with a brace."""
        stem = self.path.removesuffix(".gz").removesuffix(".zst")
        if stem.endswith(JSONL_NAMES + TEXT_NAMES):
            return stem.endswith(JSONL_NAMES)
        first = next(self._chunks, b"")
        self._chunks = itertools.chain([first], self._chunks)
        return first.lstrip()[:1] == b"{"

    def _raw_chunks(self) -> Iterator[bytes]:
        # read1 returns what a pipe has, instead of waiting for a full buffer
        while chunk := self._file.read1(READ_BYTES):  # type: ignore[attr-defined]
            self.bytes_read += len(chunk)
            yield chunk

    def _text_chunks(self) -> Iterator[bytes]:
        """Decompressed chunks, without a byte order mark. ValueError, naming the file, for what is cut short or foreign."""
        chunks = decompressed(self._raw_chunks(), self.name, lambda: self.bytes_read)
        head = next(chunks, b"")
        while len(head) < len(BOM) and (more := next(chunks, b"")):
            head += more
        return itertools.chain([head.removeprefix(BOM)], chunks)


def expand_inputs(words: Iterable[str]) -> list[str]:
    """Files named directly, '-', or by globs (sorted; ** descends). ValueError for what does not exist."""
    paths: list[str] = []
    for word in words:
        if word == "-" or os.path.isfile(word):
            paths.append(word)
        elif os.path.isdir(word):
            raise ValueError(f"--input {word} is a folder; name its files, for example '{os.path.join(word, '*.jsonl')}'")
        else:
            found = sorted(p for p in glob.glob(word, recursive=True) if os.path.isfile(p))
            if not found:
                raise ValueError(f"--input {word}: no such file, and as a pattern it matches none; check the path")
            paths += found
    twice = [p for p in dict.fromkeys(paths) if paths.count(p) > 1]
    if twice:
        raise ValueError(f"--input names {twice[0]} more than once; to repeat data give it a larger weight in --data-path instead")
    return paths


def total_bytes(paths: Iterable[str]) -> int | None:
    """Size of all files together; None with standard input among them."""
    paths = list(paths)
    return None if "-" in paths else sum(os.path.getsize(p) for p in paths)


def whole_lines(chunks: Iterable[bytes], block_bytes: int) -> Iterator[bytes]:
    """The same bytes in blocks of about `block_bytes` that end where a line ends; the very last may lack its newline."""
    pending: list[bytes] = []  # joined once per block, so that lines longer than a block stay linear
    size = 0
    for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size >= block_bytes and (cut := chunk.rfind(b"\n") + 1):
            pending[-1] = chunk[:cut]
            yield b"".join(pending)
            pending, size = [chunk[cut:]], len(chunk) - cut
    if size:
        yield b"".join(pending)


# ---------------------------------------------------------------- compression


def decompressed(chunks: Iterator[bytes], name: str, position: Callable[[], int]) -> Iterator[bytes]:
    """Chunks of text from chunks of a plain, gzip or zstd stream. `position`: bytes read so far, for messages."""
    head = next(chunks, b"")
    while len(head) < 4 and (more := next(chunks, b"")):
        head += more
    if head.startswith(parquet.MAGIC):
        raise ValueError(f"{name} is Parquet, which is read from its end: give it as a file of its own, not through a pipe")
    for magic, kind in FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is {kind}; only UTF-8 text, plain or compressed as gzip or zstd, is read: convert it first")
    whole = itertools.chain([head], chunks)
    if head.startswith(GZIP):
        yield from _inflate(whole, lambda: zlib.decompressobj(wbits=31), "gzip", name, position)
    elif head.startswith(ZSTD):
        yield from _inflate(whole, _zstd_object(name), "zstd", name, position)
    else:
        yield from whole


def _inflate(chunks: Iterator[bytes], new_object: Callable[[], Any], kind: str, name: str, position: Callable[[], int]) -> Iterator[bytes]:
    """Decompress a stream of one or more members (gzip) or frames (zstd); the last must be complete."""
    inflater = new_object()
    for chunk in chunks:
        while chunk:
            if inflater.eof:
                chunk = chunk.lstrip(b"\0")  # padding between members is allowed
                if not chunk:
                    break
                inflater = new_object()
            try:
                yield inflater.decompress(chunk)
            except Exception as error:  # zlib.error or zstandard.ZstdError
                raise ValueError(f"{name}: damaged {kind} data before byte {position()} ({error}); fetch or make the file again") from None
            chunk = inflater.unused_data if inflater.eof else b""
    if not inflater.eof:
        raise ValueError(f"{name}: the {kind} data ends too early, at byte {position()}; fetch or make the file again")


def _zstd_object(name: str) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{name} is compressed with zstd, and that needs the Python package zstandard; pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj()


# ---------------------------------------------------------------- bytes -> text


def records_of(block: Block, keys: tuple[str, ...]) -> Iterator[list[str] | BadRecordError]:
    """Of each record of a block: the text under each key, or the reason why there is none."""
    if block.kind == "parquet":
        yield from parquet.records_of(block.content, keys)
        return
    for content in [block.content] if block.kind == "text" else lines_of(block.content):
        try:
            yield parse_record(content, keys) if block.kind == "jsonl" else [decode(content)]
        except BadRecordError as error:
            yield error


def lines_of(content: bytes) -> list[bytes]:
    """Lines without their newline. A newline at the very end begins no further line."""
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def parse_record(content: bytes, keys: tuple[str, ...]) -> list[str]:
    """One JSONL line -> the text under each key. BadRecordError, with the reason, for anything else."""
    if not content.strip():
        raise BadRecordError("blank line")
    text = decode(content)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not valid JSON ({error or type(error).__name__})") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON {type(record).__name__}, not an object like {{{json.dumps(keys[0])}: ...}}")
    values = [_text_of(record, key) for key in keys]
    if "\\u" in text:
        _refuse_surrogates(values)
    return values


def decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})") from None


def _text_of(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise BadRecordError(f"no key {key!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'} (--json-keys chooses)")
    value = record[key]
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise BadRecordError(f"{key!r} is {kind}, not a text")
    return value


def _refuse_surrogates(values: Iterable[str]) -> None:
    """An escape such as \\ud800 alone is valid JSON and yet no text: no tokenizer can take it."""
    for value in values:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError(f"half a surrogate pair at character {error.start}") from None
