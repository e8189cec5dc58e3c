"""The benchmark of the optimizer: it runs, floors move the bytes they say, and unequal steps are not compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import optimizer

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "optimizer", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("optimizer-*.json")
    found = json.loads(file.read_text())
    assert set(found["figures"]) == {"many small tensors, 1 thread", "many small tensors, 2 threads"}
    for ratios in found["figures"].values():
        assert ratios[optimizer.BYTES]["cpu"]["median"] == 1.0 and ratios[optimizer.OURS]["cpu"]["median"] > 0


class CountBytes(TorchDispatchMode):
    """Elements that operations read, and write."""

    read = written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read += sum(a.numel() for a in args if isinstance(a, torch.Tensor))
        if func._schema.name.endswith("_"):
            self.written += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "read", "written"), [(optimizer.BYTES, 4, 3), (optimizer.CLIP_BYTES, 2, 1)])
def test_a_floor_reads_and_writes_what_the_step_does(name, read, written):
    floor = optimizer.floors(1000)[name]
    with CountBytes() as count:
        floor()
    assert (count.read, count.written) == (read * 1000, written * 1000)


def test_unequal_steps_are_not_compared():
    a = [torch.ones(3)]
    optimizer.check_equal({optimizer.OURS: a, "theirs": [torch.ones(3)]})
    with pytest.raises(AssertionError, match="theirs and ours make other steps"):
        optimizer.check_equal({optimizer.OURS: a, "theirs": [torch.ones(3) + 1e-3]})
