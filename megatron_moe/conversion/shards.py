"""Files of the safetensors format: one, or several with an index, and checksums of our own beside them.

model.safetensors                                         everything of the part "model", when it fits into one file
model-00001-of-00003.safetensors, ...                     else cut between tensors; a tensor is never cut
model.safetensors.index.json                              {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
checksums.json                                            size and CRC-32 of every file: the format notices a cut, not a flipped bit
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.files import describe_file, file_problems, write_through
from megatron_moe.conversion.journal import LOCK
from megatron_moe.conversion.journal import NAME as JOURNAL
from megatron_moe.conversion.source import ITEM_SIZE, Tensors, size_of, total_size

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.journal import Journal

CHECKSUMS = "checksums.json"
DEFAULT_SHARD_SIZE = 5 * 10**9
_DTYPES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODES = {ours: code for code, ours in _DTYPES.items()}
BLOCK = 16 << 20  # bytes written at a time


def index_name(part: str) -> str:
    return f"{part}.safetensors.index.json"


def parts_in(directory: Path, parts: Sequence[str]) -> list[str]:
    return [p for p in parts if (directory / f"{p}.safetensors").is_file() or (directory / index_name(p)).is_file()]


# ---------------------------------------------------------------- writing


def plan_shards(part: str, tensors: Tensors, max_size: int) -> dict[str, list[str]]:
    """File -> its tensors, in the given order. A tensor larger than `max_size` gets a file of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in tensors.items():
        if groups[-1] and size + size_of(entry) > max_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += size_of(entry)
    if len(groups) == 1:
        return {f"{part}.safetensors": groups[0]}
    return {f"{part}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def write_shards(
    directory: Path,
    part: str,
    tensors: Tensors,
    max_size: int,
    read: Callable[[list[str]], Iterator[Tensor]],
    journal: Journal | None = None,
    sources: Callable[[list[str]], list[str]] = list,
) -> None:
    """Memory holds one tensor at a time. `read` gives the tensors of these names, in this order.

    Files that the journal knows as finished are left as they are; `sources` names the tensors of the conversion's source behind those
    of a file.
    """
    plan = plan_shards(part, tensors, max_size)
    for file, names in plan.items():
        if journal is not None and file in journal.finished:
            continue
        # the library's own order: wide types first, so that each begins at a multiple of its width
        names = sorted(names, key=lambda name: -ITEM_SIZE[tensors[name]["dtype"]])
        entry = write_file(directory / file, {name: tensors[name] for name in names}, read(names))
        if journal is not None:
            journal.finish(file, entry, sources(names))
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        index = {"metadata": {"total_size": total_size(tensors)}, "weight_map": weight_map}
        write_through(directory / index_name(part), json.dumps(index, indent=1) + "\n")


def write_file(path: Path, tensors: Tensors, numbers: Iterator[Tensor]) -> dict[str, int]:
    """One file, tensor after tensor: what is in it is known before the first number is. Returns size and CRC-32.

    8 bytes: length of the header; the header, JSON, filled up with spaces to a multiple of 8; the tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        begin, end = end, end + size_of(entry)
        header[name] = {"dtype": _CODES[entry["dtype"]], "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        crc = 0
        for block in itertools.chain([len(text).to_bytes(8, "little"), text], _blocks(tensors, numbers)):
            file.write(block)
            crc = zlib.crc32(block, crc)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if size != 8 + len(text) + end:
        raise ValueError(f"{path.name}: {size} bytes were written, and its header announces {8 + len(text) + end}")
    return {"size": size, "crc32": crc}


def _blocks(tensors: Tensors, numbers: Iterator[Tensor]) -> Iterator[memoryview]:
    """The bytes of the tensors; ValueError for one that is not what the header says."""
    import torch

    for (name, entry), tensor in zip(tensors.items(), numbers, strict=True):
        found = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if found != {"shape": list(entry["shape"]), "dtype": entry["dtype"]}:
            raise ValueError(f"{name}: {found['dtype']} {found['shape']} was read, and {entry['dtype']} {entry['shape']} was announced")
        flat = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        yield from (flat[at : at + BLOCK] for at in range(0, len(flat), BLOCK))


def write_checksums(directory: Path, known: dict[str, dict[str, int]] | None = None) -> None:
    """Last of all: of every file that is there. `known`: those whose checksum was taken when they were written."""
    known = known or {}
    names = sorted(path.name for path in directory.iterdir() if path.name not in (JOURNAL, LOCK))
    files = {name: known.get(name) or describe_file(directory / name) for name in names}
    write_through(directory / CHECKSUMS, json.dumps({"format_version": 1, "files": files}, indent=1) + "\n")


# ---------------------------------------------------------------- reading


def read_headers(directory: Path, part: str) -> tuple[dict[str, str], Tensors, list[str]]:
    """(tensor -> file, tensor -> shape and dtype, problems) of one part. No tensor data is read."""
    index, problems = None, []
    if (directory / index_name(part)).exists():
        index, problems = _read_index(directory, part)
        files = sorted(set(index.values()))
        if (directory / f"{part}.safetensors").exists():
            problems.append(f"{directory}: has both {part}.safetensors and {index_name(part)}; delete the one that is not meant")
    else:
        files = [f"{part}.safetensors"]
    places: dict[str, str] = {}
    tensors: Tensors = {}
    for file in files:
        entries, problem = _read_header(directory / file)
        problems += [problem] if problem else []
        problems += [f"{name}: in {places[name]} and again in {file}" for name in entries if name in places]
        if index is not None and not problem:
            problems += [
                f"{name}: the index puts it into {file}, where it is not" for name, f in index.items() if f == file and name not in entries
            ]
            problems += [f"{name}: in {file}, but not in {index_name(part)}" for name in entries if name not in index]
        places |= dict.fromkeys(entries, file)
        tensors |= entries
    return places, tensors, problems


def _read_index(directory: Path, part: str) -> tuple[dict[str, str], list[str]]:
    where = directory / index_name(part)
    try:
        weight_map = json.loads(where.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{where}: cut off or damaged, not an index with a weight_map ({type(error).__name__}: {error})"]
    outside = sorted({file for file in files.values() if Path(file).name != file})
    problems = [f"{where}: refers to {file!r}, outside the directory" for file in outside]
    return {name: file for name, file in files.items() if file not in outside}, problems


def _read_header(path: Path) -> tuple[Tensors, str | None]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}, f"{path}: missing"
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            kinds = {name: (list(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        return {}, f"{path}: cut off or damaged ({error})"
    foreign = sorted({kind for _, kind in kinds.values()} - _DTYPES.keys())
    if foreign:
        return {}, f"{path}: has tensors of type {', '.join(foreign)}; known are {', '.join(_DTYPES)}"
    return {name: {"shape": shape, "dtype": _DTYPES[kind]} for name, (shape, kind) in kinds.items()}, None


def read_tensors(directory: Path, places: Iterable[tuple[str, str]]) -> Iterator[Tensor]:
    """The tensors at (file, name), one after the other; neighbours in one file share its opening."""
    from safetensors import safe_open

    for file, group in itertools.groupby(places, key=lambda place: place[0]):
        with safe_open(directory / file, framework="pt") as opened:
            for _, name in group:
                yield opened.get_tensor(name)


def read_checksums(directory: Path) -> dict[str, dict[str, int]] | None:
    """checksums.json, None when there is none; ValueError when it is damaged."""
    where = directory / CHECKSUMS
    if not where.exists():
        return None
    try:
        files = json.loads(where.read_text(encoding="utf-8"))["files"]
        return {str(name): {"size": int(e["size"]), "crc32": int(e["crc32"])} for name, e in files.items() if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: cut off or damaged ({type(error).__name__}: {error}); without it nothing would be verified") from None


def checksum_problems(directory: Path, used: Sequence[str], verify: str) -> list[str]:
    """Files against checksums.json; a file that is used and has no entry is a problem too."""
    try:
        known = read_checksums(directory)
    except ValueError as error:
        return [str(error)]
    if known is None:
        return []
    unknown = [f"{directory.name}/{file}: has no entry in {CHECKSUMS}" for file in used if file not in known]
    return unknown + file_problems(directory, known, verify)
