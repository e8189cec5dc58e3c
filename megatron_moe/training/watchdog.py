"""Says where a rank is when its steps stop: of ranks that wait for each other, the one that is not in a collective is the cause."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

FRAMES = 12  # the innermost; short enough that what several ranks write at once stays apart


class Watchdog:
    """Prints the stack of the thread that made it, whenever `step` has not been called for most of the collectives' timeout.

    So all ranks have printed before the first one gives up and takes the others along.
    """

    def __init__(self, rank: int, timeout_minutes: float):
        self._rank, self._patience = rank, 0.9 * 60 * timeout_minutes
        self._watched, self._last, self._over = threading.get_ident(), time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(max(self._last + self._patience - time.monotonic(), 0.0)):
            if time.monotonic() - self._last >= self._patience:
                stack = traceback.format_stack(sys._current_frames()[self._watched], FRAMES)
                text = f"rank {self._rank}: no step has ended for {self._patience:g} s; it is here, innermost last:\n{''.join(stack)}"
                os.write(2, text.encode())  # in one piece
                self.step()
