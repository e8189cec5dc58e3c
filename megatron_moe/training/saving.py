"""When a run saves, whether it waits for the disk, and what becomes of a save. Every rank makes the same calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_moe.checkpoint.background import BackgroundSave, Stager
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.config.output import CheckpointConfig
from megatron_moe.metrics.tracker import Tracker
from megatron_moe.utils.logging import logger

GROUP = "checkpoint saves"  # how the process group of saves in the background is called


class Saver:
    """Saves of one run, in the background with --async-save.

    A rank is done with such a save earlier or later than others, and only rank 0's clock counts minutes: `asks` are the questions
    which the ranks answer for each other after every step, with the exchange that a Stopper makes anyway.
    """

    def __init__(self, config: CheckpointConfig, manager: CheckpointManager, tracker: Tracker, clock: Callable[[], float] = time.monotonic):
        self.config, self.manager = config, manager
        self._tracker, self._clock = tracker, clock
        self._stager, self._under_way = Stager(), None
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
            self._under_way = BackgroundSave(self.manager, self._stager, iteration, tensors, meta)
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
        start = self._clock()
        self.manager.save(iteration, tensors, meta)
        seconds = self._clock() - start
        self._saved(iteration, seconds, seconds)

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
            self._saved(under_way.iteration, under_way.seconds, under_way.waited_seconds)

    def _saved(self, iteration: int, seconds: float, waited_seconds: float) -> None:
        self._tracker.event(
            "save", iteration=iteration, path=self.config.save, seconds=round(seconds, 3), waited_seconds=round(waited_seconds, 3)
        )

    def _failed(self, iteration: int, error: CheckpointError) -> None:
        if self.config.save_failure == "stop":
            raise error
        self._tracker.event("alert", iteration=iteration, reason=f"{error}; training goes on (--save-failure continue)")


def saving_group(config: CheckpointConfig, cpu_group: dist.ProcessGroup, **options: Any) -> dist.ProcessGroup:
    """Of gloo: the one of all small exchanges, but for saves in the background, which meet whenever they do. Collective."""
    return dist.new_group(backend="gloo", group_desc=GROUP, **options) if config.async_save else cpu_group
