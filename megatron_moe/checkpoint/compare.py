"""Is a checkpoint of this architecture? Imports nothing heavy."""

from __future__ import annotations

import json
from typing import Any

SHOWN = 10  # differences listed
_FLAGS = {"experts_per_layer": "--num-experts", "padded_vocab_size": "padded vocabulary"}  # what follows from flags of another name


def architecture_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A table, one line per differing field under a head line; empty when the weights fit."""
    saved, now = json.loads(json.dumps(saved)), json.loads(json.dumps(now))  # tuples read back as lists
    names = [name for name in [*now, *(n for n in saved if n not in now)] if saved.get(name) != now.get(name)]
    if not names:
        return []
    rows = [("flag", "checkpoint", "now")]
    rows += [(_FLAGS.get(name, "--" + name.replace("_", "-")), _shown(saved.get(name)), _shown(now.get(name))) for name in names[:SHOWN]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = [f"{flag:{widths[0]}}  {then:{widths[1]}}  {here}" for flag, then, here in rows]
    return table + ([f"... and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])


def _shown(value: Any) -> str:
    return "-" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
