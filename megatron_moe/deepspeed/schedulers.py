"""DeepSpeed's learning-rate schedules: the rate of a group as a function of the step, counted from 0.

An engine steps its schedule behind the optimizer, so the step that trains next has the rate of the number before it: with a warm-up
from zero the first two steps have rate zero, as they have in DeepSpeed. (Pretraining asks before it counts: optimizer/schedule.py.)

Worked example, WarmupLR, linear, 4 steps, from 0 to 1:
    training step   1    2    3    4    5    6
    rate            0    0   .25   .5  .75   1
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch.optim import Optimizer


class Schedule:
    """Sets the rate of every group of an optimizer. `last_batch_iteration` is -1 before the first step, as DeepSpeed counts."""

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1):
        self.optimizer, self.last_batch_iteration = optimizer, last_batch_iteration
        self.first_lrs = [group["lr"] for group in optimizer.param_groups]
        if last_batch_iteration == -1:
            self._set()

    def rate(self, step: int, first_lr: float) -> float:
        """Of a group that was built with rate `first_lr`; `step` may be -1."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        return [self.rate(self.last_batch_iteration, lr) for lr in self.first_lrs]

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        self.last_batch_iteration = self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        self._set()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr()):
            group["lr"] = rate


class _Warmup(Schedule):
    """Length and shape of a warm-up."""

    def __init__(self, optimizer: Optimizer, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int):
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type must be log or linear, not {warmup_type!r}")
        self.warmup_num_steps, self.warmup_type = max(2, warmup_num_steps), warmup_type
        super().__init__(optimizer, last_batch_iteration)

    def share(self, step: int) -> float:
        """Of the warm-up that is behind: 0 to 1."""
        if step >= self.warmup_num_steps:
            return 1.0
        return math.log(step + 1) / math.log(self.warmup_num_steps) if self.warmup_type == "log" else step / self.warmup_num_steps


class WarmupLR(_Warmup):
    """From warmup_min_lr to warmup_max_lr (the group's own rate where there is none), then constant."""

    def __init__(self, optimizer: Optimizer, warmup_min_lr: float = 0.0, warmup_max_lr: float | None = None, warmup_num_steps: int = 1000,
                 warmup_type: str = "log", last_batch_iteration: int = -1):  # fmt: skip
        self.low, self.high = warmup_min_lr, warmup_max_lr
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def rate(self, step: int, first_lr: float) -> float:
        high = first_lr if self.high is None else self.high
        return self.low if step < 0 else self.low + (high - self.low) * self.share(step)


class WarmupDecayLR(WarmupLR):
    """The same, and from the end of the warm-up a straight line that is at the lowest rate after total_num_steps."""

    def __init__(self, optimizer: Optimizer, total_num_steps: int, warmup_min_lr: float = 0.0, warmup_max_lr: float | None = 0.001,
                 warmup_num_steps: int = 1000, warmup_type: str = "log", last_batch_iteration: int = -1):  # fmt: skip
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def share(self, step: int) -> float:
        if step < self.warmup_num_steps:
            return super().share(step)
        return max(0.0, (self.total_num_steps - step) / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Ratios of the group's own rate: up from warmup_min_ratio to 1, then half a cosine down to cos_min_ratio."""

    def __init__(self, optimizer: Optimizer, total_num_steps: int, warmup_min_ratio: float = 0.0, warmup_num_steps: int = 1000,
                 cos_min_ratio: float = 0.0001, warmup_type: str = "log", last_batch_iteration: int = -1):  # fmt: skip
        self.total_num_steps, self.warmup_min_ratio, self.cos_min_ratio = total_num_steps, warmup_min_ratio, cos_min_ratio
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def rate(self, step: int, first_lr: float) -> float:
        return first_lr * self.ratio(step)

    def ratio(self, step: int) -> float:
        if step < 0:
            return 0.0
        if step < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self.share(step)
        progress = min(1.0, (step - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2)


class LRRangeTest(Schedule):
    """Rises from lr_range_test_min_lr without end, by step_rate times that every step_size steps: which rate is too much?"""

    def __init__(self, optimizer: Optimizer, lr_range_test_min_lr: float = 1e-3, lr_range_test_step_size: int = 2000,
                 lr_range_test_step_rate: float = 1.0, lr_range_test_staircase: bool = False, last_batch_iteration: int = -1):  # fmt: skip
        self.low, self.size, self.rise = lr_range_test_min_lr, lr_range_test_step_size, lr_range_test_step_rate
        self.is_staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def rate(self, step: int, first_lr: float) -> float:
        rises = (step + 1) / self.size
        return self.low * (1.0 + self.rise * (math.floor(rises) if self.is_staircase else rises))


class OneCycle(Schedule):
    """One triangle from cycle_min_lr to cycle_max_lr and back, then a decay. The momentum (beta 1 of Adam) goes the other way: from
    cycle_max_mom down and up again, then it rises."""

    def __init__(self, optimizer: Optimizer, cycle_min_lr: float, cycle_max_lr: float, decay_lr_rate: float = 0.0,
                 cycle_first_step_size: int = 2000, cycle_second_step_size: int | None = None, cycle_first_stair_count: int = 0,
                 cycle_second_stair_count: int | None = None, decay_step_size: int = 0, cycle_momentum: bool = True,
                 cycle_min_mom: float = 0.8, cycle_max_mom: float = 0.9, decay_mom_rate: float = 0.0,
                 last_batch_iteration: int = -1):  # fmt: skip
        self.rates, self.moms = (cycle_min_lr, cycle_max_lr), (cycle_min_mom, cycle_max_mom)
        self.up = cycle_first_step_size
        self.down = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.stairs = (cycle_first_stair_count, cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count)
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.momentum_key = next((k for k in ("betas", "momentum") if k in optimizer.defaults), None) if cycle_momentum else None
        super().__init__(optimizer, last_batch_iteration)

    def height(self, step: int) -> float:
        """0 at both ends of the cycle, 1 in the middle."""
        at = (step + 1) % (self.up + self.down)
        is_up = at <= self.up
        height, stairs = (at / self.up, self.stairs[0]) if is_up else ((self.up + self.down - at) / self.down, self.stairs[1])
        return math.floor(height * stairs + 1e-9) / stairs if stairs else height

    def decays(self, step: int) -> float:
        """How often a decay has been made since the cycle ended."""
        return (step - self.up - self.down + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def rate(self, step: int, first_lr: float) -> float:
        low, high = self.rates
        if step < self.up + self.down:
            return low + (high - low) * self.height(step)
        return low / (1.0 + self.decay_lr_rate * self.decays(step))

    def momentum(self, step: int) -> float:
        low, high = self.moms
        if step < self.up + self.down:
            return high - (high - low) * self.height(step)
        return high * (1.0 + self.decay_mom_rate * self.decays(step))

    def _set(self) -> None:
        super()._set()
        momentum = self.momentum(self.last_batch_iteration)
        for group in self.optimizer.param_groups if self.momentum_key else ():
            group[self.momentum_key] = (momentum, group["betas"][1]) if self.momentum_key == "betas" else momentum


SCHEDULES = {cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)}
_NEEDED = {"WarmupDecayLR": ["total_num_steps"], "WarmupCosineLR": ["total_num_steps"], "OneCycle": ["cycle_min_lr", "cycle_max_lr"]}


def scheduler_problems(section: dict[str, Any]) -> list[str]:
    """What is wrong with a scheduler section whose keys and values are right one by one."""
    params = {name: value for name, value in section.items() if name != "scheduler_type"}
    kind = section.get("scheduler_type")
    if kind is None:
        return (
            [f"the scheduler section has parameters ({', '.join(params)}) and no type; give one of {', '.join(SCHEDULES)}"]
            if params
            else []
        )
    known = [name for name in inspect.signature(SCHEDULES[kind]).parameters if name not in ("optimizer", "last_batch_iteration")]
    problems = [f"scheduler.params.{name} is no parameter of {kind}, which has {', '.join(known)}" for name in params if name not in known]
    return problems + [f"scheduler.params.{name} is missing: {kind} needs it" for name in _NEEDED.get(kind, ()) if name not in params]


def build_scheduler(section: dict[str, Any], optimizer: Optimizer) -> Schedule | None:
    """The schedule that a scheduler section asks for, if any."""
    kind = section.get("scheduler_type")
    return None if kind is None else SCHEDULES[kind](optimizer, **{n: v for n, v in section.items() if n != "scheduler_type"})
