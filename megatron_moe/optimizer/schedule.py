"""Learning rate and weight decay: pure functions of how far the run has come.

Progress is measured in one unit for warm-up and decay together: the finest one among the given flags (tokens before samples
before iterations); without any, iterations over the whole run, or samples where the batch grows. The other lengths are converted
at the pace of the run: what its steps take, batch ramp-up and curriculum included.

A step asks for its rate with the counters that INCLUDE it, so that the first of 5 warm-up steps runs at lr/5 and the fifth
at lr. (DeepSpeed asks before it counts: its first token-based steps have a rate of zero.)

Worked example, lr 1.0, min_lr 0.1, 5 warm-up iterations, linear decay over 15:
    iteration     1    2    3    4    5    6     10    15   16
    rate         .2   .4   .6   .8    1   .91   .55   .1   .1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_moe.config.pace import Consumed, Pace
from megatron_moe.config.training import OptimizerConfig

UNITS = Consumed._fields  # coarse to fine


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm-up, then one of the decay styles. Lengths count `unit`s; `first_step` is what the first step of the run adds to them."""

    max_lr: float
    min_lr: float
    style: str
    unit: str
    first_step: float
    warmup: float
    decay: float  # from the start of the run, warm-up included
    wsd_decay: float = 0.0  # length of the last phase of WSD
    wsd_style: str = "exponential"

    def at(self, iterations: int, samples: int, tokens: int) -> float:
        """Rate of the step after which the run will have consumed this much."""
        return self.at_progress({"iterations": iterations, "samples": samples, "tokens": tokens}[self.unit])

    def at_progress(self, t: float) -> float:
        """The same, `t` in the schedule's own unit."""
        if t <= self.warmup and self.warmup > 0:
            return self.max_lr * t / self.warmup
        if self.style == "constant":
            return self.max_lr
        if t > self.decay:
            return self.min_lr
        if self.style == "inverse-square-root":
            # Without warm-up the curve starts at the first step, whatever the unit.
            start = max(self.warmup, self.first_step)
            return max(self.min_lr, self.max_lr * math.sqrt(start / max(t, start)))
        if self.style == "WSD":
            ratio = _clamped_ratio(t, self.decay - self.wsd_decay, self.decay)
            share = _remaining_share(self.wsd_style, ratio)
        else:
            share = _remaining_share(self.style, _clamped_ratio(t, self.warmup, self.decay))
        return self.min_lr + (self.max_lr - self.min_lr) * share


def _clamped_ratio(t: float, start: float, end: float) -> float:
    return min(max((t - start) / (end - start), 0.0), 1.0) if end > start else 1.0


def _remaining_share(style: str, ratio: float) -> float:
    """Falls from 1 at ratio 0 to 0 at ratio 1."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * ratio))
    assert style == "exponential", style
    return 2.0 * 0.5**ratio - 1.0  # a half-life curve, shifted and stretched to end at 0 exactly


def build_schedule(optimizer: OptimizerConfig, pace: Pace, train_iterations: int) -> LearningRateSchedule:
    """Settles the unit and converts every length to it. Raises ValueError when warm-up and decay do not fit."""
    unit = _unit_of(optimizer, pace)
    decay = _length(optimizer, "lr_decay", pace, unit) or pace.after(train_iterations).of(unit)
    warmup = _length(optimizer, "lr_warmup", pace, unit)
    if optimizer.lr_warmup_fraction:
        warmup = optimizer.lr_warmup_fraction * decay
    if optimizer.lr_decay_style != "constant" and warmup > decay:
        raise ValueError(
            f"the learning-rate warm-up ({warmup:g} {unit}) must not be longer than warm-up and decay together ({decay:g} {unit}); "
            f"shorten --lr-warmup-{unit_flag(unit)} or lengthen --lr-decay-{unit_flag(unit)} (the whole run when not given)"
        )
    wsd_decay = 0.0
    if optimizer.lr_decay_style == "WSD":
        wsd_decay = _wsd_decay(optimizer, warmup, decay, pace, unit)
    return LearningRateSchedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        style=optimizer.lr_decay_style,
        unit=unit,
        first_step=pace.after(1).of(unit),
        warmup=warmup,
        decay=decay,
        wsd_decay=wsd_decay,
        wsd_style=optimizer.lr_wsd_decay_style,
    )


def unit_flag(unit: str) -> str:
    """How the flags call a unit: --lr-decay-iters, --lr-decay-samples, --lr-decay-tokens."""
    return "iters" if unit == "iterations" else unit


def _unit_of(optimizer: OptimizerConfig, pace: Pace) -> str:
    """The finest unit that a flag was given in: the coarser lengths convert to it without rounding. Megatron counts samples where
    no flag says otherwise, which is the same as iterations as long as the batch does not grow."""
    for unit in reversed(UNITS):
        if any(getattr(optimizer, f"{name}_{unit_flag(unit)}") for name in ("lr_decay", "lr_warmup")):
            return unit
    return "iterations" if pace.phases[0].batch == pace.full else "samples"


def _length(optimizer: OptimizerConfig, name: str, pace: Pace, unit: str) -> float:
    """Warm-up or decay in the schedule's unit; 0 when no flag gives it. The config allows one flag of each at most."""
    given = {u: getattr(optimizer, f"{name}_{unit_flag(u)}") for u in UNITS[: UNITS.index(unit) + 1]}
    return sum(pace.convert(length, u, unit) for u, length in given.items() if length)


def _wsd_decay(optimizer: OptimizerConfig, warmup: float, decay: float, pace: Pace, unit: str) -> float:
    if optimizer.lr_wsd_decay_iters is None:
        return min(decay / 10, decay - warmup)
    end, start = pace.iterations_at(unit, decay), pace.iterations_at(unit, warmup)
    if start + optimizer.lr_wsd_decay_iters > end:
        raise ValueError(
            f"--lr-wsd-decay-iters ({optimizer.lr_wsd_decay_iters}) does not fit behind the warm-up: of {end:g} iterations the warm-up "
            f"takes {start:g}; use at most {int(end - start)}"
        )
    return decay - pace.convert(end - optimizer.lr_wsd_decay_iters, "iterations", unit)


@dataclass(frozen=True)
class WeightDecaySchedule:
    """From `start` to `end` over the samples of the run, then `end` (Megatron-LM's rule)."""

    start: float
    end: float
    style: str
    samples: int

    def at(self, samples: int) -> float:
        """Weight decay of the step after which the run will have consumed this much."""
        if self.style == "constant":
            return self.end
        ratio = _clamped_ratio(samples, 0, self.samples)
        return self.start + (self.end - self.start) * (1.0 - _remaining_share(self.style, ratio))


def build_weight_decay(optimizer: OptimizerConfig, pace: Pace, train_iterations: int) -> WeightDecaySchedule:
    start, end, style = optimizer.start_weight_decay, optimizer.end_weight_decay, optimizer.weight_decay_incr_style
    if start is None or end is None:
        start = end = optimizer.weight_decay
    return WeightDecaySchedule(start, end, style, pace.after(train_iterations).samples)
