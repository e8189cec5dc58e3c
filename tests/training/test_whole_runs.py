"""Whole runs: stopped and resumed bit for bit, moved to another layout, followed over twenty steps at another EP degree."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.checkpoint.files import CheckpointError, iterations_in
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.metrics.reader import read_records
from training import runs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(world, save, text, flags):
    data = f"--data-path {text} --vocab-size 64 --split 80,20,0"
    return run_distributed(runs.train_here, world, f"{data} --save {save} {flags}")[0]


def losses(save) -> dict[int, tuple[float, float]]:
    return {r["iteration"]: (r["lm_loss"], r["grad_norm"]) for r in read_records(save / "metrics.jsonl") if r["event"] == "train"}


def different(a, b) -> list[str]:
    assert a["tensors"].keys() == b["tensors"].keys()
    return [name for name, t in a["tensors"].items() if not torch.equal(t, b["tensors"][name])]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, "--zero-stage 1"),
        (1, "--data-order megatron"),
        (2, "--zero-stage 3 --moe-expert-parallel-size 2"),
        pytest.param(2, "--zero-stage 2 --tensor-model-parallel-size 2 --bf16", marks=pytest.mark.matrix),
    ],
)
def test_resume_is_bitwise_equal(world, flags, text, tmp_path):
    # 4 samples a step: step 10 ends in the middle of an epoch, and the 20 steps pass the end of one
    straight = train(world, tmp_path / "straight", text, f"{flags} --train-iters 20")
    train(world, tmp_path / "stopped", text, f"{flags} --train-iters 20 --exit-interval 10")
    resumed = train(world, tmp_path / "stopped", text, f"{flags} --train-iters 20 --load {tmp_path / 'stopped'}")
    assert resumed["progress"].iteration == 20
    assert different(straight, resumed) == []
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def test_longer_run_goes_on_with_the_same_data(text, tmp_path):
    schedule = "--lr-decay-iters 30"
    straight = train(1, tmp_path / "straight", text, f"{schedule} --train-iters 20")
    train(1, tmp_path / "short", text, f"{schedule} --train-iters 10")
    longer = train(1, tmp_path / "short", text, f"{schedule} --train-iters 20 --load {tmp_path / 'short'}")
    assert different(straight, longer) == []


SLICES = "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --enable-expert-tensor-parallelism"
RESHARD = [
    ("--zero-stage 3 --moe-expert-parallel-size 2", 2, "--zero-stage 1", 1),
    pytest.param(
        "--zero-stage 1", 1, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4", 4, marks=pytest.mark.matrix
    ),
    ("--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 4", 4, "--zero-stage 0 --moe-expert-parallel-size 2", 2),
    pytest.param(f"--zero-stage 3 {SLICES}", 4, "--zero-stage 1 --moe-expert-parallel-size 2", 2, marks=pytest.mark.matrix),
    pytest.param("--zero-stage 2 --moe-expert-parallel-size 2", 2, f"--zero-stage 0 {SLICES}", 4, marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("before", "world_before", "after", "world_after"), RESHARD)
def test_run_goes_on_at_another_layout(before, world_before, after, world_after, text, tmp_path):
    """Loaded bit for bit (weights, moments), and the next steps agree as layouts do: 1e-10 in float64."""
    exact = f"{runs.FP64} --train-iters 8 --adam-eps 1e-5 --disable-moe-token-dropping"
    straight = train(world_before, tmp_path / "straight", text, f"{exact} {before}")
    stopped = train(world_before, tmp_path / "moved", text, f"{exact} {before} --exit-interval 4")
    loaded = train(world_after, tmp_path / "loaded", text, f"{exact} {after} --load {tmp_path / 'moved'} --train-iters 4")
    assert different(stopped, loaded) == []
    moved = train(world_after, tmp_path / "moved", text, f"{exact} {after} --load {tmp_path / 'moved'}")
    for name, t in straight["tensors"].items():
        torch.testing.assert_close(moved["tensors"][name], t, rtol=1e-9, atol=1e-10, msg=name)


def test_finetune_takes_weights_and_starts_at_zero(text, tmp_path):
    train(1, tmp_path / "first", text, "--train-iters 4")
    tuned = train(1, tmp_path / "second", text, f"--train-iters 3 --load {tmp_path / 'first'} --finetune")
    assert tuned["progress"].iteration == 3
    first = next(r for r in read_records(tmp_path / "second" / "metrics.jsonl") if r["event"] == "eval")
    last = [r for r in read_records(tmp_path / "first" / "metrics.jsonl") if r["event"] == "eval"][-1]
    assert (first["iteration"], first["lm_loss"]) == (0, last["lm_loss"])


def _train_with_a_full_disk(flags, failures):
    """Every save finds the disk full, `failures` times."""
    full = [OSError(28, "No space left on device")] * failures
    write = CheckpointManager._write
    with mock.patch.object(CheckpointManager, "_write", lambda *args: (_ for _ in ()).throw(full.pop()) if full else write(*args)):
        return runs.train_here(flags)


def test_save_that_fails_ends_the_run_or_is_an_alert(text, tmp_path):
    flags = f"--data-path {text} --vocab-size 64 --split 80,20,0 --train-iters 6 --save-interval 2 --no-moe-alerts --save {tmp_path}/run"
    run_distributed(_train_with_a_full_disk, 2, f"{flags} --save-failure continue", 1)
    events = [(r["event"], r["iteration"]) for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] in ("save", "alert")]
    assert events == [("alert", 2), ("save", 4), ("save", 6)]
    assert iterations_in(tmp_path / "run") == [4, 6]
    straight = train(2, tmp_path / "straight", text, "--train-iters 6")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight") and straight["progress"].iteration == 6
    for policy, failures in (("stop", 1), ("continue", 9)):  # what cannot be saved at the end is lost: that is never a mere alert
        with pytest.raises(CheckpointError, match="No space left"):
            run_distributed(_train_with_a_full_disk, 2, f"{flags}_{policy} --save-failure {policy}", failures)
        assert iterations_in(tmp_path / f"run_{policy}") == []


def evaluations(save) -> list[tuple]:
    return [(r["iteration"], r["split"], r["tokens"], r["lm_loss"]) for r in read_records(save / "metrics.jsonl") if r["event"] == "eval"]


def test_ep2_and_tp2_follow_one_process_for_twenty_steps(text, tmp_path):
    """Training losses, norms and every evaluation, in float32 with the fast kernels."""
    layouts = {"one": (1, ""), "ep1": (2, ""), "ep2": (2, "--moe-expert-parallel-size 2"), "tp2": (2, "--tensor-model-parallel-size 2")}
    for name, (world, flags) in layouts.items():
        train(world, tmp_path / name, text, f"--train-iters 20 --disable-moe-token-dropping {flags}")
    one, seen = losses(tmp_path / "one"), evaluations(tmp_path / "one")
    assert [e[0] for e in seen] == [0, 7, 14, 20]
    for name in ("ep1", "ep2", "tp2"):
        other = losses(tmp_path / name)
        assert list(other) == list(one) == list(range(1, 21))
        for i in one:
            assert other[i] == pytest.approx(one[i], rel=1e-4), f"{name}, iteration {i}"
        for mine, theirs in zip(seen, evaluations(tmp_path / name), strict=True):
            assert theirs[:3] == mine[:3]
            assert theirs[3] == pytest.approx(mine[3], rel=1e-4), f"{name}, evaluation at {mine[0]}"
