"""The table of --list-presets. Imports no torch: it is printed at once."""

from __future__ import annotations

from megatron_moe.config.data import MOCK_VOCAB_SIZE
from megatron_moe.config.presets import GPT2_VOCAB_SIZE, PRESETS, Preset
from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import parameter_counts

HEAD = ("preset", "what it is", "parameters", "active", "ranks")


def preset_table() -> str:
    """One line per preset. Ranks: what its degrees of parallelism fit; with others, override those."""
    rows = [HEAD, *(_row(name, preset) for name, preset in PRESETS.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _row(name: str, preset: Preset) -> tuple[str, ...]:
    run = RunConfig.from_values(preset.settings)
    counts = parameter_counts(run.model, run.moe, MOCK_VOCAB_SIZE if name == "tiny" else GPT2_VOCAB_SIZE)
    return name, preset.what, _short(counts.total), _short(counts.active), str(preset.ranks)


def _short(number: int) -> str:
    """13011234816 -> 13.0B"""
    unit, letter = (10**9, "B") if number >= 10**9 else (10**6, "M")
    return f"{number / unit:.1f}{letter}"
