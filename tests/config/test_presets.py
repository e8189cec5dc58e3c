"""Presets are the published recipes: held against the commands that upstream's scripts start."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from upstream_commands import EXAMPLES

from megatron_moe.arguments import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.presets.deepspeed_moe import DEEPSPEED_MOE
from megatron_moe.config.run import RunConfig
from megatron_moe.training.plan import as_json, build_plan
from megatron_moe.training.preset_table import preset_counts

ROOT = Path(__file__).resolve().parents[2]
RECIPES = list(EXAMPLES)

# What a preset does not take over from the command, and why.
OF_ONE_RUN = {"vocab_file", "merge_file", "data_path", "save", "load", "load_teacher", "tensorboard_dir"}  # paths
OF_WRITING = {"save_interval", "tensorboard_queue_size"}  # no effect without the paths
OTHERWISE = {
    "fp16", "bf16",  # bf16 is as wide and needs no loss scale
    "kd_stop_iters",  # the paper's; upstream ends a distillation by another command
    "num_workers",  # reading ahead changes nothing but the time
    "exit_duration_in_mins",  # 57 years
    "train_iters", "train_samples",  # bounds behind --train-tokens: see the test of the length
}  # fmt: skip


def settings_of(run: RunConfig) -> dict:
    return {name: value for group in dataclasses.asdict(run).values() for name, value in group.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_is_the_upstream_command(name):
    ours, theirs = settings_of(parse_args(["--preset", name]).run), settings_of(parse_args(EXAMPLES[name].flags).run)
    different = {n for n in ours if ours[n] != theirs[n]}
    assert different <= OF_ONE_RUN | OF_WRITING | OTHERWISE
    assert {n for n in different - OF_ONE_RUN if n in PRESETS[name].settings} - {"kd_stop_iters"} == {"bf16"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_trains_as_long_as_the_upstream_command(name):
    ranks = PRESETS[name].ranks
    ours, theirs = parse_args(["--preset", name]).run, parse_args(EXAMPLES[name].flags).run
    assert ours.train_iterations(ranks) == theirs.train_iterations(ranks)


def test_every_preset_of_deepspeed_moe_has_an_upstream_command():
    assert DEEPSPEED_MOE.keys() - set(RECIPES) == {"tiny", "gpt-125m", "gpt-760m", "gpt-2.7b", "gpt-13b", "gpt-175b"}
    assert set(RECIPES) < PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_its_ranks(name):
    teacher = ["--load-teacher", "x"] if PRESETS[name].settings.get("mos") else []
    run = parse_args(["--preset", name, "--mock-data", *teacher]).run
    assert [*run.world_problems(PRESETS[name].ranks), *run.train_problems(), *run.warnings()] == []


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b-like"])
def test_a_preset_has_a_plan_that_fits_eighty_gigabytes(name):
    parsed = parse_args(["--preset", name, "--dry-run"])
    plan = json.loads(as_json(build_plan(parsed.run, PRESETS[name].ranks, parsed.given)))
    assert plan["parameters"]["total"] == preset_counts(name).total  # these vocabularies need no padding
    assert sum(plan["per_rank"]["fullest"]["bytes"].values()) < 60e9  # of states; activations beside them


def test_model_preset_is_another_spelling():
    assert parse_args(["--model-preset", "mixtral-8x7b", "--lr", "1"]).run == parse_args(["--preset", "mixtral-8x7b", "--lr=1"]).run


def test_the_command_line_overrides_a_preset():
    run = parse_args(["--preset", "gpt-350m-moe-128", "--num-experts", "8", "--moe-expert-parallel-size", "2", "--train-iters", "5"]).run
    assert (run.moe.num_experts, run.moe.moe_expert_parallel_size, run.training.train_tokens) == ((8,), 2, None)
    assert run.model.hidden_size == 1024


def test_the_list_says_what_each_is_and_how_large():
    done = subprocess.run([sys.executable, "pretrain_gpt_moe.py", "--list-presets"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    table, convention = done.stdout.split("\n\n")
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert rows.keys() == {"preset", *PRESETS}
    assert "vocabulary before padding" in convention.replace("\n", " ")
    assert rows["gpt-350m-moe-128"][-3:] == ["13.1B", "357.4M", "64"]
    assert rows["deepseek-v3"][-3:] == ["671.0B", "37.6B", "2048"]
    assert rows["gpt-6.7b"][-3:] == ["6.7B", "6.7B", "64"]
