"""Whole runs through a pipeline: the curve of one process, records of all stages, resumed and moved to another layout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.checkpoint.load import describe_metadata
from megatron_moe.checkpoint.safe_reader import SafeReader
from megatron_moe.metrics.reader import read_records
from training import launches, runs

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
PP2, EP2 = "--pipeline-model-parallel-size 2", "--moe-expert-parallel-size 2"
FOUR = "--num-layers 4 --num-experts 1 2 4 4"
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
EXACT = f"{runs.FP64} --adam-eps 1e-5 --disable-moe-token-dropping"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(world, save, text, flags) -> dict:
    """Every tensor of the run, from whatever rank has it."""
    done = run_distributed(runs.train_here, world, f"--data-path {text} --vocab-size 64 --split 80,20,0 --save {save} {flags}")
    tensors: dict[str, torch.Tensor] = {}
    for rank in done:
        for name, t in rank["tensors"].items():
            assert torch.equal(tensors.setdefault(name, t), t), f"{name} differs between ranks"
    return {"tensors": tensors, "progress": done[0]["progress"]}


def different(a, b) -> list[str]:
    assert a["tensors"].keys() == b["tensors"].keys()
    return [name for name, t in a["tensors"].items() if not torch.equal(t, b["tensors"][name])]


def records(save, event: str) -> list[dict]:
    return [r for r in read_records(save / "metrics.jsonl") if r["event"] == event]


def assert_same_records(a: list[dict], b: list[dict], skipped: set[str]) -> None:
    assert len(a) == len(b) > 0
    for mine, theirs in zip(a, b):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - skipped:
            for x, y in zip(flat(mine[key]), flat(theirs[key]), strict=True):
                assert x == y if isinstance(x, str | bool | None) else math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12), f"{key}: {x} {y}"


def flat(value) -> list:
    if isinstance(value, dict):
        return [x for key, v in value.items() if not key.startswith("sent_bytes") for x in flat(v)]
    return [x for v in value for x in flat(v)] if isinstance(value, list | tuple) else [value]


OF_THE_MACHINE = {"iteration_time_ms", "tokens_per_second", "tflops_per_device", "peak_memory_bytes", "time"}


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        pytest.param(2, f"{FOUR} {PP2} --enable-zbh1-pipeline", marks=pytest.mark.matrix),
        pytest.param(4, f"{FOUR} {INTERLEAVED} {EP2} --zero-stage 2", marks=pytest.mark.matrix),
        (4, f"{FOUR} --pipeline-model-parallel-size 4"),
    ],
)
def test_metrics_are_those_of_one_process(world, flags, text, tmp_path):
    """Losses, norms, every layer's record in layer order, evaluations."""
    model = "--topk 2 --disable-moe-top2-2nd-expert-sampling --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-normalize chosen --eval-iters 1"
    own = f"{EXACT} --train-iters 9 --global-batch-size 8"
    train(1, tmp_path / "one", text, f"{own} {model} {FOUR}")
    train(world, tmp_path / "pipeline", text, f"{own} {model} {flags}")
    for event in ("train", "eval"):
        assert_same_records(*(records(tmp_path / name, event) for name in ("one", "pipeline")), OF_THE_MACHINE)
    layers = [[m["layer"] for m in r["moe"]] for r in records(tmp_path / "pipeline", "train")]
    assert layers == [[2, 3, 4]] * 9


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        pytest.param(2, f"{PP2} --zero-stage 1 --bf16", marks=pytest.mark.matrix),
        pytest.param(4, f"{FOUR} {INTERLEAVED} {EP2} --zero-stage 3", marks=pytest.mark.matrix),
        (4, f"{FOUR} {PP2} {EP2} --pipeline-schedule zero-bubble --zero-stage 2 --recompute-granularity full"),
    ],
)
def test_resume_is_bitwise_equal(world, flags, text, tmp_path):
    flags = f"{flags} --train-iters 12 --global-batch-size 8"
    straight = train(world, tmp_path / "straight", text, flags)
    train(world, tmp_path / "stopped", text, f"{flags} --exit-interval 5")
    resumed = train(world, tmp_path / "stopped", text, f"{flags} --load {tmp_path / 'stopped'}")
    assert resumed["progress"].iteration == 12
    assert different(straight, resumed) == []


MOVES = [  # layout before, ranks, layout after, ranks
    pytest.param(PP2, 2, "", 1, marks=pytest.mark.matrix),
    pytest.param("", 1, f"{PP2} --decoder-last-pipeline-num-layers 2", 2, marks=pytest.mark.matrix),
    (f"--zero-stage 3 {PP2} {EP2}", 4, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2", 2),
    pytest.param(f"{FOUR} {INTERLEAVED} {EP2} --zero-stage 2", 4, f"{FOUR} --pipeline-model-parallel-size 4", 4, marks=pytest.mark.matrix),
    (f"{FOUR} --zero-stage 3 {EP2}", 2, f"{FOUR} {INTERLEAVED} --pipeline-schedule zero-bubble --tensor-model-parallel-size 2", 4),
]


@pytest.mark.parametrize(("before", "world_before", "after", "world_after"), MOVES)
def test_run_goes_on_at_another_layout(before, world_before, after, world_after, text, tmp_path):
    """Loaded bit for bit (weights, moments), and the next steps agree as layouts do."""
    exact = f"{EXACT} --train-iters 6 --global-batch-size 8"
    straight = train(world_before, tmp_path / "straight", text, f"{exact} {before}")
    stopped = train(world_before, tmp_path / "moved", text, f"{exact} {before} --exit-interval 3")
    loaded = train(world_after, tmp_path / "loaded", text, f"{exact} {after} --load {tmp_path / 'moved'} --train-iters 3")
    assert different(stopped, loaded) == []
    moved = train(world_after, tmp_path / "moved", text, f"{exact} {after} --load {tmp_path / 'moved'}")
    for name, t in straight["tensors"].items():
        torch.testing.assert_close(moved["tensors"][name], t, rtol=1e-9, atol=1e-10, msg=name)


def test_batches_and_lengths_that_grow_go_through_the_pipeline(text, tmp_path):
    """Every size of a step needs a schedule of its own; the first ones have fewer micro-batches than stages."""
    grow = (
        "--global-batch-size 12 --rampup-batch-size 2 2 16 --curriculum-learning --curriculum-min-difficulty 4 --curriculum-total-step 4 "
        "--curriculum-difficulty-step 4 --train-samples 60 --lr-warmup-iters 0"
    )
    train(1, tmp_path / "one", text, f"{EXACT} {grow}")
    train(2, tmp_path / "pipeline", text, f"{EXACT} {grow} {PP2}")
    steps = [records(tmp_path / name, "train") for name in ("one", "pipeline")]
    assert_same_records(*steps, OF_THE_MACHINE)
    assert len({(r["global_batch_size"], r["seq_length"]) for r in steps[0]}) > 4


def test_tied_weights_are_saved_once_and_tools_read_the_checkpoint(text, tmp_path):
    save = tmp_path / "run"
    train(2, save, text, f"{PP2} --train-iters 2 --lr-warmup-iters 0")
    checkpoint = save / "iter_0000002"
    assert describe_metadata(checkpoint)["model.embedding.weight"]["shape"] == [128, 32]
    chunks = SafeReader(checkpoint).read_metadata().state_dict_metadata
    assert all(len(chunks[f"{part}.embedding.weight"].chunks) == 1 for part in ("model", "optimizer.exp_avg"))
    written = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    train(1, tmp_path / "one", text, "--train-iters 2 --lr-warmup-iters 0")
    alone = sum(file.stat().st_size for file in (tmp_path / "one" / "iter_0000002").glob("*.distcp"))
    assert written == pytest.approx(alone, rel=0.02)
    for words in (
        ["tools/inspect_checkpoint.py", "--load", str(save)],
        ["tools/generate_text.py", "--load", str(save), "--prompt", "5 17 2", "--max-new-tokens", "3"],
        [
            "tools/convert_checkpoint.py",
            "--from",
            "native",
            "--to",
            "safetensors",
            "--load",
            str(save),
            "--save",
            f"{tmp_path}/flat",
            "--verify",
        ],
    ):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_stopped_pipeline_saves_and_says_so(tmp_path):
    """SIGTERM to the launcher: all stages finish the step, save, and leave the marker."""
    flags = f"{launches.TINY} {PP2} --global-batch-size 8 --train-iters 100000 --save {tmp_path / 'run'} --eval-interval 0"
    process = launches.start(flags, ranks=2, scratch=tmp_path)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        launches.wait_until(lambda: metrics.exists() and len(records(tmp_path / "run", "train")) > 3, "a few steps", process, tmp_path)
        process.terminate()
        launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    marker = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert marker["is_done"] is False and (tmp_path / "run" / marker["checkpoint"]).is_dir()
