"""Numbers of a run for people: the csv_monitor and tensorboard sections of a DeepSpeed JSON.

csv_monitor    OUTPUT_PATH/JOB_NAME/Train_Samples_lr.csv: a file for each name, a line of "step,value" for each event
tensorboard    OUTPUT_PATH/JOB_NAME
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe.utils.logging import is_rank_zero

Event = tuple[str, float, int]  # name, value, step


class Monitor:
    """Rank 0 writes; elsewhere, and without either section, nothing is written and `enabled` says so."""

    def __init__(self, sections: dict[str, Any]):
        self._csv, self._board = None, None
        if not is_rank_zero():
            return
        if sections.get("csv_monitor"):
            self._csv = _directory(sections, "csv_monitor")
            self._csv.mkdir(parents=True, exist_ok=True)
        if sections.get("tensorboard"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    f"tensorboard.enabled is true and it cannot be imported ({error}); pip install tensorboard, or switch it off"
                ) from None
            self._board = SummaryWriter(str(_directory(sections, "tensorboard")))

    @property
    def enabled(self) -> bool:
        return self._csv is not None or self._board is not None

    def write_events(self, events: Iterable[Event], flush: bool = True) -> None:
        for name, value, step in events:
            if self._csv is not None:
                self._write_line(name, float(value), int(step))
            if self._board is not None:
                self._board.add_scalar(name, float(value), int(step))
        if flush and self._board is not None:
            self._board.flush()

    def _write_line(self, name: str, value: float, step: int) -> None:
        path = self._csv / f"{name.replace('/', '_').replace(' ', '_')}.csv"
        is_new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"step,{name}\n" * is_new + f"{step},{value!r}\n")


def _directory(sections: dict[str, Any], kind: str) -> Path:
    return Path(sections.get(f"{kind}_output_path") or f"{kind}_logs") / sections.get(f"{kind}_job_name", "DeepSpeedJobName")
