"""The launch scripts: each is its preset, each trains in small, and several nodes meet at the first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import fields_of
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("pretrain_*.sh"))

# An environment for common.sh: a Python in which nothing is missing. It runs what it is given, or only writes it down.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "- "*) exit 0 ;;
  "-c "*device_count*) echo "${{GPUS:-64}}"; exit 0 ;;
esac
if [ -n "$RECORD" ] && [ "$1" != -c ] && [ "$1" != --version ]; then printf '%s\\n' "$@" >"$RECORD"; exit 0; fi
exec "{python}" "$@"
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "OMP_NUM_THREADS", "PYTHONPATH")}
    return inherited | {"VIRTUAL_ENV": str(folder), "RECORD": ""}


def start(script: Path, environment: dict[str, str], *words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *words], cwd=ROOT.parent, env=environment | variables, capture_output=True, text=True, timeout=200
    )


def command_of(script: Path, environment: dict[str, str], folder: Path, *words: str, **variables: str) -> tuple[list[str], list[str]]:
    """(words of torchrun, flags of the training) that the script starts."""
    record = folder / "command"
    done = start(script, environment, *words, RECORD=str(record), **variables)
    assert done.returncode == 0, done.stderr
    lines = record.read_text().splitlines()
    program = lines.index(str(ROOT / "pretrain_gpt_moe.py"))
    return lines[:program], lines[program + 1 :]


def settings_of(run: RunConfig) -> dict:
    return {name: value for group in dataclasses.asdict(run).values() for name, value in group.items()}


def preset_of(script: Path) -> str:
    return script.stem.removeprefix("pretrain_").replace("_", "-")


def test_every_preset_has_a_script():
    assert {preset_of(script) for script in SCRIPTS} == PRESETS.keys()


PATHS = {"save", "load", "load_teacher", "save_interval", "data_path", "vocab_file", "merge_file", "tokenizer_model", "mock_data"}
MOE = {s.name for s in fields_of(MoEConfig)}  # dense scripts do not speak of them


@pytest.mark.parametrize("script", SCRIPTS, ids=preset_of)
def test_a_script_is_its_preset(script, environment, tmp_path):
    torchrun, flags = command_of(script, environment, tmp_path, GPUS="4096")
    ours, preset = settings_of(parse_args(flags).run), settings_of(parse_args(["--preset", preset_of(script)]).run)
    different = {name for name in ours if ours[name] != preset[name]}
    if script.stem == "pretrain_tiny":  # two processes, so that it shows expert parallelism; its length in tokens as in the others
        run = parse_args(flags).run
        assert run.train_iterations(2) == parse_args(["--preset", "tiny"]).run.train_iterations(2)
        assert different - PATHS == {"moe_expert_parallel_size", "train_iters", "train_tokens", "distributed_backend"}
    else:
        assert different - PATHS - (set() if "moe" in script.stem else MOE) == set()
        assert torchrun[torchrun.index("--nproc-per-node") + 1] == str(PRESETS[preset_of(script)].ranks)


def test_variables_and_further_words_win(environment, tmp_path):
    script = ROOT / "scripts" / "pretrain_gpt_350m_moe_128.sh"
    variables = {"NUM_GPUS": "8", "NUM_EXPERTS": "16", "LR": "1e-4", "DATA_PATH": "0.7 a 0.3 b", "SAVE": "here"}
    torchrun, flags = command_of(script, environment, tmp_path, "--lr", "5e-5", "--topk", "2", **variables)
    run = parse_args(flags).run
    assert torchrun[torchrun.index("--nproc-per-node") + 1] == "8"
    assert "--local-addr" in torchrun and torchrun[torchrun.index("--local-addr") + 1] == "127.0.0.1"
    assert (run.moe.num_experts, run.moe.moe_expert_parallel_size, run.optimizer.lr, run.moe.topk) == ((16,), 8, 5e-5, 2)
    assert (run.data.data_path, run.checkpoint.save) == (("0.7", "a", "0.3", "b"), "here")


def test_nodes_meet_at_the_first(environment, tmp_path):
    script = ROOT / "scripts" / "pretrain_gpt_1.3b_moe_128.sh"
    nodes = {"NNODES": "8", "MASTER_ADDR": "node-0", "MASTER_PORT": "12345"}
    for rank, hosts in (("0", "true"), ("7", "false")):
        torchrun, flags = command_of(script, environment, tmp_path, **nodes, NODE_RANK=rank)
        told = dict(itertools.pairwise(torchrun))
        assert (told["--nnodes"], told["--nproc-per-node"]) == ("8", "8")
        assert told["--rdzv-endpoint"] == "node-0:12345"
        assert f"is_host={hosts}" in told["--rdzv-conf"]
        assert parse_args(flags).run.moe.moe_expert_parallel_size == 64


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "2"}, "set MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "set NODE_RANK"),
        ({"NNODES": "3"}, "NUM_GPUS (64, of all nodes together) must be divisible by NNODES (3)"),
        ({"NUM_GPUS": "128"}, "this machine has 64 GPUs, and NUM_GPUS (128) / NNODES (1) asks for 128"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_it_starts(variables, said, environment):
    done = start(ROOT / "scripts" / "pretrain_gpt_350m_moe_128.sh", environment, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr, done.stderr


def test_dry_run_prints_the_plan_of_the_real_size(environment):
    done = start(ROOT / "scripts" / "pretrain_gpt_1.3b_pr_moe_64_128.sh", environment, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["world_size"], plan["parameters"]["total"], plan["degrees"]["ep"]) == (64, 31_391_649_816, [64])


def test_scripts_print_nothing_beside_the_plan(environment, tmp_path):
    script = ROOT / "scripts" / "pretrain_tiny.sh"
    done = start(script, environment, RECORD=str(tmp_path / "command"), DRY_RUN="1", SMOKE="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "--dry-run-world-size\n2\n" in (tmp_path / "command").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=preset_of)
def test_a_smoke_run_has_the_shape_of_the_recipe(script, environment, tmp_path):
    real = parse_args(command_of(script, environment, tmp_path, GPUS="4096")[1]).run
    torchrun, flags = command_of(script, environment, tmp_path, SMOKE="1")
    small, ranks = parse_args(flags).run, int(torchrun[torchrun.index("--nproc-per-node") + 1])
    assert small.moe.mlp_type == real.moe.mlp_type
    assert len(set(small.moe.num_experts)) == len(set(real.moe.num_experts))
    assert small.moe.has_experts == real.moe.has_experts == (small.moe.moe_expert_parallel_size > 1)
    assert (small.parallel.tensor_model_parallel_size > 1) == (real.parallel.tensor_model_parallel_size > 1)
    assert (small.training.bf16, small.training.recompute) == (real.training.bf16, real.training.recompute)
    assert ranks == (2 if small.moe.has_experts or small.parallel.tensor_model_parallel_size > 1 else 1)


# a dense one and one with experts; the other sizes and kinds with --full
ALWAYS = ("pretrain_tiny.sh", "pretrain_gpt_125m.sh", "pretrain_gpt_350m_moe_128.sh", "pretrain_deepseek_v3.sh")
# scripts of one preset share their lines: one is trained of each shape that is not like another's
SHAPES = ("pretrain_deepseek_v3.sh", "pretrain_mixtral_8x22b.sh", "pretrain_gpt_oss_20b_like.sh")
TRAINED = [s for s in SCRIPTS if s.name in SHAPES or "\npreset " not in s.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param(s, marks=() if s.name in ALWAYS else pytest.mark.matrix, id=preset_of(s)) for s in TRAINED]
)
def test_a_smoke_run_trains_and_leaves_nothing(script, environment, tmp_path):
    done = start(script, environment, SMOKE="1", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "iteration        5/       5" in done.stdout
    assert "valid loss at iteration 5" in done.stdout
    assert [*tmp_path.rglob("metrics.jsonl"), *tmp_path.rglob("manifest.json")] == []  # torch leaves folders of its own
