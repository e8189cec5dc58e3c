"""A user's mistake ends in one clear message and exit code 2, before anything starts, with nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_pool import run_distributed

from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.training.preflight import prepare
from training import runs

ROOT = Path(__file__).resolve().parents[2]
TINY = "--preset tiny --train-iters 2"


def problems_of(command: str, world_size: int = 1) -> str:
    """What a user is told; empty when the command is fine."""
    try:
        parsed = parse_args(command.split())
        check_to_train(parsed, world_size)
        prepare(parsed.run, world_size)
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def test_compiling_without_a_compiler_is_refused_before_the_start(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = problems_of(f"{TINY} --mock-data --compile")
    assert "C++ compiler" in said
    assert "/nowhere/g++" in said
    assert "CXX" in said
    assert not problems_of(f"{TINY} --mock-data")
    monkeypatch.setenv("CXX", sys.executable)  # any program will do: what it can, nobody asks yet
    assert not problems_of(f"{TINY} --mock-data --compile")


def test_fused_dispatch_without_a_gpu_is_refused_before_the_start(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = f"{TINY} --mock-data --num-experts 4 --moe-token-dispatcher fused"
    said = problems_of(f"{flags} --moe-expert-parallel-size 2", 2)
    assert "torch sees no GPU here; use --moe-token-dispatcher auto, or alltoall" in said
    assert not problems_of(flags)  # one rank has nothing to send
    assert not problems_of(f"{TINY} --mock-data --num-experts 4 --moe-expert-parallel-size 2", 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    save = tmp_path_factory.mktemp("trained") / "run"
    flags = f"--data-path {text} --vocab-size 64 --train-iters 2 --lr-warmup-iters 0 --save {save}"
    run_distributed(runs.train_here, 1, flags)
    return save


@pytest.mark.parametrize(
    ("command", "world", "said"),
    [
        (f"{TINY} --mock-data --num-expert 4", 1, ["unknown flag --num-expert", "--num-experts"]),
        (f"{TINY} --mock-data --num-experts 6 --moe-expert-parallel-size 4", 4, ["(6)", "(4)", "1, 2, 3, 6", "--moe-pyramid-ep auto"]),
        (f"{TINY} --mock-data --tensor-model-parallel-size 2", 3, ["number of ranks (3)", "TP 1, 3"]),
        (f"{TINY} --mock-data --moe-expert-parallel-size 4", 2, ["number of ranks (2)", "expert-parallel degree (4)"]),
        (f"{TINY} --mock-data --num-attention-heads 4 --tensor-model-parallel-size 8", 8, ["--num-attention-heads (4)", "TP 1, 2, 4"]),
        (f"{TINY} --mock-data --seq-length 4096", 1, ["--seq-length (4096)", "--max-position-embeddings (128)"]),
        (f"{TINY} --mock-data --global-batch-size 6", 1, ["--global-batch-size (6)", "use 4 or 8"]),
        (f"{TINY} --mock-data --fp16 --bf16", 1, ["--bf16 and --fp16 exclude each other"]),
        (f"{TINY} --mock-data --fp16 --params-dtype float64", 1, ["--fp16 and --params-dtype float64 exclude each other"]),
        (f"{TINY} --mock-data --fp16-master-weights-and-grads", 1, ["is about --fp16 training"]),
        (f"{TINY} --mock-data --fp16 --initial-loss-scale 0.5", 1, ["--initial-loss-scale (0.5)", "--min-loss-scale (1)"]),
        (f"{TINY} --mock-data --recompute-modules moe", 1, ["--recompute-modules (moe)", "which is not given; add it"]),
        (
            f"{TINY} --mock-data --recompute-granularity selective --recompute-modules layernorm",
            1,
            ["--recompute-modules must be one of core_attn, mlp, moe, shared_experts, not 'layernorm'"],
        ),
        (f"{TINY} --mock-data --cross-entropy-loss-chunk-size -1", 1, ["--cross-entropy-loss-chunk-size must be at least 0"]),
        (
            f"{TINY} --mock-data --fp16 --fp16-master-weights-and-grads --optimizer muon",
            1,
            ["--fp16-master-weights-and-grads is built for --optimizer adam, not muon"],
        ),
        (
            f"{TINY} --mock-data --pipeline-model-parallel-size 5",
            5,
            ["--pipeline-model-parallel-size (5) needs a layer for each stage", "use PP 4"],
        ),
        (f"{TINY} --mock-data --lr-warmup-iters 9", 1, ["warm-up (9 iterations)", "(2 iterations)"]),
        (f"{TINY}", 1, ["data is missing", "--mock-data"]),
        (f"{TINY} --data-path /nowhere/at_all --vocab-size 64", 1, ["/nowhere/at_all.bin", "/nowhere/at_all.idx", "preprocess_data"]),
        (f"{TINY} --mock-data --tokenizer-model /nowhere/tokenizer.json", 1, ["/nowhere/tokenizer.json"]),
        (f"{TINY} --mock-data --load /nowhere/run", 1, ["--load /nowhere/run", "no such directory"]),
    ],
)
def test_mistake_names_rule_values_and_remedy(command, world, said):
    told = problems_of(command, world)
    assert all(words in told for words in said), told


def test_vocabulary_larger_than_the_models_is_refused(text):
    told = problems_of(f"{TINY} --data-path {text} --vocab-size 40")
    assert "token id 63" in told and "--vocab-size" in told, told


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_data_file_is_named(damage, text, tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"bad{suffix}").write_bytes(text.with_suffix(suffix).read_bytes())
    bad = tmp_path / "bad.bin" if damage == "truncated" else tmp_path / "bad.idx"
    bad.write_bytes(bad.read_bytes()[:-7] if damage == "truncated" else b"PK\x03\x04" + bytes(200))
    told = problems_of(f"{TINY} --data-path {tmp_path / 'bad'} --vocab-size 64")
    assert str(tmp_path / "bad") in told and "preprocess_data" in told, told


def test_checkpoint_of_another_architecture_names_what_differs(trained, text):
    told = problems_of(
        f"{runs.SMALL} --data-path {text} --vocab-size 64 --train-iters 4 --load {trained} --hidden-size 64 --num-experts 1 4 4"
    )
    assert "hidden_size" in told.replace("-", "_") and "32" in told and "64" in told, told
    assert "experts" in told, told


def test_going_back_within_one_directory_is_refused(trained, text, tmp_path):
    """The newest checkpoint would win the next resume, and be of the run that was left."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    run_distributed(runs.train_here, 1, f"--data-path {text} --vocab-size 64 --train-iters 4 --save {run} --load {run}")
    told = problems_of(f"{runs.SMALL} --data-path {text} --vocab-size 64 --train-iters 6 --load {run} --save {run} --ckpt-step 2")
    assert "--ckpt-step" in told and "4" in told and "--save" in told, told


def test_all_problems_come_at_once_with_exit_code_2_and_nothing_written(tmp_path):
    save = tmp_path / "file"
    save.write_text("in the way")
    command = f"{TINY} --mock-data --save {save} --load /nowhere/run"
    done = subprocess.run([sys.executable, "pretrain_gpt_moe.py", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "2 problems" in done.stderr and str(save) in done.stderr and "/nowhere/run" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["file"]


def test_under_torchrun_one_rank_speaks(tmp_path):
    command = f"{TINY} --mock-data --moe-expert-parallel-size 4"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_gpt_moe.py", *command.split()],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("expert-parallel degree (4)") == 1, done.stderr
