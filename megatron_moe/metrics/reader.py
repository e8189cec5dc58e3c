"""Reading metrics.jsonl back: a run that was interrupted, resumed or is still being written."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_moe.metrics.writers import Record


def read_records(path: str | Path) -> list[Record]:
    """Whole records in file order; a half last line, of a crash or of a run that is writing now, is left out."""
    with open(path, "rb") as f:
        *lines, half = f.read().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; remove that line or give another file") from None
    return records


def valid_history(records: list[Record]) -> list[Record]:
    """What the run's final weights have seen: a resumed run overrides what came behind its iteration before.

    Example: logged 10, 20, 30, killed, loaded 15, logged 20, 25 -> 10, 20 (the later one), 25.
    """
    history: list[Record] = []
    newest = -1  # of the training and evaluation records kept so far
    for record in records:
        iteration = record.get("iteration")
        if iteration is not None and record["event"] in ("train", "eval", "load"):
            if iteration <= newest:
                history = [old for old in history if not _overrides(record, old)]
                newest = max((old["iteration"] for old in history if _is_measured(old)), default=-1)
            if _is_measured(record):
                newest = max(newest, iteration)
        history.append(record)
    return history


def _is_measured(record: Record) -> bool:
    return record["event"] in ("train", "eval")


def _overrides(new: Record, old: Record) -> bool:
    """Later iterations are void; the same iteration is void when it is the same measurement."""
    if not _is_measured(old):
        return False
    is_same = (new["event"], new.get("split")) == (old["event"], old.get("split"))
    return old["iteration"] > new["iteration"] or (is_same and old["iteration"] == new["iteration"])
