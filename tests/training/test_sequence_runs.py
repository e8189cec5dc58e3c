"""Whole runs whose sequences are cut over ranks: checkpoints go from layout to layout bit for bit, and lengths may grow.

That metrics.jsonl is the same: test_layouts_of_runs.py."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.metrics.reader import read_records
from training import runs

pytestmark = pytest.mark.distributed

CP2, TP2_SP = "--context-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
EP2, EP4, HYBRID = "--moe-expert-parallel-size 2", "--moe-expert-parallel-size 4", "--num-distributed-optimizer-instances 2"
EXACT = f"{runs.FP64} --adam-eps 1e-5 --disable-moe-token-dropping --num-key-value-heads 2 --micro-batch-size 1"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(world, save, text, flags):
    data = f"--data-path {text} --vocab-size 64 --split 80,20,0"
    return run_distributed(runs.train_here, world, f"{EXACT} {data} --save {save} {flags}")[0]


TRAIN = ("iteration", "consumed_samples", "consumed_tokens", "lm_loss", "moe_aux_loss", "moe_z_loss", "grad_norm", "learning_rate")
LAYER = ("layer", "load_max_over_mean", "load_min_over_mean", "dead_experts", "dropped_fraction", "router_entropy")
EVAL = ("iteration", "tokens", "lm_loss", "perplexity")


def numbers(save) -> list[float]:
    """Everything in metrics.jsonl that is about the model, and not about the machine."""
    out = []
    for record in read_records(save / "metrics.jsonl"):
        out += [record[key] for key in {"train": TRAIN, "eval": EVAL}.get(record["event"], ())]
        out += [layer[key] for layer in record.get("moe", ()) for key in LAYER]
    return out


MOVES = [
    pytest.param(4, f"--zero-stage 3 {CP2} {TP2_SP} {EP4}", 1, "--zero-stage 1", marks=pytest.mark.matrix),
    pytest.param(1, "--zero-stage 1", 4, f"--zero-stage 2 {CP2} {TP2_SP} {EP2}", marks=pytest.mark.matrix),
    pytest.param(4, f"--zero-stage 1 {HYBRID} {EP2}", 2, f"--zero-stage 3 {CP2}", marks=pytest.mark.matrix),
    pytest.param(2, f"--zero-stage 0 {TP2_SP}", 4, f"--zero-stage 3 {HYBRID} {CP2} {EP4}", marks=pytest.mark.matrix),
    # heads that are shared, and are not
    pytest.param(4, "--zero-stage 2 --tensor-model-parallel-size 4", 2, f"--zero-stage 1 {TP2_SP}", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("world_before", "before", "world_after", "after"), MOVES)
def test_a_run_goes_on_at_another_layout(world_before, before, world_after, after, text, tmp_path):
    """Loaded bit for bit, and what follows is what would have followed: 1e-10 in float64."""
    straight = train(world_before, tmp_path / "straight", text, f"{before} --train-iters 6")
    stopped = train(world_before, tmp_path / "moved", text, f"{before} --train-iters 6 --exit-interval 3")
    loaded = train(world_after, tmp_path / "loaded", text, f"{after} --load {tmp_path / 'moved'} --train-iters 3")
    assert [name for name, t in stopped["tensors"].items() if not torch.equal(t, loaded["tensors"][name])] == []
    moved = train(world_after, tmp_path / "moved", text, f"{after} --train-iters 6 --load {tmp_path / 'moved'}")
    for name, t in straight["tensors"].items():
        torch.testing.assert_close(moved["tensors"][name], t, rtol=1e-9, atol=1e-10, msg=name)


def test_a_curriculum_of_lengths_that_can_be_cut(text, tmp_path):
    flags = "--train-iters 4 --curriculum-learning --curriculum-min-difficulty 4 --curriculum-total-step 3 --curriculum-difficulty-step 4"
    train(1, tmp_path / "one", text, flags)
    train(4, tmp_path / "cut", text, f"{flags} {CP2} {TP2_SP}")
    assert numbers(tmp_path / "cut") == pytest.approx(numbers(tmp_path / "one"), rel=1e-9, abs=1e-9)
