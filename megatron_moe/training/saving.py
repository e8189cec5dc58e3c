"""When a run saves, whether it waits for the disk, and what becomes of a save. Every rank makes the same calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_moe.checkpoint.background import BackgroundSave, Stager
from megatron_moe.checkpoint.files import Best, CheckpointError, iterations_in, read_best
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.config.output import CheckpointConfig
from megatron_moe.metrics.tracker import Tracker
from megatron_moe.utils.logging import logger

GROUP = "checkpoint saves"  # how the process group of saves in the background is called


class Saver:
    """Saves of one run, in the background with --async-save.

    A rank is done with such a save earlier or later than others, and only rank 0's clock counts minutes: `asks` are the questions
    which the ranks answer for each other after every step, with the exchange that a Stopper makes anyway.

    ranks: for what is agreed on between steps; those of the manager may be busy with a save.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        manager: CheckpointManager,
        tracker: Tracker,
        ranks: Ranks,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.config, self.manager, self._ranks = config, manager, ranks
        self._tracker, self._clock = tracker, clock
        self._stager, self._under_way = Stager(), None
        self._noted = self._best = self._due = None  # the best checkpoint: on the disk; of all evaluations; to be noted by the next save
        self._last = clock()  # when the last save began; before that, this run

    @property
    def asks(self) -> list[Callable[[], bool]]:
        """Whether a save is still written; whether it is time for one. Nothing, where neither can be."""
        return [self._is_writing, self._is_time] if self.config.async_save or self.config.save_interval_minutes else []

    def _is_writing(self) -> bool:
        return self._under_way is not None and not self._under_way.is_over

    def _is_time(self) -> bool:
        minutes = self.config.save_interval_minutes
        return minutes is not None and self.manager.ranks.rank == 0 and self._clock() - self._last >= 60 * minutes

    def after_step(self, iteration: int, answers: list[bool]) -> bool:
        """`answers` to `asks`, True where any rank said so. Reports a save that all ranks are done with; whether one is due now."""
        is_writing, is_time = answers or (False, False)
        if not is_writing:
            self._conclude(iteration)
        interval = self.config.save_interval
        return is_time or bool(interval and iteration % interval == 0)

    def go_on_from(self, iteration: int) -> None:
        """Where the run starts, with what it knows of the best checkpoint before. Collective."""
        if self.config.save_best:
            self._noted = self._best = self._ranks.first("reading the best checkpoint", lambda: self._known_best(iteration))

    def _known_best(self, iteration: int) -> Best | None:
        """Rank 0. Not one that is gone, nor one ahead of a run that has fallen back: that one is damaged, or will come again."""
        best = read_best(self.manager.directory)
        there = iterations_in(self.manager.directory)
        return best if best is not None and best.iteration in there and best.iteration <= iteration else None

    def evaluated(self, iteration: int, lm_loss: float) -> None:
        """The validation loss after a step, or of what was loaded. Collective; the loss that rank 0 has counts."""
        if (
            self.config.save_best
            and iteration
            and (best := self._ranks.first("comparing with the best", lambda: self._better(iteration, lm_loss)))
        ):
            self._best = self._due = best

    def _better(self, iteration: int, lm_loss: float) -> Best | None:
        is_better = math.isfinite(lm_loss) and (self._best is None or lm_loss < self._best.lm_loss)
        return Best(iteration, lm_loss) if is_better else None

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation asks for a save."""
        return self._due is not None

    def save(self, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Between steps. In the background, the tensors may change as soon as this returns."""
        waited = self._wait(iteration)
        if waited:
            self._tracker.event(
                "alert", iteration=iteration, reason=f"waited {waited:.1f} s for the save before to end: the disk is slower than the saves come; "
                "save less often",
            )  # fmt: skip
        self._last = self._clock()
        if self.config.async_save:
            best, self._due = self._due, None
            self._under_way = BackgroundSave(self.manager, self._stager, iteration, tensors, meta, best)
            self._under_way.waited_seconds += waited
            return
        try:
            self._save_now(iteration, tensors, meta)
        except CheckpointError as error:  # the same on every rank, and nothing half-written
            self._failed(iteration, error)

    def save_last(self, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """The end of the run: what cannot be saved then is lost, so that always raises. One that was under way before is history."""
        self.settle(iteration)
        self._save_now(iteration, tensors, meta)

    def settle(self, iteration: int) -> None:
        """Wait for what is under way, whatever becomes of it."""
        try:
            if waited := self._wait(iteration):
                logger.info("waited %.1f s for the save in the background to end", waited)
        except Exception as error:
            with suppress(OSError):  # where metrics are written to the same full disk, the terminal has heard of it before
                self._tracker.event("alert", iteration=iteration, reason=str(error))

    # ------------------------------------------------------------ steps

    def _save_now(self, iteration: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        start, best, self._due = self._clock(), self._due, None
        self.manager.save(iteration, tensors, meta, best=best)
        seconds = self._clock() - start
        self._saved(iteration, seconds, seconds, best)

    def _wait(self, iteration: int) -> float:
        """For a save that is under way to end; seconds, 0 where it has ended or there is none."""
        start, is_writing = self._clock(), self._is_writing()
        self._conclude(iteration)
        return self._clock() - start if is_writing else 0.0

    def _conclude(self, iteration: int) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.conclude()
        except CheckpointError as error:
            self._failed(iteration, error)
        else:
            self._saved(under_way.iteration, under_way.seconds, under_way.waited_seconds, under_way.best)

    def _saved(self, iteration: int, seconds: float, waited_seconds: float, best: Best | None) -> None:
        self._noted = best or self._noted
        self._tracker.event(
            "save", iteration=iteration, path=self.config.save, seconds=round(seconds, 3), waited_seconds=round(waited_seconds, 3)
        )

    def _failed(self, iteration: int, error: CheckpointError) -> None:
        self._best = self._due or self._noted  # a best one that was not saved is none
        if self.config.save_failure == "stop":
            raise error
        self._tracker.event("alert", iteration=iteration, reason=f"{error}; training goes on (--save-failure continue)")


def saving_group(config: CheckpointConfig, cpu_group: dist.ProcessGroup, **options: Any) -> dist.ProcessGroup:
    """Of gloo: the one of all small exchanges, but for saves in the background, which meet whenever they do. Collective."""
    return dist.new_group(backend="gloo", group_desc=GROUP, **options) if config.async_save else cpu_group
