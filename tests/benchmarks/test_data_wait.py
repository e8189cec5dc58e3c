"""The benchmark of waiting for data: that it runs, that a wait is seen, and that other samples stop it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import data_wait
from benchmarks.harness import Times

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_with_every_number_of_workers(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "data_wait", "--quick", "--rounds", "2", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("data_wait-*.json")
    written = json.loads(file.read_text())
    for case in ("steps", "waits"):
        assert set(written["samples"][case]) == {data_wait.name_of(n) for n in data_wait.WORKERS}
        assert all(len(turns["wall"]) == 2 for turns in written["samples"][case].values())
    assert all(0 < share["median"] < 1 for share in written["figures"]["share of the step"].values())


def test_a_loader_that_lets_a_step_wait_is_seen():
    slow = SimpleNamespace(next_batches=lambda: time.sleep(0.05), step=lambda batches: SimpleNamespace(lm_loss=torch.tensor(1.0)))
    turn = data_wait.step_of(slow)
    assert 0.05 <= turn.wait.wall <= turn.step.wall


def test_runs_of_other_losses_are_not_compared():
    times = Times(1.0, 1.0)
    equal = {"a": [data_wait.Turn(times, times, 3.0)], "b": [data_wait.Turn(times, times, 3.0)]}
    data_wait.check_equal(equal)
    with pytest.raises(AssertionError, match="the loss of b is"):
        data_wait.check_equal(equal | {"b": [data_wait.Turn(times, times, 3.5)]})
