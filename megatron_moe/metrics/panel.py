"""The MoE layers of a logged step as a table of text, at most 120 columns wide.

layer experts  max/mean  min/mean  dead  dropped  entropy  logits  MiB sent  load
    2       8      1.75      0.41     0    12.3%     0.93     2.1      12.5  [====-+=*]

Beside "MiB sent" stands "far", what of it went to other nodes, where that is known and anything did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

MOST_BARS = 32  # experts that are shown one by one
WIDTH = 120
FULL_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # eighths of a character cell, from empty to full
ASCII_BLOCKS = " .:-=+*#@"


@dataclass(frozen=True)
class Column:
    """One number of a layer; the column is left out where no layer has it."""

    title: str
    width: int
    text: Callable[[Record], str]
    is_of: Callable[[Record], bool] = lambda r: True


COLUMNS = (
    Column("layer", 5, lambda r: str(r["layer"])),
    Column("experts", 8, lambda r: str(len(r["expert_load"]))),
    Column("max/mean", 9, lambda r: f"{_number(r['load_max_over_mean']):.2f}"),
    Column("min/mean", 9, lambda r: f"{_number(r['load_min_over_mean']):.2f}"),
    Column("dead", 5, lambda r: str(r["dead_experts"])),
    Column("dropped", 8, lambda r: f"{100 * _number(r['dropped_fraction']):.1f}%"),
    Column("entropy", 8, lambda r: f"{_number(r['router_entropy']):.2f}"),
    Column("logits", 7, lambda r: f"{_number(r.get('router_logit_rms')):.1f}"),
    Column("bias", 13, lambda r: "" if r["bias_min"] is None else f"{r['bias_min']:.2f}..{r['bias_max']:.2f}",
           lambda r: r.get("bias_min") is not None),
    Column("MiB sent", 9, lambda r: f"{r['sent_bytes'] / 2**20:.1f}", lambda r: bool(r.get("sent_bytes"))),
    Column("far", 9, lambda r: "" if r.get("sent_bytes_far") is None else f"{r['sent_bytes_far'] / 2**20:.1f}",
           lambda r: bool(r.get("sent_bytes_far"))),
)  # fmt: skip


def expert_panel(layers: Sequence[Record], most_rows: int | None = None, blocks: str | None = None) -> Iterator[str]:
    """`layers` are moe_layer_records. Of more than `most_rows`, those with the busiest experts, and what the others have at most."""
    blocks = blocks or blocks_of(sys.stdout)
    busiest = sorted(layers, key=lambda r: _number(r["load_max_over_mean"]), reverse=True)
    shown, rest = sorted(busiest[:most_rows], key=lambda r: r["layer"]), busiest[most_rows:] if most_rows else []
    columns = [c for c in COLUMNS if any(map(c.is_of, layers))]
    most_bars = min(MOST_BARS, WIDTH - sum(c.width for c in columns) - len("  []"))
    is_sorted = any(len(r["expert_load"]) > most_bars for r in shown)
    yield "".join(c.title.rjust(c.width) for c in columns) + f"  load{', sorted' if is_sorted else ''} ({blocks[4]} mean)"
    for r in shown:
        yield "".join(c.text(r).rjust(c.width) for c in columns) + f"  [{load_bars(r['expert_load'], blocks, most_bars)}]"
    if rest:
        yield (f"{len(rest)} more layers: max/mean at most {_number(rest[0]['load_max_over_mean']):.2f}, {sum(r['dead_experts'] for r in rest)} "
               f"dead, at most {100 * max(_number(r['dropped_fraction']) for r in rest):.1f}% dropped (--moe-panel all shows them)")  # fmt: skip


def load_bars(shares: Sequence[float | None], blocks: str, most: int = MOST_BARS) -> str:
    """One character per expert in their order; of more than `most`, as many from the busiest to the idlest."""
    loads = [(share or 0.0) * len(shares) for share in shares]
    if len(loads) > most:
        ordered = sorted(loads, reverse=True)
        loads = [ordered[i * (len(ordered) - 1) // (most - 1)] for i in range(most)]
    return "".join(block_of(load, blocks) for load in loads)


def block_of(load_over_mean: float, blocks: str) -> str:
    """Half height is the mean, full height twice the mean or more; blank only for an expert without a single token."""
    if load_over_mean <= 0:
        return blocks[0]
    return blocks[min(max(round(load_over_mean * 4), 1), 8)]


def blocks_of(stream: Any) -> str:
    """What this stream can print."""
    try:
        FULL_BLOCKS.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return ASCII_BLOCKS
    return FULL_BLOCKS


def _number(value: float | None) -> float:
    """null in metrics.jsonl is a number that was not finite."""
    return float("nan") if value is None else value
