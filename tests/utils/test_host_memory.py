"""Memory that a CPU run keeps instead of mapping it anew in each step."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from megatron_moe.utils.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(1 << 20), torch.ones(1 << 24)]  # 4 and 64 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""


def run(word: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_what_was_freed_is_used_again():
    kept, faults = run("keep")
    assert kept == "True" and faults < 2000 < run("drop")[1]  # 17,000 pages of 4 KiB each time


BREAK = """
import ctypes
from megatron_moe.utils.host_memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
assert keep_freed_memory()
blocks = [libc.malloc(3 << 29) for _ in range(2)]  # 1.5 GiB each; nobody writes to them
end = libc.sbrk(0)
for block in blocks:
    libc.free(block)
print(all(blocks), (end - libc.sbrk(0)) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_more_than_two_gigabytes_side_by_side_are_kept_too():
    done = subprocess.run([sys.executable, "-c", BREAK], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "0"], done.stdout + done.stderr


def test_other_systems_are_left_alone(monkeypatch):
    from megatron_moe.utils import host_memory

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert host_memory.keep_freed_memory() is False
