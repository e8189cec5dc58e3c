"""Says where a rank is when its steps stop: of ranks that wait for each other, the one that is not in a collective is the cause."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

from megatron_moe.training.last_words import LastWords

FRAMES = 12  # the innermost; short enough that what several ranks write at once stays apart


class Watchdog:
    """Prints the stack of the thread that made it, whenever `step` has not been called for most of the collectives' timeout, and
    raises the alarm with `last_words`.

    So all ranks have printed before the first one gives up and takes the others along.
    """

    def __init__(self, rank: int, timeout_minutes: float, last_words: LastWords | None = None):
        self._rank, self._patience, self._last_words = rank, 0.9 * 60 * timeout_minutes, last_words
        self._watched, self._last, self._over = threading.get_ident(), time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step(self, iteration: int = 0) -> None:
        """A step begins."""
        self._last = time.monotonic()
        if self._last_words is not None:
            self._last_words.iteration = iteration

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(max(self._last + self._patience - time.monotonic(), 0.0)):
            if time.monotonic() - self._last >= self._patience:
                stack = traceback.format_stack(sys._current_frames()[self._watched], FRAMES)
                self._write(f"no step has ended for {self._patience:g} s; it is here, innermost last:\n{''.join(stack)}")
                if self._last_words is not None and (digest := self._last_words.digest()):
                    self._write(digest)
                self._last = time.monotonic()

    def _write(self, text: str) -> None:
        os.write(2, f"rank {self._rank}: {text}\n".encode())  # in one piece
