"""Flat safetensors: a folder that needs no other file, with our parameter names and stacked experts.

config.json                    model_type "megatron_moe", format version, iteration, and the meta of the checkpoint
model.safetensors              the parameters, named as `named_parameters()` does: GPT.load_state_dict takes them
optimizer.safetensors          with the optimizer: <slot>.<parameter>

Experts stay one tensor [E, ...] per weight, with the global number of experts, and layers keep their global numbers: nothing
depends on the layout that wrote it or that will read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.files import write_through
from megatron_moe.config.flags import ConfigError
from megatron_moe.conversion.shards import (
    CHECKSUMS,
    DEFAULT_SHARD_SIZE,
    checksum_problems,
    index_name,
    parts_in,
    read_headers,
    read_tensors,
    write_checksums,
    write_shards,
)
from megatron_moe.conversion.source import Selection, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.journal import Journal

SOURCE_OPTIONS = ()
TARGET_OPTIONS = ("max_shard_size",)
RESUMES = True
FORMAT_VERSION = 1
MODEL_TYPE = "megatron_moe"
PARTS = ("model", "optimizer")
_HEAD = ("model_type", "format_version", "iteration")  # beside the meta


# ---------------------------------------------------------------- the name map


def stored_name(name: str) -> tuple[str, str]:
    """model.norm.weight -> (model, norm.weight); optimizer.exp_avg.norm.weight -> (optimizer, exp_avg.norm.weight)."""
    part, _, stored = name.partition(".")
    return part, stored


def our_name(part: str, stored: str) -> str:
    return f"{part}.{stored}"


# ---------------------------------------------------------------- reading


def looks_like(directory: Path) -> bool:
    return bool(parts_in(directory, PARTS))


class FlatSource:
    """An opened folder. `places`: our name -> (file, name in it)."""

    notes = ()
    has_checksums = property(lambda self: (self.path / CHECKSUMS).exists())

    def __init__(self, path: Path, iteration: int, meta: dict[str, Any], tensors: Tensors, places: dict[str, tuple[str, str]]):
        self.path, self.iteration, self.meta, self.tensors, self.places = path, iteration, meta, tensors, places

    def files(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in self._used()}

    def file_problems(self, verify: str) -> list[str]:
        return checksum_problems(self.path, self._used(), verify)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        yield from zip(names, read_tensors(self.path, [self.places[name] for name in names]))

    def _used(self) -> list[str]:
        indices = [index_name(part) for part in PARTS if (self.path / index_name(part)).exists()]
        return ["config.json", *indices, *dict.fromkeys(file for file, _ in self.places.values())]


def open_source(directory: Path, iteration: int | None = None) -> FlatSource:
    """Names and shapes of all files; ConfigError with all that is wrong with them."""
    parts = parts_in(directory, PARTS)
    if "model" not in parts or not (directory / "config.json").is_file():
        missing = [] if "model" in parts else [f"model.safetensors or {index_name('model')}"]
        missing += [] if (directory / "config.json").is_file() else ["config.json"]
        raise ConfigError([f"{directory}: not a safetensors folder of ours (looked for {' and '.join(missing)})"])
    content, problems = _read_config(directory / "config.json")
    if content and iteration not in (None, content["iteration"]):
        problems.append(f"{directory}: holds iteration {content['iteration']}, not {iteration}; leave --iteration out")
    tensors: Tensors = {}
    places: dict[str, tuple[str, str]] = {}
    for part in parts:
        files, entries, more = read_headers(directory, part)
        problems += more
        tensors |= {our_name(part, stored): entry for stored, entry in entries.items()}
        places |= {our_name(part, stored): (file, stored) for stored, file in files.items()}
    if problems:
        raise ConfigError(problems)
    meta = {name: value for name, value in content.items() if name not in _HEAD}
    return FlatSource(directory, content["iteration"], meta, tensors, places)


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, [f"{path}: cut off or damaged ({error})"]
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != MODEL_TYPE:
        return {}, [f"{path}: of another program (model_type {kind!r}, not {MODEL_TYPE!r})"]
    wrong = [name for name in _HEAD[1:] if type(content.get(name)) is not int]
    if wrong:
        return {}, [f"{path}: {name} must be a whole number, not {content.get(name)!r}" for name in wrong]
    if content["format_version"] > FORMAT_VERSION:
        return {}, [
            f"{path}: format {content['format_version']} is newer than the {FORMAT_VERSION} this version reads; update megatron_moe"
        ]
    return content, []


# ---------------------------------------------------------------- writing


def write(selection: Selection, directory: Path, journal: Journal | None = None, max_shard_size: int = DEFAULT_SHARD_SIZE) -> None:
    """One file after the other, then the configuration, then the checksums of them all."""
    directory.mkdir(exist_ok=True)
    ours: dict[str, dict[str, str]] = {}  # part -> stored name -> our name
    for name in selection.tensors:
        part, stored = stored_name(name)
        ours.setdefault(part, {})[stored] = name
    for file in journal.finished.values() if journal else ():
        selection.credit(file)
    for part, names in ours.items():
        entries = {stored: selection.tensors[name] for stored, name in names.items()}
        behind = lambda stored, names=names: [names[s] for s in stored]  # noqa: E731
        read = lambda stored, behind=behind: _numbers(selection, behind(stored))  # noqa: E731
        write_shards(directory, part, entries, max_shard_size, read, journal, behind)
    head = dict(zip(_HEAD, (MODEL_TYPE, FORMAT_VERSION, selection.source.iteration)))
    write_through(directory / "config.json", json.dumps(head | selection.source.meta, indent=2) + "\n")
    write_checksums(directory, journal.entries if journal else None)


def _numbers(selection: Selection, names: list[str]) -> Iterator[Tensor]:
    return (tensor for _, tensor in selection.read(names))
