"""The benchmark of the image classifier: its figures, with the training taken out."""

from __future__ import annotations

import pytest

from benchmarks import digits
from benchmarks.harness import Options


def trained(args) -> float:
    """By kind of model: two seeds of each, as shares of the images."""
    kind = "dense" if not args.moe else "capacity" if args.min_capacity is not None else args.mlp_type if args.top_k == 1 else "top 2"
    shares = {"dense": (0.97, 0.98), "standard": (0.97, 0.97), "top 2": (0.95, 0.97), "residual": (0.98, 0.99), "capacity": (0.5, 0.4)}
    return shares[kind][args.seed]


def test_means_are_compared_with_the_dense_one(monkeypatch):
    monkeypatch.setattr(digits.image_classifier, "train", trained)
    report = digits.run(Options(rounds=2))
    over = {name: figures["over dense"] for name, figures in report.figures.items()}
    expected = {"dense": 0, "8 experts": -0.5, "8 experts, top 2": -1.5, "8 experts, residual": 1, "8 experts, capacity 1.0": -52.5}
    assert over == pytest.approx(expected)
    lines = [line for line in str(report.tables[0]).splitlines() if line.endswith(("yes", "no"))]
    assert [line.split()[-1] for line in lines] == ["yes", "yes", "no", "yes", "no"]
