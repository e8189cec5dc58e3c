"""Two traces -> a verdict: a table of what was compared, and the first thing that differs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.training.replicas import Drift
from megatron_moe.training.verify.reference import Trace

# Relative to the largest element of the same tensor. Sums in another order differ by 1e-14 here, a fault by 1e-5 and more.
LIMIT = 1e-10
FLOOR = 1e-3  # tensors that are zero by symmetry, as key biases are, are measured against this
ORDER = ("loss", "loss further on", "distance to the teacher", "routing", "gradient norm", "gradient", "weight")


@dataclass(frozen=True)
class Difference:
    """One tensor that is not what it should be."""

    quantity: str
    step: int
    name: str
    error: float  # largest difference over the largest element
    factor: float | None  # the layout's is about this many times the reference's; None where it is no multiple

    def __str__(self) -> str:
        what = f"{self.quantity}{f' of {self.name}' if self.name else ''} in step {self.step}"
        how = "is missing" if math.isinf(self.error) else f"is off by {self.error:.1e} of its largest element"
        times = "" if self.factor is None else f"; it is {self.factor:.6g} times what it should be"
        return f"{what} {how}{times}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantity: str
    compared: int
    worst: str
    error: float
    differing: int

    @property
    def is_equal(self) -> bool:
        return not self.differing


@dataclass(frozen=True)
class Verdict:
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    drifts: tuple[Drift, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differences and not self.drifts

    @property
    def first(self) -> Difference | None:
        """The one to look at. Of gradients the nearest to the loss, where the backward begins: those behind it may follow from it."""
        return self.differences[0] if self.differences else None


def compare(found: Trace, expected: Trace, drifts: Sequence[Drift]) -> Verdict:
    errors = {key: _error(found.values.get(key), value) for key, value in expected.values.items()}
    errors |= dict.fromkeys(found.values.keys() - expected.values.keys(), math.inf)
    place = {key: i for i, key in enumerate(expected.values)}  # the order of the model
    differing = [key for key, error in errors.items() if not error < LIMIT]

    def order(key: tuple[str, int, str]) -> tuple:
        quantity, step, _ = key
        backwards = -1 if quantity == "gradient" else 1
        return _cause(quantity, step, differing), backwards * place.get(key, 0)

    differences = tuple(
        Difference(*key, errors[key], _factor(found.values.get(key), expected.values.get(key))) for key in sorted(differing, key=order)
    )
    return Verdict(tuple(_rows(errors, len(drifts))), differences, tuple(drifts))


def _cause(quantity: str, step: int, differing: Sequence[tuple[str, int, str]]) -> tuple:
    """What comes first explains the rest: forward, then gradients before their norm, then the update; then the next step."""
    forward = ("routing", "loss", "loss further on", "distance to the teacher")
    return step, 0 if quantity in forward else {"gradient": 1, "gradient norm": 2, "weight": 3}[quantity], quantity != "routing"


def _error(a: Tensor | None, b: Tensor) -> float:
    if a is None or a.shape != b.shape:
        return math.inf
    if a.numel() == 0:
        return 0.0
    error = float((a - b).abs().max() / b.abs().max().clamp_min(FLOOR))
    return math.inf if math.isnan(error) else error  # NaN is greater than nothing


def _factor(a: Tensor | None, b: Tensor | None) -> float | None:
    """The number that makes b of a, where there is one: a sum that was taken twice, a division that was left out."""
    if a is None or b is None or a.shape != b.shape or not bool(b.square().sum() > 0):
        return None
    factor = float((a * b).sum() / b.square().sum())
    rest = float((a - factor * b).abs().max() / b.abs().max())
    return factor if rest < 1e-8 and math.isfinite(factor) else None


def _rows(errors: dict[tuple[str, int, str], float], num_drifts: int) -> Iterable[Row]:
    for quantity in ORDER:
        mine = {key: error for key, error in errors.items() if key[0] == quantity}
        if mine:
            (_, step, name), error = max(mine.items(), key=lambda item: item[1])
            differing = sum(not e < LIMIT for e in mine.values())
            yield Row(quantity, len(mine), f"{name or quantity}, step {step}", error, differing)


def report(verdict: Verdict) -> list[str]:
    """The table, and below it what differs."""
    head = ("quantity", "compared", "differ", "largest error", "limit", "where")
    body = [(r.quantity, str(r.compared), str(r.differing), f"{r.error:.1e}", f"{LIMIT:.0e}", r.worst) for r in verdict.rows]
    body.append(
        ("replicas", "all", str(len(verdict.drifts)), "bit by bit", "0", str(verdict.drifts[0]) if verdict.drifts else "equal on all ranks")
    )
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    out = ["  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in [head, *body]]
    if verdict.first is not None:
        out.append(f"first that differs: {verdict.first}")
        out += [f"in all: {line}" for line in _patterns(verdict.differences)]
    out += [f"replicas: {drift}" for drift in verdict.drifts[:8]]
    return out


def _patterns(differences: Sequence[Difference]) -> list[str]:
    """Which parameters, with the numbers of their layers together: `gradient of layers.{2,4}.moe.gate.weight`."""
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for d in differences:
        number = re.search(r"layers\.(\d+)\.", d.name)
        name = d.name.replace(number.group(), "layers.{}.", 1) if number else d.name
        layers.setdefault((d.quantity, name), {}).setdefault(number.group(1) if number else "", None)
    lines = []
    for (quantity, name), numbers in layers.items():
        shown = name.replace("{}", next(iter(numbers)) if len(numbers) == 1 else "{" + ",".join(sorted(numbers, key=int)) + "}")
        lines.append(f"{quantity}{f' of {shown}' if shown else ''}")
    return lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])
