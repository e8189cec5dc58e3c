"""How the allocator of the host treats memory that was freed."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1  # an int; larger blocks are mapped as before
NEVER = -1  # of trimming: freed blocks that lie side by side are one, and the gradients of a wide layer are more than 2 GiB together


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to blocks of 2 GiB, and use it again; False where the C library is not glibc's.

    A training step on a CPU makes and frees the same tensors each time. By default glibc maps the large ones anew, and the kernel
    fills them with zeros page by page: a tenth of a step in bf16. What is kept is what a step needs at its peak, which comes back with
    the next one.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, MOST) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))
