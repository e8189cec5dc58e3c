"""The table of --list-presets. Imports no torch: it is printed at once."""

from __future__ import annotations

import dataclasses
import textwrap

from megatron_moe.config.data import MOCK_VOCAB_SIZE
from megatron_moe.config.presets import GPT2_VOCAB_SIZE, PRESETS, Preset
from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import ParameterCounts, parameter_counts

CONVENTION = (
    "Parameters count the embedding once where it is tied to the output, positions where they are learned, and the vocabulary before "
    "padding (a run pads it to a multiple of --make-vocab-size-divisible-by); active counts, of each layer's experts, those that a token "
    "passes. Multi-token prediction is in none of these models (--mtp-num-layers adds it): DeepSeek's 671B is without it, its 685B with it."
)
HEAD = ("preset", "what it is", "parameters", "active", "ranks")


def preset_table() -> str:
    """One line per preset, and what is counted. Ranks: what its degrees of parallelism fit; with others, override those."""
    rows = [HEAD, *(_row(name, preset) for name, preset in PRESETS.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *textwrap.wrap(CONVENTION, 120)])


def _row(name: str, preset: Preset) -> tuple[str, ...]:
    counts = preset_counts(name)
    return name, preset.what, _short(counts.total), _short(counts.active), str(preset.ranks)


def preset_counts(name: str) -> ParameterCounts:
    """Without the rows that pad the vocabulary."""
    run = RunConfig.from_values(PRESETS[name].settings)
    model = dataclasses.replace(run.model, make_vocab_size_divisible_by=1)
    return parameter_counts(model, run.moe, MOCK_VOCAB_SIZE if name == "tiny" else model.vocab_size or GPT2_VOCAB_SIZE)


def _short(number: int) -> str:
    """13011234816 -> 13.0B"""
    unit, letter = (10**9, "B") if number >= 10**9 else (10**6, "M")
    return f"{number / unit:.1f}{letter}"
