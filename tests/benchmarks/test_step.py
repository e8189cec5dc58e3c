"""The benchmark of a training step: that it runs, and that it refuses to compare unequal work."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import step

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_and_a_peer_that_is_missing_is_skipped_with_the_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "step", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("step-*.json")
    found = json.loads(file.read_text())
    for case in ("mixtral fp32", "mixtral bf16", "nanogpt fp32", "nanogpt bf16"):
        assert {step.OURS, step.PEAK} <= set(found["samples"][case])
        assert len(found["figures"][case]["losses_of_the_first_steps"][step.OURS]) == step.CHECKED_STEPS
    if importlib.util.find_spec("transformers") is None:
        assert "not installed" in found["skipped"]["transformers"] and "no peer was measured" in done.stdout
    else:
        assert "x the tokens per CPU second of transformers" in done.stdout


def test_peers_are_chosen_by_name_and_torchtitan_is_not_there_in_fp32():
    def names(*texts, dtype="bf16", model="mixtral"):
        return [p.name for p in step.chosen(model, dtype, step.Options(peer=texts))]

    assert names("titan") == ["torchtitan", "torchtitan compiled", "torchtitan compiled kept memory"]
    assert names("titan", dtype="fp32") == []
    assert names("eager grouped_mm", "titan compiled kept") == [
        "transformers eager grouped_mm", "transformers eager grouped_mm compiled", "transformers eager grouped_mm compiled kept memory",
        "torchtitan compiled kept memory",
    ]  # fmt: skip
    assert len(names()) == 15 and len(names(dtype="fp32")) == 12 and len(names(model="nanogpt")) == 6


def test_systems_of_another_loss_are_not_compared():
    equal = {step.OURS: [2.0, 1.9], "theirs": [2.0, 1.9 + 1e-5]}
    step.check_equal(equal, 1e-4)
    with pytest.raises(AssertionError, match="do not do the same"):
        step.check_equal(equal | {"theirs": [2.0, 1.8]}, 1e-4)
