"""Runs that start from a dense model: in every layout the same model, its report, and what is refused before anything starts."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe import mpu
from megatron_moe.arguments import parse_args
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.flags import ConfigError
from megatron_moe.metrics.reader import read_records
from megatron_moe.training.distributed import World
from megatron_moe.training.plan import build_plan
from megatron_moe.training.preflight import prepare
from megatron_moe.training.pretrain import set_up
from training import runs

pytestmark = pytest.mark.distributed

SIZES = (
    "--num-layers 4 --expert-interval 1 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --hidden-dropout 0.1 --eval-iters 0 --log-interval 1 --num-workers 0 "
    "--mock-data --vocab-size 64 --num-experts 1 --mlp-type standard --lr-warmup-iters 0"
)
EXPERTS = "--moe-use-upcycling --num-experts 4 4 8 8 --topk 2 --mlp-type residual"
PARTS = "--moe-use-upcycling --num-experts 8 --topk 4 --moe-upcycling-granularity 2 --moe-ffn-hidden-size 64 --moe-upcycling-drop-ratio 0.5"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A few steps at two ranks, in a layout that no run here has."""
    save = tmp_path_factory.mktemp("dense") / "run"
    run_distributed(start_here, 2, f"{SIZES} {runs.FP64} --train-iters 3 --zero-stage 2 --save {save}", True)
    return save


@pytest.fixture(scope="module")
def alone(dense, tmp_path_factory):
    """What one process starts with, by kind: (tensors, what it reports)."""

    @functools.cache
    def made(kind):
        save = tmp_path_factory.mktemp("alone") / "run"
        return start(1, f"{kind} --load {dense} --save {save} --train-iters 1"), reported(save)

    return made


def start_here(flags: str, trains: bool = False) -> dict[str, torch.Tensor]:
    """Set up on the ranks of this pool, or also train; every tensor of the model as a whole."""
    if trains:
        return runs.train_here(flags)["tensors"]
    prepared = prepare(parse_args(flags.split()).run, dist.get_world_size())
    try:
        run = set_up(prepared, World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD), ["test"])
        run.close()
        assert run.progress.iteration == 0
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in model_state(run.model).items()}
    finally:
        mpu.set_default_mesh(None)


def start(world, flags, trains=False) -> dict[str, torch.Tensor]:
    """Of all pipeline stages together."""
    parts = run_distributed(start_here, world, f"{SIZES} {runs.FP64} {flags}", trains)
    return {name: t for part in parts for name, t in part.items()}


def reported(save) -> dict:
    (record,) = [r for r in read_records(save / "metrics.jsonl") if r["event"] == "load"]
    return record


@pytest.mark.parametrize(
    ("world", "kind", "layout"),
    [
        (2, PARTS, "--moe-expert-parallel-size 2 --zero-stage 3"),
        (2, EXPERTS, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"),
        (2, EXPERTS, "--pipeline-model-parallel-size 2"),
        pytest.param(2, EXPERTS, "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2", marks=pytest.mark.matrix),
        pytest.param(2, EXPERTS, "--context-parallel-size 2 --moe-expert-parallel-size 2", marks=pytest.mark.matrix),
        pytest.param(4, PARTS, "--tensor-model-parallel-size 2 --moe-expert-parallel-size 4", marks=pytest.mark.matrix),
        pytest.param(4, EXPERTS, "--pipeline-model-parallel-size 2 --moe-expert-parallel-size 2 --zero-stage 0", marks=pytest.mark.matrix),
    ],
)
def test_every_layout_starts_with_the_model_of_one_process(world, kind, layout, dense, alone, tmp_path):
    expected, here = alone(kind)
    spread = start(world, f"{kind} --load {dense} --save {tmp_path} --train-iters 1 {layout}")
    assert expected.keys() == spread.keys()
    assert [name for name in expected if not torch.equal(expected[name], spread[name])] == []
    there = reported(tmp_path)
    assert there["of"] == ("losses of tokens" if "pipeline" in layout else "logits")
    assert there["dense"] == str(dense / "iter_0000003")
    if kind == EXPERTS:
        assert here["difference"] < 1e-12 and there["difference"] < 1e-12
    elif "pipeline" not in layout:
        assert there["difference"] > 1e-3


MIXTRAL = "--swiglu --disable-bias-linear --normalization RMSNorm"


@pytest.fixture(scope="module")
def dense_mixtral(tmp_path_factory):
    save = tmp_path_factory.mktemp("dense") / "run"
    run_distributed(start_here, 1, f"{SIZES} {MIXTRAL} --train-iters 2 --save {save}", True)
    return save


@pytest.mark.parametrize(
    ("world", "flags", "at_most"),
    [
        (1, "--moe-upcycling-router-std 0", 0),
        (2, "--moe-upcycling-router-std 0 --bf16 --moe-expert-parallel-size 2", 0),
        (1, "", 1e-6),
        (1, "--fp16 --fp16-master-weights-and-grads", 1e-2),
    ],
)
def test_experts_like_mixtrals_begin_with_the_logits_of_the_dense_model(world, flags, at_most, dense_mixtral, tmp_path):
    """Bit for bit where all scores are equal, in float32 and bfloat16; the capacity of 1 token that drops most does not count here."""
    experts = (
        "--moe-use-upcycling --num-experts 8 --topk 2 --moe-router-normalize chosen --moe-eval-capacity-factor 0.1 --moe-min-capacity 1"
    )
    flags = f"{SIZES} {MIXTRAL} {experts} --load {dense_mixtral} --save {tmp_path} --train-iters 1 {flags}"
    run_distributed(start_here, world, flags)
    assert reported(tmp_path)["difference"] <= at_most


def test_it_trains_from_there_with_a_fresh_optimizer_and_goes_on_as_any_run(dense, tmp_path):
    flags = f"{EXPERTS} --moe-expert-parallel-size 2"
    start(2, f"{flags} --load {dense} --save {tmp_path / 'a'} --train-iters 2", trains=True)
    records = [r for r in read_records(tmp_path / "a" / "metrics.jsonl") if r["event"] == "train"]
    assert [(r["iteration"], r["consumed_samples"]) for r in records] == [(1, 8), (2, 16)]
    assert [r["expert_load"] is not None for r in records[0]["moe"]] == [True] * 4
    on = f"{flags.replace('--moe-use-upcycling', '')} --load {tmp_path / 'a'} --save {tmp_path / 'a'} --train-iters 3"
    start(2, on, trains=True)
    assert [r["iteration"] for r in read_records(tmp_path / "a" / "metrics.jsonl") if r["event"] == "train"] == [1, 2, 3]


# ---------------------------------------------------------------- before anything starts


def problems_of(flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(parse_args(f"{SIZES} {runs.FP64} --train-iters 1 {flags}".split()).run, 1)
    return caught.value.problems


@pytest.fixture(scope="module")
def experts(dense, tmp_path_factory):
    save = tmp_path_factory.mktemp("moe") / "run"
    start(1, f"{EXPERTS} --load {dense} --save {save} --train-iters 1", trains=True)
    return save


def test_a_run_that_cannot_be_upcycled_says_so_and_writes_nothing(dense, experts, tmp_path):
    new = tmp_path / "new"
    cases = {
        f"--load {tmp_path / 'no'} --save {new}": "there is no such directory; give the run directory (--save) of the dense model's training",
        f"--load {experts} --save {new}": "has experts already (4 4 8 8 per layer)",
        f"--load {dense} --save {new} --ffn-hidden-size 96": "--ffn-hidden-size  128         96",
        f"--load {dense} --save {new} --vocab-size 65 --make-vocab-size-divisible-by 1": "is not the dense model of these flags",
        f"--load {dense} --save {new} --params-dtype float32": "was trained with another type of parameters",
        f"--load {dense} --save {new} --ckpt-step 2": "iterations 3",
        f"--load {experts} --save {experts}": "without --ckpt-step, --finetune, --moe-use-upcycling and --reset-iteration",
    }
    for flags, words in cases.items():
        problems = problems_of(f"{EXPERTS} {flags}")
        assert any(words in problem for problem in problems), (flags, problems)
    assert not new.exists()


def test_a_dry_run_says_what_would_be_made_and_what_is_wrong(dense, experts, tmp_path):
    def plan(flags):
        parsed = parse_args(f"--dry-run {SIZES} {runs.FP64} --train-iters 1 {flags}".split())
        return json.loads(json.dumps(build_plan(parsed.run, 8, parsed.given, [], parsed.not_yet, parsed.warnings)))

    made = plan(f"{PARTS} --load {dense} --moe-expert-parallel-size 8 --global-batch-size 16")
    assert made["upcycling"]["dense"] == str(dense) and made["upcycling"]["parts"] == 2
    assert "--moe-upcycling-drop-ratio" in made["upcycling"]["inexact_because"][0] and "--moe-upcycling-drop-ratio" in made["warnings"][0]
    assert plan("--global-batch-size 16")["upcycling"] is None
    assert plan(f"{EXPERTS} --load {tmp_path / 'later'} --global-batch-size 16")["missing_paths"] == [str(tmp_path / "later")]
    with pytest.raises(ConfigError, match="has experts already"):
        plan(f"{EXPERTS} --load {experts} --global-batch-size 16")
