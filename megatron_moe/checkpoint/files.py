"""A run directory on disk: names, manifest, checksums, tracker. Nothing here imports torch.

DIR/latest_checkpointed_iteration.txt   "100": a hint for people and scripts, never trusted
DIR/best_checkpoint.json                which one had the lowest validation loss (--save-best); DIR/best is short for that one
DIR/iter_0000100/manifest.json          what the checkpoint holds and the checksum of every file
DIR/iter_0000100/.metadata, __0_0.distcp, __1_0.distcp, ...   written by torch.distributed.checkpoint
DIR/iter_0000100.tmp-1a2b3c4d/          a save that has not ended; left behind only when the process was killed
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpoint.json"
_BLOCK = 1 << 20  # bytes read at a time


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message is the same on every rank."""


# ---------------------------------------------------------------- names


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations_in(directory: Path) -> list[int]:
    """Iterations that have a directory, ascending. Whether they are intact is another question."""
    if not directory.is_dir():
        return []
    names = [re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in directory.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in names if match)


def other_format(directory: Path) -> str | None:
    """What to do with a directory that holds weights, but no checkpoint of ours."""
    if any((directory / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        if not (directory / "checksums.json").exists():
            return "it holds safetensors; a folder of transformers is given to --load-hf, or tools/convert_checkpoint.py makes a run directory of it"
        return "it holds safetensors; tools/convert_checkpoint.py --from safetensors --to native makes a run directory of them"
    if any(directory.glob("mp_rank_*_model_states.pt")) or any(directory.glob("*/mp_rank_*_model_states.pt")):
        return "it holds DeepSpeed's files; tools/convert_checkpoint.py --from megatron-deepspeed --to native makes a run directory of them"
    return None


def temporary_name(name: str, purpose: str = "tmp") -> str:
    return f"{name}.{purpose}-{uuid.uuid4().hex[:8]}"


def leftovers_in(directory: Path) -> list[Path]:
    """What an interrupted save, or an interrupted deletion, left behind."""
    if not directory.is_dir():
        return []
    pattern = re.compile(rf"(iter_\d{{7,}}|{re.escape(TRACKER)}|{re.escape(BEST)})\.tmp-(del-)?[0-9a-f]{{8}}")
    return sorted(entry for entry in directory.iterdir() if pattern.fullmatch(entry.name))


def best_directory(directory: str | Path) -> Path:
    """runs/a/best -> runs/a/iter_0000100 when that is the best one; every other path as it is. ValueError for a note that is damaged."""
    path = Path(directory)
    if path.name != "best" or path.exists() or not (path.parent / BEST).exists():
        return path
    try:
        return path.with_name(iteration_name(read_best(path.parent).iteration))
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def run_directory(directory: str | Path, step: int | None) -> tuple[Path, int | None]:
    """runs/a/iter_0000100 -> (runs/a, 100), and runs/a/best likewise; ValueError for a contradiction."""
    path = best_directory(directory)
    match = re.fullmatch(r"iter_(\d{7,})", path.name)
    if match is None:
        return path, step
    if step not in (None, int(match[1])):
        raise ValueError(f"{path} is the checkpoint of iteration {int(match[1])}, not of {step}; give the run directory {path.parent}")
    return path.parent, int(match[1])


# ---------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `meta` is the caller's."""

    iteration: int
    world_size: int
    tensors: dict[str, dict[str, Any]]  # name -> {"shape": [4, 2], "dtype": "float32"}
    files: dict[str, dict[str, int]]  # name -> {"size": bytes, "crc32": number}
    meta: dict[str, Any]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Into the checkpoint directory `path`, and onto the disk."""
    content = {"format_version": FORMAT_VERSION, **vars(manifest)}
    content["crc32"] = _self_checksum(content)
    write_through(path / MANIFEST, _readable(content))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint directory `path`; CheckpointError names the file and what is wrong with it."""
    where = f"{path.name}/{MANIFEST}"
    try:
        content = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing, so this is not a checkpoint or not a complete one") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where}: cut off or damaged ({error})") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{where}: not a checkpoint manifest")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{where}: format {version} is newer than the {FORMAT_VERSION} this version reads; update megatron_moe")
    if content.pop("crc32", None) != _self_checksum(content):
        raise CheckpointError(f"{where}: its content does not match its own CRC-32")
    manifest = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    if iteration_name(manifest.iteration) != path.name:
        raise CheckpointError(f"{where}: belongs to {iteration_name(manifest.iteration)}, the directory was renamed")
    if outside := [name for name in manifest.files if Path(name).name != name]:
        raise CheckpointError(f"{where}: refers to {outside[0]!r}, outside the checkpoint directory")
    return manifest


def _readable(content: dict[str, Any]) -> str:
    """JSON with one line per tensor and per file."""
    blocks = []
    for key, value in json.loads(json.dumps(content)).items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else ""
        blocks.append(f" {json.dumps(key)}: " + (f"{{\n{lines}\n }}" if lines else json.dumps(value)))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _self_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of everything else in the manifest, in one spelling: sorted, no spaces, as it reads back from JSON."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


# ---------------------------------------------------------------- checksums


def describe_file(path: Path, written: dict[str, int] | None = None) -> dict[str, int]:
    """Size and CRC-32. Of a file whose bytes were counted as they were `written`, only the size is compared; OSError if it is another."""
    size = path.stat().st_size
    if written is None:
        return {"size": size, "crc32": crc32(path)}
    if size != written["size"]:
        raise OSError(errno.EIO, f"{written['size']} bytes were written, and the file has {size}", str(path))
    return written


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def file_problems(path: Path, files: dict[str, dict[str, int]], verify: str, names: Iterable[str] | None = None) -> list[str]:
    """Compare files with their manifest entries. `verify`: "size" looks at the length, "crc" reads everything, "off" nothing."""
    assert verify in ("crc", "size", "off"), verify
    problems = []
    for name in [] if verify == "off" else files if names is None else names:
        where, expected = f"{path.name}/{name}", files[name]
        try:
            size = (path / name).stat().st_size
            if size != expected["size"]:
                problems.append(f"{where}: size mismatch ({size} bytes found, {expected['size']} expected)")
            elif verify == "crc" and (found := crc32(path / name)) != expected["crc32"]:
                problems.append(f"{where}: CRC-32 mismatch ({found:08x} found, {expected['crc32']:08x} expected)")
        except FileNotFoundError:
            problems.append(f"{where}: missing ({expected['size']} bytes expected)")
        except OSError as error:
            problems.append(f"{where}: cannot be read ({error})")
    return problems


def problems_in(path: Path, verify: str) -> list[str]:
    """Everything that is wrong with one checkpoint, by one process."""
    try:
        return file_problems(path, read_manifest(path).files, verify)
    except CheckpointError as error:
        return [str(error)]


# ---------------------------------------------------------------- tracker


def write_tracker(directory: Path, iteration: int) -> None:
    """Replaced as a whole: a reader sees the old number or the new one."""
    temporary = directory / temporary_name(TRACKER)
    write_through(temporary, str(iteration))
    os.replace(temporary, directory / TRACKER)
    sync_directory(directory)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation loss so far."""

    iteration: int
    lm_loss: float


def write_best(directory: Path, best: Best) -> None:
    """Replaced as a whole, like the tracker."""
    temporary = directory / temporary_name(BEST)
    write_through(temporary, json.dumps(vars(best)) + "\n")
    os.replace(temporary, directory / BEST)
    sync_directory(directory)


def read_best(directory: Path) -> Best | None:
    """None where there is none; CheckpointError for a file that cannot be understood."""
    try:
        best = Best(**json.loads((directory / BEST).read_text()))
        if type(best.iteration) is int and type(best.lm_loss) is float and math.isfinite(best.lm_loss):
            return best
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError):
        pass
    raise CheckpointError(
        f"{directory / BEST} cannot be understood; name a checkpoint yourself, or delete the file to have none that is best"
    )


def tracker_note(directory: Path, newest: int) -> str | None:
    """A sentence when the tracker does not name the newest directory."""
    try:
        text = (directory / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return f"{TRACKER} is missing; the directories count"
    return (
        None
        if text == str(newest)
        else f"{TRACKER} says {text[:40]!r}, the newest directory is {iteration_name(newest)}; directories count"
    )


# ---------------------------------------------------------------- safe steps


def write_through(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk knows the names in this directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(path: Path) -> None:
    """Rename, then delete: a half-deleted checkpoint never carries the name of a whole one."""
    doomed = path.with_name(temporary_name(path.name, "tmp-del"))
    os.rename(path, doomed)
    shutil.rmtree(doomed)
