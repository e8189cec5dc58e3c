"""Work that the ranks do together: they all get the results, or they all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_moe.checkpoint.files import CheckpointError

T = TypeVar("T")
ALONE = object()  # instead of a process group: this rank by itself, also where there are others


class Ranks:
    """The ranks that share a checkpoint: a process group, the default one, or this process when there is none, or it wants to be ALONE."""

    def __init__(self, process_group: dist.ProcessGroup | object | None = None):
        self.is_distributed = process_group is not ALONE and dist.is_available() and dist.is_initialized()
        self.group = process_group if self.is_distributed else None
        self.rank = dist.get_rank(self.group) if self.is_distributed else 0
        self.size = dist.get_world_size(self.group) if self.is_distributed else 1

    def all(self, step: str, work: Callable[[], T]) -> list[T]:
        """`work()` on every rank; the results in rank order. One rank's exception is a CheckpointError on every rank."""
        result, error = _attempt(work)
        replies = [(result, _text(error))]
        if self.is_distributed:
            replies = [None] * self.size
            dist.all_gather_object(replies, (result, _text(error)), group=self.group)
        failures = {rank: text for rank, (_, text) in enumerate(replies) if text is not None}
        if failures:
            raise CheckpointError(_summary(step, failures, self.size)) from error
        return [reply for reply, _ in replies]

    def first(self, step: str, work: Callable[[], T]) -> T:
        """`work()` on rank 0 only; its result, or its exception as a CheckpointError, on every rank."""
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        reply = [(result, _text(error), isinstance(error, CheckpointError))]
        if self.is_distributed:
            source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            dist.broadcast_object_list(reply, src=source, group=self.group)
        result, text, is_ours = reply[0]
        if text is not None:
            raise CheckpointError(text if is_ours else f"{step} failed: {text}") from error
        return result


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _text(error: Exception | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return str(error) if error else None
    return f"{type(error).__name__}: {error}"


def _summary(step: str, failures: dict[int, str], size: int) -> str:
    """`saving failed on rank 1: OSError: ...`; the same text on all ranks is said once."""
    if len(failures) == size and len(set(failures.values())) == 1:
        return f"{step} failed: {failures[0]}"
    return "\n".join(f"{step} failed on rank {rank}: {text}" for rank, text in list(failures.items())[:10])
