"""The benchmark of reading: that it runs, that its index and ours agree, and that a faulty order is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data_reading
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.megatron_order import MegatronDataset, window_starts

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_and_skips_megatron_with_a_reason_where_it_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "data_reading", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("data_reading-*.json")
    written = json.loads(file.read_text())
    assert set(written["samples"]) == {"reading", "index, documents of 1000", "index, documents of 200"}
    assert {data_reading.STABLE, data_reading.SLICE} < set(written["samples"]["reading"])
    assert (data_reading.PEER in written["samples"]["reading"]) == ("Megatron-Core" not in written["skipped"])


def test_what_ours_is_compared_with_finds_the_same_documents():
    sizes = np.random.default_rng(0).integers(0, 50, 300).astype(np.int32)
    count = (int(sizes.sum()) - 1) // 16
    places = data_reading.least(sizes, 16, count)
    np.testing.assert_array_equal(window_starts(sizes, 16, count)[1:, 0], places[1:])


def test_the_file_with_a_hole_is_a_dataset(tmp_path):
    indexed = IndexedDataset(data_reading.sparse(tmp_path / "x", np.array([3, 1, 4], np.int32)))
    assert indexed.sizes.tolist() == [3, 1, 4] and indexed.num_tokens == 8 and indexed[2].tolist() == [0] * 4


def test_another_sample_than_megatrons_stops_it(tmp_path):
    indexed = data_reading.write(tmp_path / "x", 5000, 0)
    ours = MegatronDataset(indexed, (0, len(indexed)), 16, 1, "train", tmp_path, samples=100)

    def theirs(i):
        text = torch.from_numpy(ours[i]["text"])
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(16), "position_ids": torch.arange(16)}

    samples = [theirs(i) for i in range(5)]
    data_reading.check_equal(ours, samples, 5)
    samples[3]["labels"] = samples[3]["labels"] + (torch.arange(16) == 7)
    with pytest.raises(AssertionError, match="labels of sample 3 differ"):
        data_reading.check_equal(ours, samples, 5)
