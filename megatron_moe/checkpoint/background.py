"""Save while training goes on: what a step waits for is one copy of its tensors to the memory of the host.

    this thread              copy of the tensors (Stager) | the next steps ......................... | conclude()
    torch's async_save                                    | directory, shards (dcp.save)
    a thread of ours                                                              | sizes, manifest, rename, tracker, deletions

The steps are those of CheckpointManager.save, in the same order, over the manager's process group. That group belongs to saving
alone: its exchanges and those of the training steps come in any order. Every rank ends with the same result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_moe.checkpoint.files import Best
from megatron_moe.checkpoint.manager import WRITER_OPTIONS, CheckpointManager, Place
from megatron_moe.checkpoint.writer import CountingWriter, Seen
from megatron_moe.utils.compat import with_local

Clock = Callable[[], float]  # seconds


class Stager:
    """Copies tensors to host memory that no step writes to: what torch's `async_save` calls an AsyncStager.

    The memory is as large as this rank's part of the checkpoint, pinned where the tensors are on a device, and kept from one copy to the
    next: a copy must be written before the next one is made. torch's own DefaultStager does the same, but for once only in torch 2.11
    (its issue 183413).
    """

    should_synchronize_after_execute = False  # `stage` returns when the copy is made

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        staged = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return staged

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            buffer = self._buffers[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda, requires_grad=False)
        buffer.copy_(local, non_blocking=True)
        return with_local(tensor, buffer) if isinstance(tensor, DTensor) else buffer

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    def close(self) -> None:
        self._buffers.clear()


class BackgroundSave:
    """One save, begun. Collective, and so is `conclude`; one at a time."""

    def __init__(
        self, manager: CheckpointManager, stager: Stager, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any],
        best: Best | None = None, clock: Clock = time.perf_counter,
    ):  # fmt: skip
        assert manager.ranks.is_distributed, "saving in the background needs a process group of its own"
        self.iteration, self.best, self._manager, self._clock, self._start = iteration, best, manager, clock, clock()
        self._error: BaseException | None = None
        self.seconds = 0.0  # from the beginning to the end, once it is concluded
        writer = _Writer(manager.seen, lambda: manager.begin(iteration, tensors, meta, best))
        try:
            # reset() is called with the checkpoint_id, before anything else is done in the background
            upload = dcp.async_save(
                dict(tensors), checkpoint_id=manager.directory, storage_writer=writer, async_stager=stager,
                process_group=manager.ranks.group,
            )  # fmt: skip
            work = lambda: self._complete(upload, writer)  # noqa: E731
        except Exception as error:  # no memory for the copy, say: the other ranks have begun and must hear of it
            work = lambda error=error: self._report(error)  # noqa: E731
        self.waited_seconds = clock() - self._start  # what the caller has waited for
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether this rank has done its part."""
        return not self._thread.is_alive()

    def conclude(self) -> None:
        """Wait for its end. Raises on every rank what CheckpointManager.save would have raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------ in the background

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again where it is asked for
            self._error = error
        self.seconds = self._clock() - self._start

    def _complete(self, upload: Any, writer: _Writer) -> None:
        """As soon as torch has written, or failed to."""
        failure = upload.exception()
        if isinstance(failure, _AlreadySaved):
            return
        if writer.place is None:  # failed before there was a directory, on all ranks alike
            assert failure is not None
            raise failure
        place = writer.place

        def outcome() -> None:
            with self._manager.explained(place.size):
                upload.result()

        self._manager.complete(place, outcome)

    def _report(self, error: Exception) -> None:
        """Take part in the first exchange of `begin`, with the reason why there is nothing to save."""

        def fail() -> None:
            raise error

        self._manager.ranks.all("collecting the tensors", fail)


class _AlreadySaved(Exception):  # noqa: N818 - no error
    """Ends torch's save: the checkpoint is on the disk."""


class _Writer(CountingWriter):
    """Learns where to write in the background: the making of a directory can take its time, too."""

    def __init__(self, seen: Seen, begin: Callable[[], Place | None]):
        # no copy ahead: with one, a thread that has set no device waits for streams of the first one, and takes memory there, on every rank
        super().__init__("to be told", seen, per_thread_copy_ahead=0, **WRITER_OPTIONS)
        self._begin, self.place = begin, None

    def reset(self, checkpoint_id: Any = None) -> None:
        self.place = self._begin()
        if self.place is None:
            raise _AlreadySaved
        super().reset(self.place.building)
