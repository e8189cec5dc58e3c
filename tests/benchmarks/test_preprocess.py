"""The benchmark of preprocessing: its arithmetic, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Times
from benchmarks.preprocess import LIMIT, OURS, START, rates

ROOT = Path(__file__).resolve().parents[2]


def test_share_of_the_limit_is_a_ratio_of_speeds_with_and_without_start_up():
    samples = {LIMIT: [Times(4.0, 8.0)], OURS: [Times(6.0, 10.0)], START: [Times(1.0, 2.0)]}
    shares = rates(samples, 24.0)["share_of_limit"]
    assert shares["whole command, by wall time"]["median"] == pytest.approx(4 / 6)
    assert shares["whole command, by cpu time"]["median"] == pytest.approx(8 / 10)
    assert shares["without start-up, by wall time"]["median"] == pytest.approx(4 / 5)
    assert shares["without start-up, by cpu time"]["median"] == pytest.approx(8 / 8)


def test_it_runs_and_both_sides_make_the_same_tokens(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "preprocess", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("preprocess-*.json")
    written = json.loads(file.read_text())
    assert written["parameters"]["documents"] > 1
    assert set(written["samples"]["whole"]) == {LIMIT, OURS, START}
