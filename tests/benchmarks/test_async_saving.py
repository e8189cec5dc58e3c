"""The benchmark of saving in the background: that it runs, and what it concludes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import async_saving
from benchmarks.harness import Report

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_and_writes_every_sample(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "async_saving", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("async_saving-*.json")
    figures = json.loads(file.read_text())["figures"]
    assert figures["bytes"] > 100_000
    assert all(len(figures["seconds"][name]) == 1 for name in (async_saving.COPY, async_saving.BACKGROUND, async_saving.WAITING))
    assert "times a plain copy of the same bytes" in done.stdout


def test_ratios_are_taken_round_by_round():
    report = Report("async_saving")
    seconds = {"plain copy": [1.0, 2.0], "--async-save": [1.5, 3.0], "waits for the disk": [15.0, 60.0], "a step alone": [2.0, 2.0]}
    async_saving.conclude(report, seconds, [3.0, 3.0], first=4.0, size=8_000_000)
    f = report.figures
    assert (f["background_over_copy"]["median"], f["waiting_over_background"]["median"]) == (1.5, 15.0)
    assert f["step_during_over_alone"] == pytest.approx(1.5)
    assert "1.50 (1.50-1.50) times a plain copy" in report.tables[1] and "8.0 MB" in report.tables[0]
    async_saving.conclude(report, seconds, [], first=4.0, size=8)
    assert report.figures["step_during_over_alone"] is None
