"""A conversion that can go on: what of its target is finished, in a directory beside the target.

    TARGET.partial/                     the files of the target, until all are there and have been looked at
    TARGET.partial/journal.jsonl        {"conversion": {...}}, then one line per finished file: {"file", "size", "crc32", "tensors"}

A line is written when its file is on the disk. The same conversion, started again, takes every file whose size and CRC-32 are those of
its line and writes the others; another conversion is refused the directory. A line that was cut off is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.files import describe_file
from megatron_moe.config.flags import ConfigError

SUFFIX = ".partial"
NAME = "journal.jsonl"
LOCK = "lock"


def partial_directory(target: Path) -> Path:
    target = target.resolve()
    return target.with_name(target.name + SUFFIX)


class Journal:
    """`finished`: file (relative to the directory) -> the tensors of the source that are in it."""

    def __init__(self, directory: Path, conversion: dict[str, Any]):
        self.directory, self.finished = directory, {}
        self.entries: dict[str, dict[str, int]] = {}
        self._path = directory / NAME
        conversion = json.loads(json.dumps(conversion))  # tuples become lists, as they come back
        head, *lines = _read_lines(self._path) if self._path.exists() else [{"conversion": conversion}]
        if head.get("conversion") != conversion:
            raise ConfigError([
                f"{directory} is left of another conversion, or its source has changed since; delete it to start this one"
            ])  # fmt: skip
        for line in lines:
            self._take(line)
        for entry in sorted(directory.rglob("*"), reverse=True):  # half a file must not be taken for a part of the target
            name = entry.relative_to(directory).as_posix()
            if entry.is_file() and name not in (NAME, LOCK) and name not in self.finished:
                entry.unlink()
            elif entry.is_dir() and not any(entry.iterdir()):
                entry.rmdir()
        self._rewrite(conversion)

    def _take(self, line: dict[str, Any]) -> None:
        try:
            name, entry = str(line["file"]), {"size": int(line["size"]), "crc32": int(line["crc32"])}
            tensors = [str(t) for t in line["tensors"]]
        except (KeyError, TypeError, ValueError):
            return
        path = (self.directory / name).resolve()
        if self.directory.resolve() in path.parents and path.is_file() and describe_file(path) == entry:
            self.finished[name], self.entries[name] = tensors, entry

    def _rewrite(self, conversion: dict[str, Any]) -> None:
        """Without torn lines and files that are gone."""
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(json.dumps({"conversion": conversion}) + "\n")
            for name, tensors in self.finished.items():
                file.write(json.dumps({"file": name, **self.entries[name], "tensors": tensors}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, name: str, entry: dict[str, int], tensors: Iterable[str]) -> None:
        """`name` is whole and on the disk."""
        self.finished[name], self.entries[name] = list(tensors), entry
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, **entry, "tensors": self.finished[name]}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines or [{}]
