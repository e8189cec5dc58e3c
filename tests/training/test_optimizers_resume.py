"""Muon and SGD: a run goes on where it stopped, whatever layout it stops and goes on in."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from training import runs

pytestmark = pytest.mark.distributed

EP2, TP2 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    ("optimizer", "world", "before", "after"),
    [
        ("muon", 2, f"--zero-stage 3 {EP2}", f"--zero-stage 1 {TP2} {EP2}"),
        ("muon", 2, "--zero-stage 0", "--zero-stage 3"),
        ("sgd", 2, f"--zero-stage 2 {EP2}", f"--zero-stage 1 {TP2}"),
    ],
)
def test_a_run_goes_on_in_another_layout(optimizer, world, before, after, tmp_path):
    flags = (
        f"{runs.FP64} --mock-data --disable-moe-token-dropping --optimizer {optimizer} --lr-decay-iters 6 --eval-iters 0 --adam-eps 1e-5"
    )
    whole = run_distributed(runs.train_here, world, f"{flags} {before} --train-iters 6")[0]["tensors"]
    parts = f"{flags} --save {tmp_path} --load {tmp_path}"
    run_distributed(runs.train_here, world, f"{parts} {before} --train-iters 3")
    found = run_distributed(runs.train_here, world, f"{parts} {after} --train-iters 6")[0]["tensors"]
    assert found.keys() == whole.keys()
    assert any(n.startswith("optimizer.momentum_buffer.") for n in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)
