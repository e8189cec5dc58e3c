"""The benchmark of preprocessing: its arithmetic, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Times
from benchmarks.preprocess import FAST, FAST_START, LIMIT, MEGATRON, MEGATRON_START, OURS, START, rates, shares_of, work_shares

ROOT = Path(__file__).resolve().parents[2]


def test_share_of_the_limit_is_a_ratio_of_speeds_with_and_without_start_up():
    samples = {LIMIT: [Times(4.0, 8.0)], OURS: [Times(6.0, 10.0)], START: [Times(1.0, 2.0)]}
    shares = rates(samples, 24.0)["share_of_limit"]
    assert shares["whole command, by wall time"]["median"] == pytest.approx(4 / 6)
    assert shares["whole command, by cpu time"]["median"] == pytest.approx(8 / 10)
    assert shares["without start-up, by wall time"]["median"] == pytest.approx(4 / 5)
    assert shares["without start-up, by cpu time"]["median"] == pytest.approx(8 / 8)


def test_start_up_is_taken_from_both_sides_of_a_comparison_of_commands():
    samples = {FAST: [Times(3.0, 4.0)], FAST_START: [Times(1.0, 1.0)], MEGATRON: [Times(12.0, 20.0)], MEGATRON_START: [Times(6.0, 5.0)]}
    faster = shares_of(samples, FAST, FAST_START, MEGATRON, MEGATRON_START)
    assert faster["whole command, by wall time"]["median"] == pytest.approx(12 / 3)
    assert faster["without start-up, by wall time"]["median"] == pytest.approx((12 - 6) / (3 - 1))
    assert faster["without start-up, by cpu time"]["median"] == pytest.approx((20 - 5) / (4 - 1))


def test_shares_are_read_from_what_the_tool_says():
    line = "32.9 MB in 0.6 s: 56.3 MB/s, 15,320,560 tokens/s (reading 9%, parsing 30%, tokenizing 53%, writing 8%)\n"
    assert work_shares(line) == {"reading": 0.09, "parsing": 0.3, "tokenizing": 0.53, "writing": 0.08}


def test_it_runs_and_both_sides_make_the_same_tokens(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "preprocess", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("preprocess-*.json")
    written = json.loads(file.read_text())
    assert written["parameters"]["documents, tokenizers"] > 1
    assert set(written["samples"]["whole"]) == {LIMIT, OURS, START}
