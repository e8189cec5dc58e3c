"""Short sequences first: the length that a step trains on grows with the iteration (arXiv 2108.06084; DeepSpeed's curriculum_learning)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, fields_of, flag, int_list


@dataclass(frozen=True)
class CurriculumConfig:
    """Sequence-length curriculum. Samples are cut to the current length, evaluation is at full length, and tokens are counted as trained."""

    curriculum_learning: bool = flag(False, "train on shorter sequences first")
    curriculum_schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete"] = flag(
        "fixed_linear", "how the length grows: with the step, with its root (--curriculum-root-degree), or by a table"
    )
    curriculum_min_difficulty: int | None = flag(None, "length of the first steps, in tokens", minimum=1)
    curriculum_max_difficulty: int | None = flag(None, "length at the end; --seq-length when not given", minimum=1)
    curriculum_total_step: int | None = flag(None, "steps until the longest (total_curriculum_step in DeepSpeed's JSON)", minimum=1)
    curriculum_difficulty_step: int = flag(
        8, "lengths in between are multiples of this; 8 or more keeps matrix products fast, larger ones make fewer different lengths",
        minimum=1)  # fmt: skip
    curriculum_root_degree: float = flag(2.0, "fixed_root: degree of the root", above=0)
    curriculum_difficulty: tuple[int, ...] | None = flag(
        None, "fixed_discrete: the lengths, ascending", parse=int_list, minimum=1, metavar="N"
    )
    curriculum_max_step: tuple[int, ...] | None = flag(
        None, "fixed_discrete: the last step of each length but the last one, ascending", parse=int_list, minimum=1, metavar="N"
    )

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.curriculum_learning:
            yield from self._table_problems() if self.curriculum_schedule_type == "fixed_discrete" else self._ramp_problems()

    def _ramp_problems(self) -> Iterator[str]:
        kind, low, high = self.curriculum_schedule_type, self.curriculum_min_difficulty, self.curriculum_max_difficulty
        for name in ("curriculum_min_difficulty", "curriculum_total_step"):
            if getattr(self, name) is None:
                yield f"--curriculum-schedule-type {kind} needs --{name.replace('_', '-')}"
        if low and high and low > high:
            yield f"--curriculum-min-difficulty ({low}) must not exceed --curriculum-max-difficulty ({high})"

    def _table_problems(self) -> Iterator[str]:
        lengths, steps = self.curriculum_difficulty or (), self.curriculum_max_step or ()
        if len(lengths) != len(steps) + 1:
            yield (f"--curriculum-schedule-type fixed_discrete needs --curriculum-difficulty with one length more than --curriculum-max-step "
                   f"has steps, not {len(lengths)} and {len(steps)}: the last length has no last step")  # fmt: skip
        for name, values in (("difficulty", lengths), ("max-step", steps)):
            if list(values) != sorted(set(values)):
                yield f"--curriculum-{name} must ascend, not {' '.join(map(str, values))}"

    @property
    def idle(self) -> dict[str, str]:
        """Flags that were given and do nothing -> the setting under which they would."""
        kind, ramp = self.curriculum_schedule_type, ("min_difficulty", "max_difficulty", "total_step", "difficulty_step")
        used = {"fixed_linear": ramp, "fixed_root": (*ramp, "root_degree"), "fixed_discrete": ("difficulty", "max_step")}
        found = {}
        for s in fields_of(type(self)):
            name = s.name.removeprefix("curriculum_")
            if getattr(self, s.name) == s.default or name == "learning":
                continue
            if not self.curriculum_learning:
                found[s.option] = "--curriculum-learning"
            elif name != "schedule_type" and name not in used[kind]:
                found[s.option] = f"--curriculum-schedule-type {' and '.join(k for k, names in used.items() if name in names)}"
        return found

    def longest(self, seq_length: int) -> int:
        if not self.curriculum_learning:
            return seq_length
        if self.curriculum_schedule_type == "fixed_discrete":
            return (self.curriculum_difficulty or (seq_length,))[-1]
        return self.curriculum_max_difficulty or seq_length

    def length(self, step: int, seq_length: int) -> int:
        """Tokens per sequence of a step, counted from 1.

        DeepSpeed's rule but for two things: a shortest length that is no multiple of the difficulty step is not rounded down, and the
        longest is reached whether or not it is one.
        """
        if not self.curriculum_learning:
            return seq_length
        if self.curriculum_schedule_type == "fixed_discrete":
            later = sum(step > last for last in self.curriculum_max_step or ())
            return (self.curriculum_difficulty or ())[later]
        low, high, total = self.curriculum_min_difficulty or 1, self.longest(seq_length), self.curriculum_total_step or 1
        if step >= total:
            return high
        root = 1.0 if self.curriculum_schedule_type == "fixed_linear" else self.curriculum_root_degree
        length = math.floor((step / total) ** (1.0 / root) * (high - low) + low)
        return min(max(length - length % self.curriculum_difficulty_step, low), high)
