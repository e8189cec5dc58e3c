"""What each step of a run takes: how many sequences, and how long. Pure functions of how far the run is; no torch.

Two things change the pace. A batch ramp-up follows the samples that were consumed, a sequence-length curriculum follows the
iterations: both are known at every step of every resumed run, so nothing about them is saved. Both only ever grow, so a run is a
short list of phases, each with one batch size and one length, and sums over a million steps are sums over those.

Worked example, --rampup-batch-size 2 2 12 with --global-batch-size 6 and length 10:
    step            1   2   3   4   5   6   7
    batch size      2   2   2   4   4   6   6      2 up to 6 samples, 4 up to 12
    samples after   2   4   6  10  14  20  26      tokens: ten times that
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Consumed(NamedTuple):
    """How far a run is."""

    iterations: int = 0
    samples: int = 0
    tokens: int = 0

    def of(self, unit: str) -> int:
        return getattr(self, unit)


@dataclass(frozen=True)
class RampUp:
    """The global batch grows from `start` by `increment` until it is `full`, over `samples` samples (Megatron-LM's rule).

    In whole numbers: Megatron divides in floating point, and can be a step late where a batch ends exactly on a boundary.
    """

    start: int
    increment: int
    samples: int
    full: int

    def batch_size(self, consumed_samples: int) -> int:
        increments = (self.full - self.start) // self.increment
        if consumed_samples >= self.samples:
            return self.full
        return self.start + self.increment * (consumed_samples * increments // self.samples)


@dataclass(frozen=True)
class Phase:
    """Steps of one batch size and one length, from `start` on; the last phase has no end."""

    start: Consumed
    batch: int
    length: int

    def per_step(self, unit: str) -> int:
        return {"iterations": 1, "samples": self.batch, "tokens": self.batch * self.length}[unit]

    def after(self, steps: int) -> Consumed:
        return Consumed(*(self.start.of(u) + steps * self.per_step(u) for u in Consumed._fields))


class Pace:
    """`batch_size` is a function of the samples consumed, `length` of the step (from 1); both reach `full` and `longest` and stay."""

    def __init__(
        self,
        full: int,
        longest: int,
        batch_size: Callable[[int], int] | None = None,
        length: Callable[[int], int] | None = None,
        start: Consumed = Consumed(),  # noqa: B008 - immutable
    ):
        self.full, self.longest = full, longest
        self.batch_size, self.length = batch_size or (lambda samples: full), length or (lambda step: longest)
        self.phases = list(self._all_phases(start))

    def step_after(self, done: Consumed) -> tuple[int, int]:
        """(sequences, length) of the next step."""
        return self.batch_size(done.samples), self.length(done.iterations + 1)

    def after(self, iterations: int) -> Consumed:
        """Where the run is then."""
        phase = self._phase("iterations", iterations)
        return phase.after(iterations - phase.start.iterations)

    def iterations_at(self, unit: str, amount: float) -> float:
        """Steps until that much is consumed, with the part of a last one."""
        return self.convert(amount, unit, "iterations")

    def steps_until(self, unit: str, amount: int) -> int:
        """Whole steps until at least that much is consumed."""
        phase = self._phase(unit, amount)
        return phase.start.iterations - (phase.start.of(unit) - amount) // phase.per_step(unit)

    def convert(self, amount: float, unit: str, to: str) -> float:
        """How much of `to` is consumed when `amount` of `unit` is; exact from a coarser to a finer unit."""
        phase = self._phase(unit, amount)
        more, have, want = amount - phase.start.of(unit), phase.per_step(unit), phase.per_step(to)
        return phase.start.of(to) + (more * (want // have) if want % have == 0 else more * want / have)

    def _phase(self, unit: str, amount: float) -> Phase:
        """The phase in which `amount` is reached: the last one that starts before it."""
        return next((p for p in reversed(self.phases) if p.start.of(unit) < amount), self.phases[0])

    def _all_phases(self, at: Consumed) -> Iterator[Phase]:
        while True:
            phase = Phase(at, *self.step_after(at))
            yield phase
            if (phase.batch, phase.length) == (self.full, self.longest):
                return
            at = phase.after(self._steps_alike(phase))

    def _steps_alike(self, phase: Phase) -> int:
        """Number of steps of this phase: neither size ever falls, so bisection finds the first step that differs."""

        def is_alike(steps: int) -> bool:
            return self.step_after(phase.after(steps)) == (phase.batch, phase.length)

        alike, other = 0, 1
        while is_alike(other):
            alike, other = other, 2 * other
        while other - alike > 1:
            middle = (alike + other) // 2
            alike, other = (middle, other) if is_alike(middle) else (alike, middle)
        return other
