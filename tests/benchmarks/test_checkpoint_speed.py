"""The benchmark of checkpoints: that it runs, loads what it saved in every layout, and what it concludes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import checkpoint
from benchmarks.harness import Report, Times


def test_it_runs_and_loads_what_it_saved(tmp_path, capsys):
    assert command.main(["checkpoint", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("checkpoint-*.json")
    told = json.loads(file.read_text())["figures"]
    assert told["bytes"] == 48 * 64 * 64 * 4
    assert {"save", *(f"load, {kind}" for kind in checkpoint.LAYOUTS)} == set(told["layouts_seconds"])
    assert all(system["gb_per_second"] > 0 for system in told["systems"].values())
    assert "two gloo ranks" in capsys.readouterr().out


def test_a_load_that_changes_a_number_is_seen(tmp_path, monkeypatch):
    def load_and_change(path, tensors):
        load(path, tensors)
        next(iter(tensors.values()))[0, 0] += 1

    load = checkpoint.load_tensors
    monkeypatch.setattr(checkpoint, "load_tensors", load_and_change)
    monkeypatch.setattr(checkpoint, "systems_of", lambda disk, skipped: {"save: ours": disk.save, "load: ours": lambda: disk.load(True)})
    with pytest.raises(AssertionError, match="not what was saved"):
        command.main(["checkpoint", "--quick", "--out", str(tmp_path)])


def test_saves_are_compared_with_writing_and_loads_with_reading():
    samples = {checkpoint.WRITE: [Times(2, 1)], checkpoint.READ: [Times(1, 1)], "save: ours": [Times(3, 2)], "load: ours": [Times(1.5, 1)]}
    report = Report("checkpoint")
    checkpoint.conclude(report, samples, {"save": [1.0]}, 3_000_000_000)
    told = report.figures["systems"]
    assert told["save: ours"]["wall_over_limit"]["median"] == told["load: ours"]["wall_over_limit"]["median"] == 1.5
    assert told["save: ours"]["gb_per_second"] == 1.0
    assert len(checkpoint.state_of(4)) == 48 and torch.equal(
        checkpoint.state_of(4)["model.0.weight"], checkpoint.state_of(4)["model.0.weight"]
    )
