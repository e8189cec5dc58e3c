"""Orders of samples on disk, so that one process draws them and all others read.

A file's name includes a hash of everything that its contents depend on, so what is there is right or damaged, never stale.
Files appear whole (written beside, then renamed): processes that draw the same order at once write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.utils.atomic import atomic_write

logger = logging.getLogger(__name__)

# Below this many positions an order takes milliseconds to draw, and files would only litter the folder.
CACHE_FROM = 1 << 18


def cache_name(stem: str, key: Sequence[Any]) -> str:
    """File name that differs as soon as anything in `key` (JSON-like) does."""
    return f"{stem}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.npy"


def load_or_draw(paths: Sequence[Path], draw: Callable[[], Sequence[np.ndarray]], check: Callable[..., None]) -> Sequence[np.ndarray]:
    """Arrays from their files if all are there and sound, else drawn and left there for others.

    `check` takes the arrays and raises ValueError for what cannot be right.
    """
    try:
        return _loaded(paths, check)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        logger.warning("rebuilding the index cache %s: %s", ", ".join(map(str, paths)), error)
    arrays = draw()
    try:
        for path, array in zip(paths, arrays, strict=True):
            os.makedirs(path.parent, exist_ok=True)
            with atomic_write(path) as file:
                np.save(file, array, allow_pickle=False)
        return _loaded(paths, check)  # maps of the files: memory that the processes of a machine share
    except OSError as error:
        logger.warning("no index cache in %s (%s): orders stay in memory; --data-cache-path moves it", paths[0].parent, error.strerror)
        return arrays


def _loaded(paths: Sequence[Path], check: Callable[..., None]) -> list[np.ndarray]:
    # Plain arrays over the maps: an element of np.memmap takes several times as long.
    arrays = [np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths]
    check(*arrays)
    return arrays


def check_permutation(order: np.ndarray, count: int, dtype: np.dtype | type) -> None:
    """Cheap proof that `order` is a permutation of range(count): shape, type, range and sum. ValueError if it is not."""
    if order.shape != (count,) or order.dtype != dtype:
        raise ValueError(f"it holds {order.dtype}{list(order.shape)} where {count} positions are wanted")
    if int(order.max()) >= count or int(order.sum(dtype=np.uint64)) != count * (count - 1) // 2:
        raise ValueError(f"it is not a permutation of {count} positions")
