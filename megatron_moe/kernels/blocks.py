"""Going through a matrix in blocks of rows, so that what is computed in between never leaves the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Elements of a block. On a CPU its few temporaries stay in the second-level cache of a core; elsewhere blocks only bound memory.
CPU_BLOCK, BLOCK = 1 << 18, 1 << 26


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a block, one at least."""
    return max((CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else BLOCK) // max(width, 1), 1)


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Consecutive slices of range(rows), none for no rows."""
    step = block_rows(width, device)
    return (slice(start, start + step) for start in range(0, rows, step))
