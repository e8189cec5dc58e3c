"""Whose turn it is: one thread owns the model, and the calls of clients wait for it in a queue of limited length.

What waits is put into one batch, in the order of its arrival, as far as there is room; what arrives while a batch runs waits for its
end. A job with `runs_alone` shares its batch with nobody: the rounding of a matrix product depends on the number of rows, and a client
that gives a seed wants the same text however busy the server is.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.engine import Engine, Piece, Request
from megatron_moe.inference.serving.protocol import ApiError
from megatron_moe.utils.logging import logger


class Job:
    """The answers that one call wants. `events`: pieces, their rows counted within the job, or the error that ends it."""

    def __init__(self, requests: Sequence[Request], sampling: Sequence[SamplingConfig], runs_alone: bool = False):
        self.requests, self.sampling, self.runs_alone = requests, sampling, runs_alone
        self.events: SimpleQueue[list[Piece] | ApiError] = SimpleQueue()
        self.is_cancelled = False


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping; ask again when it is back", code="stopping")


class Scheduler:
    """Begin with `start`, end with `stop`. All methods may be called from any thread."""

    def __init__(self, engine: Engine, batch_size: int, max_waiting: int, broken: Callable[[], None] = lambda: None):
        """`broken` is called, in the thread of the model, after an error that the engine does not survive."""
        self.engine, self.batch_size, self.max_waiting = engine, batch_size, max_waiting
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._is_stopping = self._is_abandoned = self._is_broken = False
        self._on_broken, self._batch_seconds = broken, 1.0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def counts(self) -> tuple[int, int]:
        """Jobs that are answered now, and those that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    @property
    def is_open(self) -> bool:
        return not (self._is_stopping or self._is_broken)

    def submit(self, job: Job) -> None:
        """Raises ApiError: 429 when the queue is full, 503 when there will be no turn."""
        with self._changed:
            if self._is_broken:
                raise ApiError(503, "the model has failed, and the server has to be started again; its log has the reason", code="broken")
            if self._is_stopping:
                raise stopping()
            # when nothing runs, the first in the queue does not wait: it is about to be taken
            if len(self._waiting) >= self.max_waiting + (0 if self._running else 1):
                seconds = min(60, math.ceil(self._batch_seconds * (1 + len(self._waiting) / self.batch_size)))
                message = (f"the queue is full: {len(self._running)} calls are being answered and {len(self._waiting)} wait "
                           f"(--max-waiting-requests {self.max_waiting}); try again in {seconds} s")  # fmt: skip
                raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest: it leaves the queue at once, or the batch before the next token."""
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self, seconds: float) -> bool:
        """Take nothing new; answer what is there, but for `seconds` at most. False: the model hangs within a step."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join(seconds)
        self.abandon()
        self._thread.join(10)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """End the rest before the next token."""
        with self._changed:
            self._is_stopping = self._is_abandoned = True
            self._fail(self._waiting, stopping())
            self._changed.notify_all()

    # ------------------------------------------------------------ in the thread of the model

    def _work(self) -> None:
        while batch := self._next_batch():
            begin = time.monotonic()
            try:
                self._answer(batch)
            except Exception as error:  # one batch must not end the others
                self._after(batch, error)
            with self._changed:
                self._running.clear()
            self._batch_seconds = 0.7 * self._batch_seconds + 0.3 * (time.monotonic() - begin)

    def _next_batch(self) -> list[Job]:
        """Waits for one. Empty: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_stopping or self._is_broken)
            if self._is_broken or not self._waiting:
                return []
            self._running = together(self._waiting, self.batch_size)
            self._waiting = [job for job in self._waiting if job not in self._running]
            return list(self._running)

    def _answer(self, batch: list[Job]) -> None:
        rows = [(job, row) for job in batch for row in range(len(job.requests))]
        left = {job: len(job.requests) for job in batch}
        sampling = [s for job in batch for s in job.sampling]
        steps = self.engine.stream(
            [r for job in batch for r in job.requests], sampling, cancelled=lambda row: rows[row][0].is_cancelled or self._is_abandoned
        )
        for pieces in steps:
            mine: dict[Job, list[Piece]] = {}
            for piece in pieces:
                job, row = rows[piece.row]
                mine.setdefault(job, []).append(Piece(row, piece.text, piece.token, piece.finish))
                left[job] -= piece.finish is not None
            for job, own in mine.items():
                job.events.put(own)
            with self._changed:  # a short answer need not wait for the long ones beside it to be counted as done
                self._running = [job for job in self._running if left[job]]

    def _after(self, batch: list[Job], error: Exception) -> None:
        logger.exception("a batch has failed")
        with self._changed:
            self._fail(
                batch, ApiError(500, f"the answer has failed ({type(error).__name__}); the server's log has the reason", code="failed")
            )
            # the other ranks are somewhere in the middle of the batch, and nobody can call them back
            self._is_broken = self.engine.loaded.layout.is_split
            if self._is_broken:
                self._fail(self._waiting, ApiError(503, "the model has failed; the server ends", code="broken"))
        if self._is_broken:
            self._on_broken()

    def _fail(self, jobs: list[Job], error: ApiError) -> None:
        for job in jobs:
            job.events.put(error)
        jobs.clear()


def together(waiting: Sequence[Job], batch_size: int) -> list[Job]:
    """The first job always, so that everyone's turn comes; with it the others that fit."""
    batch, room = [waiting[0]], batch_size - len(waiting[0].requests)
    if waiting[0].runs_alone:
        return batch
    for job in waiting[1:]:
        if not job.runs_alone and len(job.requests) <= room:
            batch.append(job)
            room -= len(job.requests)
    return batch
