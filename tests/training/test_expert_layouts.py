"""Expert tensor parallelism and the dispatchers from the command line: planned as they are built, logged, trained."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from upstream_commands import EXAMPLES

from megatron_moe import mpu
from megatron_moe.arguments import parse_args
from megatron_moe.metrics.reader import read_records
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.module_experts import ModuleExperts
from megatron_moe.mpu.groups import expert_groups, expert_tensor_groups
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.plan import as_json, build_plan
from megatron_moe.utils.logging import logger
from training import runs

MOE_EXAMPLES = [name for name in EXAMPLES if "moe" in name or "pr" in name]
EP2, ETP2, TP2 = "--moe-expert-parallel-size 2", "--expert-tensor-parallel-size 2", "--tensor-model-parallel-size 2"


def plan_of(words: list[str], world: int) -> dict:
    parsed = parse_args(["--dry-run", *words])
    missing = [file.path for file in parsed.missing]
    return json.loads(as_json(build_plan(parsed.run, world, parsed.given, missing, parsed.not_yet, parsed.warnings)))


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", MOE_EXAMPLES)
def test_upstream_commands_are_planned_with_experts_cut_over_tensor_parallel_ranks(name):
    """As upstream folds them: with TP 2 an expert-parallel group of 64 takes 128 ranks."""
    world = 2 * max(EXAMPLES[name].ranks, 64)
    plain = plan_of([*EXAMPLES[name].flags, *TP2.split()], world)
    cut = plan_of([*EXAMPLES[name].flags, *TP2.split(), "--enable-expert-tensor-parallelism"], world)
    assert (plain["degrees"]["etp"], cut["degrees"]["etp"]) == (1, 2)
    assert cut["parameters"] == plain["parameters"]
    assert not any("expert-tensor" in line or "expert tensor" in line for line in cut["not_built_yet"])
    assert cut["per_rank"]["fullest"]["rank"] == 0
    for layer in cut["layers"][1::2]:
        assert layer["expert_data_parallel"] == world // (2 * layer["expert_parallel"])
        assert layer["dispatcher"] == "alltoall" and "ETP 2" in layer["dispatcher_why"]
    degree = cut["degrees"]["ep"][-1]
    ep, edp = expert_groups(world, degree, tp=2, expert_tensor_parallel=True)
    for axis, groups in (("ep", ep), ("edp", edp)):
        table = cut["groups"][axis][str(degree)]
        assert (table["number"], table["size"], table["ranks"][0], table["ranks"][-1]) == (
            len(groups),
            len(groups[0]),
            groups[0],
            groups[-1],
        )
    assert cut["groups"]["etp"]["ranks"][-1] == expert_tensor_groups(world, 2)[-1]


def test_a_rank_holds_half_of_twice_as_many_experts():
    words = f"{runs.SMALL} --mock-data --vocab-size 60 --zero-stage 0 --num-experts 1 4 4 --global-batch-size 8"
    by_number = plan_of(f"{words} --moe-expert-parallel-size 4".split(), 4)["per_rank"]["fullest"]
    by_slices = plan_of(f"{words} {EP2} {ETP2}".split(), 4)["per_rank"]["fullest"]
    output_biases = 2 * 32  # one more expert here in each of two layers, whose output bias is not cut
    assert by_slices["expert_parameters"] == by_number["expert_parameters"] + output_biases
    assert by_slices["dense_parameters"] == by_number["dense_parameters"]


LAYOUTS = [
    (2, f"{EP2}"),
    (2, f"{ETP2}"),
    (2, f"{EP2} --moe-overlap-chunks 2"),
    (4, f"{TP2} {EP2} {ETP2} --moe-pad-expert-input-to-capacity"),
    (4, f"{TP2} --moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2 --moe-overlap-chunks 3"),
    (4, f"{TP2} --moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical"),  # one node, as the pool has it
    (4, f"{TP2} {EP2} {ETP2} --topk 2 --moe-train-capacity-factor 1.1"),
]


def built(flags: str) -> list[tuple[str, str]]:
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    model = build_parallel_model(run, 60, build_parallel_mesh(run, "cpu"), torch.device("cpu"))
    return [(moe.dispatcher.name, moe.dispatcher.why) for moe in moe_layers(model)]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "flags"), LAYOUTS)
def test_the_plan_names_the_dispatchers_that_are_built(world, flags):
    layers = plan_of(f"{runs.SMALL} {flags} --mock-data".split(), world)["layers"]
    planned = [(layer["dispatcher"], layer.get("dispatcher_why", "")) for layer in layers if layer["experts"] > 1]
    assert run_distributed(built, world, flags) == [planned] * world
    assert layers[0]["dispatcher"] is None


# ---------------------------------------------------------------- the log


def start_lines(flags: str) -> list[str]:
    """What rank 0 says about dispatch before the first step."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
    try:
        runs.train_here(f"--mock-data --vocab-size 60 --train-iters 4 {flags}")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [line for line in lines if "dispatch" in line]


@pytest.mark.distributed
def test_the_choice_of_auto_is_one_line_for_each_case():
    lines, others = run_distributed(start_lines, 2, f"--num-experts 1 4 4 {EP2}")
    assert others == []
    assert lines == [
        "layer 2: 4 experts of width 128, residual (coefficient), expert-parallel 2, alltoall dispatch",
        "layer 3: 4 experts of width 128, residual (coefficient), expert-parallel 2, alltoall dispatch",
        "--moe-token-dispatcher auto, 4 experts, k 1, EP 2: alltoall. A token is sent to other ranks 0.5 times by an all-to-all, 1 times by an "
        "all-gather, which has room for 1 times the rows of equally busy experts (and is taken up to 1.25)",
    ]
    asked = run_distributed(start_lines, 2, f"--num-experts 1 4 4 {EP2} --moe-token-dispatcher allgather")[0]
    assert len(asked) == 2  # what was asked for needs no reason
    pyramid = run_distributed(start_lines, 4, f"--num-experts 1 2 4 --moe-expert-parallel-size 4 {TP2}")[0]
    assert [line.partition(":")[0] for line in pyramid[2:]] == [f"--moe-token-dispatcher auto, {n} experts, k 1, EP {n}" for n in (2, 4)]


# ---------------------------------------------------------------- training


def shrunk(name: str) -> str:
    """The command of an example with its own layout of layers, on mock data, in float32."""
    launch = EXAMPLES[name]
    words = launch.flags
    dropped = {"--fp16": 0, "--deepspeed_config": 1, "--vocab-file": 1, "--merge-file": 1, "--data-path": 1, "--load": 1, "--save": 1,
               "--tensorboard-dir": 1, "--train-tokens": 1, "--lr-decay-tokens": 1, "--lr-warmup-tokens": 1, "--load-teacher": 1,
               "--mos": 0, "--kd-beta-ce": 1, "--exit-duration-in-mins": 1}  # fmt: skip
    kept, i = [], 0
    while i < len(words):
        if words[i] in dropped:
            i += dropped[words[i]]
        else:
            kept.append(words[i])
        i += 1
    small = (
        "--num-layers 4 --num-experts 2 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
        "--micro-batch-size 1 --global-batch-size 4 --train-iters 3 --mock-data --vocab-size 60 --eval-iters 1 --eval-interval 100"
    )
    return " ".join([*kept, *small.split()])


def trained(flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SMALL", "")
        runs.train_here(flags)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["gpt-350m-moe-128", "gpt-1.3b-pr-moe-64-128"])
def test_upstream_commands_train_with_experts_cut_over_tensor_parallel_ranks(name, tmp_path):
    """Dropless, where layouts must agree, in float32 to 1e-4."""
    curves = {}
    for where, world, layout in (
        ("one", 1, "--tensor-model-parallel-size 1 --moe-expert-parallel-size 1"),
        ("cut", 4, f"{TP2} {EP2} --enable-expert-tensor-parallelism"),
    ):
        flags = f"{shrunk(name)} {layout} --disable-moe-token-dropping --metrics-path {tmp_path / where}"
        run_distributed(trained, world, flags)
        curves[where] = [r["lm_loss"] for r in read_records(tmp_path / where) if r["event"] == "train"]
    assert len(curves["one"]) >= 1
    assert curves["cut"] == pytest.approx(curves["one"], rel=1e-4)


# ---------------------------------------------------------------- what cannot be cut


def refusal(flags: str) -> str:
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    mesh = build_parallel_mesh(run, "cpu")
    mpu.set_default_mesh(mesh)
    try:
        build_parallel_model(run, 60, mesh, torch.device("cpu"), lambda width: torch.nn.Linear(width, width))
    except ValueError as error:
        return str(error)
    finally:
        mpu.set_default_mesh(None)
    return ""


@pytest.mark.distributed
def test_experts_that_are_modules_cannot_be_cut_and_say_so():
    said = run_distributed(refusal, 2, ETP2)
    assert all("experts of Linear cannot be cut over 2 ranks" in text and "--expert-tensor-parallel-size 1" in text for text in said)
    assert run_distributed(refusal, 2, EP2) == ["", ""]
    with pytest.raises(ValueError, match="cannot be cut"):
        ModuleExperts(2, 4, lambda width: torch.nn.Linear(width, width)).cut_into(2)
