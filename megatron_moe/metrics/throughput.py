"""How fast a run goes and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What happened since the last log line."""

    iterations: int
    tokens: int
    seconds: float

    @property
    def iteration_time_ms(self) -> float:
        return 1000 * self.seconds / max(self.iterations, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Throughput:
    """Counts steps and tokens between log lines; evaluation and saving go into `excluded()`.

        throughput.add(tokens)                       # each step
        with throughput.excluded(): evaluate(...)    # not the time of a training step
        window = throughput.restart()                # each log line

    NOTE: call `restart` after the loss was read: on CUDA a step is only launched until something waits for it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._begin()

    def add(self, tokens: int, iterations: int = 1) -> None:
        self._tokens += tokens
        self._iterations += iterations

    @contextmanager
    def excluded(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - start

    def restart(self) -> Window:
        """The window that ends now; the next one begins."""
        window = Window(self._iterations, self._tokens, self._clock() - self._start - self._excluded)
        self._begin()
        return window

    def _begin(self) -> None:
        self._start = self._clock()
        self._iterations = self._tokens = 0
        self._excluded = 0.0


def tflops_per_device(flops_per_token: float, tokens_per_second: float, num_devices: int) -> float:
    """Model FLOPs only: recomputation does not make a run look faster."""
    return flops_per_token * tokens_per_second / num_devices / 1e12


def peak_memory_bytes(device_type: str) -> int:
    """The most that was allocated so far: by torch on this GPU, by the whole process on a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def format_duration(seconds: float) -> str:
    """3725 -> '1:02:05', 200000 -> '2 days, 7:33:20'."""
    if not 0 <= seconds < float("inf"):
        return "unknown"
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' if days > 1 else ''}, {clock}" if days else clock
