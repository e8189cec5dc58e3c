"""Rank-aware logging: rank 0 speaks, unless a message says that it concerns one rank."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("megatron_moe")


def setup_logging() -> None:
    """One plain line per message on stderr. Called once by entry points; libraries only use `logger`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)


def is_rank_zero() -> bool:
    """True in the process that reports; read from the launcher, so that it holds before torch.distributed starts."""
    return int(os.environ.get("RANK", "0")) == 0
