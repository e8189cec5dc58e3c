"""Kernels in CUDA C++: a .cu of this folder becomes a library at its first use, by nvcc alone, and is called through ctypes.

The library lies in a cache folder, under a name that says what it was made of: source, compiler, architecture. Processes that want it at the
same time wait for one of them, and it appears by a rename, so nobody loads half of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_moe.utils.logging import logger

HERE = Path(__file__).resolve().parent
OLDEST = (9, 0)  # bulk copies came with compute capability 9.0


def problem(capability: tuple[int, int]) -> str | None:
    """Why the kernels of this folder cannot be had on a GPU of this compute capability; None when they can."""
    if capability < OLDEST:
        return f"its bulk copies need a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and this one has {capability[0]}.{capability[1]}"
    if nvcc() is None:
        return "it is compiled by nvcc, which is neither in $CUDA_HOME/bin nor on the PATH; install the CUDA toolkit"
    return None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    at_home = Path(home, "bin", "nvcc") if home else None
    return str(at_home) if at_home is not None and at_home.exists() else shutil.which("nvcc")


def compile_command(source: Path, output: Path, capability: tuple[int, int], *options: str) -> list[str]:
    number = f"{capability[0]}{capability[1]}"
    return [
        nvcc() or "nvcc",
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{number},code=sm_{number}",
        *options,
        "-o",
        str(output),
        str(source),
    ]


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "megatron_moe"


@functools.cache
def load(name: str, capability: tuple[int, int]) -> ctypes.CDLL:
    """The library of NAME.cu. Raises RuntimeError with nvcc's words when it cannot be compiled."""
    return ctypes.CDLL(str(built(HERE / f"{name}.cu", capability, cache_folder())))


def built(source: Path, capability: tuple[int, int], folder: Path) -> Path:
    """Path of the library of `source`, compiled unless it is there."""
    command = compile_command(source, Path("out"), capability, "-shared", "-Xcompiler", "-fPIC")
    library = folder / f"{source.stem}-{_digest(source, command)}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, also by a process that dies
        if not library.exists():
            _compile(source, library, capability)
    return library


def _digest(source: Path, command: list[str]) -> str:
    """Of everything that decides what the library is."""
    compiler = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    parts = [" ".join(command[1:-1]).encode(), compiler, *(f.read_bytes() for f in sorted(source.parent.glob("*.cu*")))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(source: Path, library: Path, capability: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        done = subprocess.run(compile_command(source, output, capability, "-shared", "-Xcompiler", "-fPIC"), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {source.name} (exit code {done.returncode}):\n{done.stderr[-4000:]}")
        os.replace(output, library)
    logger.info("%s compiled by nvcc for compute capability %d.%d: %s", source.name, *capability, library)
