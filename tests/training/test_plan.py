"""The plan that --dry-run prints: against sums by hand, against ranks that really run, and for commands that people have."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.tensor import DTensor
from upstream_commands import ALL, EXAMPLES

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.data.batch import Batch
from megatron_moe.mpu.groups import dense_groups, expert_groups
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.zero import sync_gradients
from megatron_moe.training.distillation import Distillation, build_teacher
from megatron_moe.training.plan import as_json, build_plan, rank_footprint
from megatron_moe.training.step import count_loss_tokens, forward_backward
from training import runs

ROOT = Path(__file__).resolve().parents[2]
TINY = "--preset tiny --mock-data"


def plan_of(command: str | list[str], world: int = 1) -> dict:
    parsed = parse_args(["--dry-run", *(shlex.split(command) if isinstance(command, str) else command)])
    missing = [file.path for file in parsed.missing]
    return json.loads(as_json(build_plan(parsed.run, world, parsed.given, missing, parsed.not_yet, parsed.warnings)))


@functools.cache
def plan_of_known(name: str) -> dict:
    return plan_of(ALL[name].flags, max(ALL[name].ranks, 64))


def problems_of(command: str, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_of(command, world)
    return caught.value.problems


# ---------------------------------------------------------------- commands that people have

# Counted by hand. Width h, vocabulary 50257 padded to 50304, 2048 positions, tied output, biases everywhere:
#   outside of the layers    (50304 + 2048) h embeddings + 2h last norm                     = 52354 h
#   attention and two norms  4 (h^2 + h) + 4h                                               = 4h^2 + 8h
#   an MLP, or an expert     4h^2 + 4h in, 4h^2 + h out                                     = 8h^2 + 5h
#   a gate, per expert       h
#   a residual coefficient   2h + 2
H125, H350, H13, H67 = 768, 1024, 2048, 4096


def outside(h: int) -> int:
    return 52354 * h


def attention(h: int) -> int:
    return 4 * h * h + 8 * h


def mlp(h: int) -> int:
    return 8 * h * h + 5 * h


def dense(layers: int, h: int) -> int:
    return outside(h) + layers * (attention(h) + mlp(h))


def moe(layers: int, h: int, experts: list[int]) -> int:
    """Every second layer has experts instead of its MLP."""
    return outside(h) + layers * attention(h) + (layers - len(experts)) * mlp(h) + sum(e * (mlp(h) + h) for e in experts)


def residual(layers: int, h: int, experts: list[int]) -> int:
    """... beside its MLP."""
    return dense(layers, h) + sum(e * (mlp(h) + h) + 2 * h + 2 for e in experts)


TOTALS = {  # by hand, the integer that comes out, billions as published
    "gpt-350m": (dense(24, H350), 355_919_872, 0.4),
    "gpt-1.3b": (dense(24, H13), 1_315_819_520, 1.3),
    "gpt-6.7b": (dense(32, H67), 6_658_596_864, 6.7),
    "gpt-125m-moe-64": (moe(12, H125, [64] * 6), 1_910_636_544, 1.9),
    "gpt-350m-moe-128": (moe(24, H350, [128] * 12), 13_149_534_208, 13.1),
    "gpt-1.3b-moe-128": (moe(24, H13, [128] * 12), 52_471_525_376, 52.5),
    "gpt-350m-pr-moe-32-64": (residual(24, H350, [32] * 10 + [64] * 2), 4_116_793_368, 4.1),
    "gpt-1.3b-pr-moe-64-128": (residual(24, H13, [64] * 10 + [128] * 2), 31_391_649_816, 31.4),
    "gpt-350m-pr-moe-32-64-mos": (residual(21, H350, [32] * 8 + [64] * 2), 3_541_736_468, 3.5),
    "gpt-1.3b-pr-moe-64-128-mos": (residual(21, H13, [64] * 8 + [128] * 2), 26_944_026_644, 26.9),
    "experts-128": (moe(24, H350, [128] * 12), 13_149_534_208, 13.1),
    "experts-8": (moe(32, H67, [8] * 16) + 2048 * H67, 21_702_189_056, 21.7),  # 4096 positions
    "falling-pyramid": (residual(24, H350, [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3) - 1024 * H350, 6_399_117_336, 6.4),  # 1024
}


def test_the_table_of_totals_has_every_command():
    assert TOTALS.keys() == ALL.keys()


@pytest.mark.parametrize("name", TOTALS)
def test_totals_equal_the_sums_by_hand(name):
    by_hand, number, billions = TOTALS[name]
    parameters = plan_of_known(name)["parameters"]
    assert parameters["total"] == by_hand == number
    assert round(number / 1e9, 1) == billions
    assert sum(parameters["by_part"].values()) == number
    assert sum(parameters["active_by_part"].values()) == parameters["active"]


def test_a_token_meets_one_expert_of_each_layer_and_every_gate():
    known = plan_of_known("gpt-350m-moe-128")["parameters"]
    assert known["active"] == dense(24, H350) + 12 * 128 * H350
    parts = plan_of_known("gpt-350m-pr-moe-32-64")["parameters"]["by_part"]
    assert parts == {
        "embedding": (50304 + 2048) * H350, "attention": 24 * (4 * H350**2 + 4 * H350), "norms": (24 * 4 + 2) * H350,
        "dense_mlp": 12 * mlp(H350), "residual_mlp": 12 * mlp(H350), "residual_coefficients": 12 * (2 * H350 + 2), "shared_experts": 0, "latent_projections": 0,
        "gates": (10 * 32 + 2 * 64) * H350, "experts": (10 * 32 + 2 * 64) * mlp(H350), "head": 0,
    }  # fmt: skip


def test_experts_and_ep_degree_of_a_pyramid_follow_the_layer():
    layers = plan_of_known("gpt-350m-pr-moe-32-64")["layers"]
    assert [layer["layer"] for layer in layers] == list(range(1, 25))
    assert [layer["experts"] for layer in layers] == [1, 32] * 10 + [1, 64] * 2
    assert [layer["expert_parallel"] for layer in layers] == [1, 32] * 10 + [1, 64] * 2
    assert [layer["experts_per_rank"] for layer in layers] == [1] * 24
    assert [layer["expert_data_parallel"] for layer in layers] == [None, 2] * 10 + [None, 1] * 2
    assert [layer["mlp"] for layer in layers] == ["dense", "residual"] * 12
    wide = plan_of_known("gpt-1.3b-pr-moe-64-128")["layers"]
    assert [(layer["expert_parallel"], layer["experts_per_rank"]) for layer in wide[1::2]] == [(64, 1)] * 10 + [(64, 2)] * 2
    student = plan_of_known("gpt-1.3b-pr-moe-64-128-mos")  # 128 ranks
    assert student["world_size"] == 128
    assert [layer["expert_parallel"] for layer in student["layers"][1::2]] == [64] * 8 + [128] * 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_upstream_commands_are_planned_whole(name):
    plan = plan_of_known(name)
    assert plan["per_rank"]["fullest"]["rank"] == 0
    assert plan["missing_paths"][:3] == ["ds_config.json", "gpt2-vocab.json", "gpt2-merges.txt"]
    assert "out/run" in plan["missing_paths"] and any(path.startswith("/data/") for path in plan["missing_paths"])
    assert plan["length"]["decided_by"] == "--train-tokens"
    assert plan["length"]["tokens"] - 300_000_000_000 < plan["batch"]["tokens_per_step"]
    assert plan["learning_rate"]["warmup"] == 375_000_000
    assert plan["before_training"] == []
    assert not any("fp16" in p for p in plan["not_built_yet"])
    assert not any("rampup" in p or "--mos" in p or "teacher" in p for p in plan["not_built_yet"])


def test_a_short_command_gets_named_defaults():
    plan = plan_of_known("falling-pyramid")
    defaults = {d["flag"]: d["value"] for d in plan["defaults"]}
    for flag, value in {
        "--micro-batch-size": 1, "--global-batch-size": 64, "--seq-length": 1024, "--lr": 1e-3, "--lr-decay-style": "linear",
        "--vocab-size": 50257, "--topk": 1, "--expert-interval": 2, "--split": "969,30,1", "--zero-stage": 1,
        "--train-iters --train-samples --train-tokens": None,
    }.items():  # fmt: skip
        assert defaults[flag] == value, flag
    assert "--num-layers" not in defaults and "--moe-loss-coeff" not in defaults  # given
    assert any("how long to train" in p for p in plan["before_training"])
    assert any("data is missing" in p for p in plan["before_training"])
    assert (plan["length"]["iterations"], plan["learning_rate"]["decay"], plan["flops"]["whole_run"]) == (None, None, None)
    assert any("falls with depth" in w for w in plan["warnings"])


# ---------------------------------------------------------------- what a rank holds

WORLDS = [  # ranks and flags: the pyramid of runs.SMALL has 2 and 4 experts, so EP 4 makes two degrees
    (2, "--zero-stage 0 --moe-expert-parallel-size 2"),
    (2, "--zero-stage 1 --optimizer sgd"),
    (2, "--zero-stage 3 --optimizer muon --moe-expert-parallel-size 2"),
    (2, "--zero-stage 1 --fp16"),
    (2, "--zero-stage 2 --fp16 --fp16-master-weights-and-grads"),
    (4, "--zero-stage 1 --moe-expert-parallel-size 4"),
    (4, "--zero-stage 2 --moe-expert-parallel-size 2 --bf16 --num-experts 1 2 2"),
    (4, "--zero-stage 3 --moe-expert-parallel-size 4 --tensor-model-parallel-size 2 --bf16"),
    (4, "--zero-stage 3 --hidden-size 36 --num-experts 1 2 6 --moe-expert-parallel-size 2 --params-dtype float64"),
    (4, "--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --enable-expert-tensor-parallelism --bf16"),
    (4, "--zero-stage 1 --tensor-model-parallel-size 2 --expert-tensor-parallel-size 4"),
    (4, "--zero-stage 0 --moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2"),
]
VOCAB = 60


def local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def size(tensors) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def hold_here(flags: str) -> dict:
    """What this rank has at rest, after a forward and after a backward; figures as a plan names them."""
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    mesh = build_parallel_mesh(run, "cpu")
    model = build_parallel_model(run, VOCAB, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, run.optimizer)
    elements = {name: local(p).numel() for name, p in model.named_parameters()}
    found = {
        "expert_parameters": sum(n for name, n in elements.items() if ".experts." in name),
        "dense_parameters": sum(n for name, n in elements.items() if ".experts." not in name),
        "parameters": size(model.parameters()),
    }
    tokens = torch.arange(16).repeat(2, 1)
    sync_gradients(model, run.parallel.zero_stage, True)
    losses = model(tokens, tokens, tokens)
    # FSDP shows the gathered parameters now: of stage 3 those outside of the blocks alone
    blocks = size(model.layers.parameters()) if run.parallel.zero_stage == 3 else 0
    found["gathered"] = size(model.parameters()) - blocks
    losses.sum().backward()
    found["gradients"] = size(p.grad for p in model.parameters())
    optimizer.step()
    found["optimizer"] = size(t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "flags"), WORLDS)
def test_a_rank_holds_what_the_plan_says(world, flags):
    found = run_distributed(hold_here, world, flags)
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    planned = [rank_footprint(run, world, VOCAB, rank) for rank in range(world)]
    for rank, (here, plan) in enumerate(zip(found, planned)):
        if run.parallel.zero_stage == 3:  # the largest block comes and goes inside the forward
            assert here.pop("gathered") < plan.gathered
        assert here == {name: getattr(plan, name) for name in here}, f"rank {rank}"
    assert planned[0].parameters == max(p.parameters for p in planned), "rank 0 is the fullest"
    assert planned[-1].parameters == min(p.parameters for p in planned), "the last rank is the emptiest"


def hold_stage_here(flags: str) -> dict:
    """The same of a rank of a pipeline, in a step of several micro-batches."""
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    mesh = build_parallel_mesh(run, "cpu")
    model = build_parallel_model(run, VOCAB, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, run.optimizer)
    elements = {name: local(p).numel() for name, p in model.named_parameters()}
    found = {
        "expert_parameters": sum(n for name, n in elements.items() if ".experts." in name),
        "dense_parameters": sum(n for name, n in elements.items() if ".experts." not in name),
        "parameters": size(model.parameters()),
    }
    seen = []
    next(iter(model.layers.values())).register_forward_pre_hook(lambda *_: seen.append(size(model.parameters())))
    tokens = torch.arange(16).repeat(2, 1)
    batches = [Batch(tokens, tokens, torch.ones(2, 16), tokens, None, tokens[:, 0]) for _ in range(4)]
    forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, 1, 0)
    found |= {"gathered": seen[-1], "gradients": size(p.grad for p in model.parameters())}
    optimizer.step()
    found["optimizer"] = size(t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (4, "--pipeline-model-parallel-size 2 --zero-stage 1 --moe-expert-parallel-size 2"),
        (4, "--pipeline-model-parallel-size 2 --zero-stage 3 --moe-expert-parallel-size 2 --bf16"),
        (
            4,
            "--pipeline-model-parallel-size 2 --num-layers 4 --num-experts 1 1 2 8 --num-layers-per-virtual-pipeline-stage 1 --zero-stage 2",
        ),
    ],
)
def test_a_rank_of_a_stage_holds_what_the_plan_says(world, flags):
    found = run_distributed(hold_stage_here, world, flags)
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    for rank, here in enumerate(found):
        plan = rank_footprint(run, world, VOCAB, rank)
        assert here == {name: getattr(plan, name) for name in here}, f"rank {rank}"


def test_stage_3_gathers_the_largest_block_and_what_lies_outside():
    """tests/distributed counts the same on running ranks."""
    run = parse_args(f"{runs.SMALL} --zero-stage 3 --bf16".split()).run
    h = 32
    largest = attention(h) + 5 * mlp(h) + 2 * h + 2  # the third layer: an MLP beside 4 experts
    outside_of_layers = (128 + 16 + 2) * h  # padded vocabulary, positions, norm
    gate = 4 * h  # stays float32
    assert rank_footprint(run, 2, VOCAB, 0).gathered == 2 * (largest + outside_of_layers) + 4 * gate


def test_the_plan_says_how_many_logits_there_are_at_a_time():
    large = f"{TINY} --vocab-size 128000 --max-position-embeddings 4096 --seq-length 4096 --micro-batch-size 2 --bf16"
    whole = plan_of(f"{large} --cross-entropy-loss-chunk-size 0")["loss"]
    assert whole == {"columns": 128000, "columns_at_a_time": 128000, "logits_bytes": 2 * 8192 * 128000}
    assert plan_of(large)["loss"] == {"columns": 128000, "columns_at_a_time": 1024, "logits_bytes": 2 * 8192 * 1024}
    assert plan_of(f"{large} --cross-entropy-loss-chunk-size 500")["loss"]["columns_at_a_time"] == 500
    split = plan_of(f"{large} --tensor-model-parallel-size 2", 2)["loss"]
    assert (split["columns"], split["columns_at_a_time"]) == (64000, 1024)


def test_the_plan_says_what_lives_on_the_host():
    assert plan_of(TINY)["per_rank"]["fullest"]["on_host"] == []
    assert plan_of(f"{TINY} --cpu-optimizer")["per_rank"]["fullest"]["on_host"] == ["parameters", "gradients", "optimizer"]


def test_whole_gradients_are_those_of_the_experts_here_and_of_everything_else():
    run = parse_args(f"{runs.SMALL} --moe-expert-parallel-size 4".split()).run
    counts = [rank_footprint(run, world, VOCAB, 0) for world in (4, 8)]
    assert counts[0].whole_gradients == counts[1].whole_gradients  # not cut by the data ranks
    alone = rank_footprint(parse_args(runs.SMALL.split()).run, 1, VOCAB, 0)
    expert = mlp(32) * 4  # bytes of one
    assert counts[0].whole_gradients == alone.gradients - (2 - 1) * expert - (4 - 1) * expert


TAUGHT = "--mos --num-layers-teacher 4 --num-experts-teacher 1 2 4 4 --hidden-size-teacher 48 --load-teacher out/teacher"


def hold_teacher_here(flags: str) -> dict:
    """What the teacher of a run holds on this rank, before and after it was asked for the first time."""
    run = parse_args(f"{runs.SMALL} {flags}".split()).run
    mesh = build_parallel_mesh(run, "cpu")
    teacher = build_teacher(run, VOCAB, mesh, torch.device("cpu"))
    for p in teacher.parameters():
        local(p.detach()).fill_(0.01)
    found = {"parameters": size(teacher.parameters())}
    tokens = torch.arange(16).repeat(2, 1)
    Distillation(run.distillation, teacher).teach(Batch(tokens, tokens, tokens, tokens, None, tokens[:, 0]))
    blocks = size(teacher.layers.parameters()) if run.parallel.zero_stage == 3 else 0
    found["gathered"] = size(teacher.parameters()) - blocks
    dist.barrier()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "flags"), [WORLDS[0], WORLDS[2], WORLDS[4]])
def test_a_rank_holds_of_the_teacher_what_the_plan_says(world, flags):
    found = run_distributed(hold_teacher_here, world, f"{flags} {TAUGHT}")
    plan = plan_of(f"{runs.SMALL} {flags} {TAUGHT} --mock-data --vocab-size {VOCAB} --global-batch-size 8", world)["teacher"]
    for rank, planned in ((0, plan["per_rank"]["fullest"]), (world - 1, plan["per_rank"]["emptiest"])):
        assert planned["rank"] == rank and planned["bytes"].keys() == {"parameters", "gathered"}
        if "--zero-stage 3" in flags:  # the largest block comes and goes inside the forward
            assert found[rank].pop("gathered") < planned["bytes"]["gathered"]
        assert found[rank] == {name: planned["bytes"][name] for name in found[rank]}


def test_the_teacher_of_a_known_command_is_the_model_that_it_was_trained_as():
    student, alone = plan_of_known("gpt-350m-pr-moe-32-64-mos"), plan_of_known("gpt-350m-pr-moe-32-64")
    teacher = student["teacher"]
    assert teacher["layers"] == [layer["experts"] for layer in alone["layers"]]
    assert teacher["parameters"]["total"] == alone["parameters"]["total"]
    assert teacher["flops_per_token"] == alone["flops"]["per_token"] / 3
    assert teacher["per_rank"]["fullest"]["expert_parameters"] == alone["per_rank"]["fullest"]["expert_parameters"]
    assert alone["teacher"] is None and "out/teacher/" in student["missing_paths"]


def test_sizes_of_a_ramp_and_a_curriculum_are_listed_and_counted():
    words = (
        "--global-batch-size 12 --rampup-batch-size 4 4 16 --curriculum-learning --curriculum-min-difficulty 64 --curriculum-total-step 4"
    )
    plan = plan_of(f"{TINY} {words} --curriculum-difficulty-step 32 --train-samples 50 --lr-warmup-samples 8")  # 4 4 8 12 12 12
    assert [tuple(s.values()) for s in plan["batch"]["sizes"]] == [(1, 4, 64), (2, 4, 96), (3, 8, 96), (4, 12, 128)]
    assert plan["length"] == {"iterations": 6, "samples": 52, "tokens": 4 * 64 + 12 * 96 + 36 * 128, "decided_by": "--train-samples"}
    assert (plan["learning_rate"]["warmup_iterations"], plan["learning_rate"]["decay_iterations"]) == (2, 6)
    assert 0 < plan["flops"]["whole_run"] < plan["flops"]["per_token"] * plan["length"]["tokens"]
    plain = plan_of(f"{TINY} --train-samples 50")
    assert plain["flops"]["whole_run"] == plain["flops"]["per_token"] * plain["length"]["tokens"]


# ---------------------------------------------------------------- pipelines


def test_stages_are_listed_and_add_up_to_the_model():
    words = f"{TINY} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 32"
    plan = plan_of(words, 4)
    pipeline, tied = plan["pipeline"], plan["vocabulary"]["padded"] * 128
    assert (pipeline["schedule"], pipeline["micro_batches"], pipeline["idle"]) == ("interleaved", 4, round(0.5 / 4.5, 4))
    assert [(s["layers"], s["pipeline_rank"]) for s in pipeline["stages"]] == [([1], 0), ([2], 1), ([3], 0), ([4], 1)]
    assert [s["parts"] for s in pipeline["stages"]] == [["embedding", "positions"], [], [], ["norm", "tied_logits"]]
    assert sum(s["parameters"] for s in pipeline["stages"]) == plan["parameters"]["total"] + tied
    assert sum(s["flops_per_token"] for s in pipeline["stages"]) == plan["flops"]["per_token"]
    assert [s["moe_layers"] for s in pipeline["stages"]] == [int(layer["experts"] > 1) for layer in plan["layers"]]
    assert plan["groups"]["pp"] == {"number": 2, "size": 2, "stride": 2, "ranks": [[0, 2], [1, 3]]}
    assert plan["not_built_yet"] == []
    assert plan_of(TINY)["pipeline"] is None


def test_of_all_stages_the_fullest_and_the_emptiest_rank_are_shown():
    """The last stage has most experts, the first one none; within a stage nothing is cut unevenly here."""
    words = f"{runs.SMALL} --num-layers 4 --num-experts 1 1 4 16 --vocab-size 64 --mock-data --pipeline-model-parallel-size 4"
    per_rank = plan_of(words, 8)["per_rank"]
    assert (per_rank["fullest"]["rank"], per_rank["emptiest"]["rank"]) == (6, 3)
    assert per_rank["emptiest"]["expert_parameters"] == 0 < per_rank["fullest"]["expert_parameters"]


def test_a_short_step_and_what_zero_does_not_save_are_warned_of():
    told = plan_of(f"{TINY} --pipeline-model-parallel-size 4 --zero-stage 3 --global-batch-size 8", 4)["warnings"]
    assert any("2 micro-batch(es) per step are fewer than the 4 pipeline ranks" in w for w in told)
    assert any("--zero-stage 3 saves less memory" in w and "parameters stay gathered" in w for w in told)


def test_a_known_command_is_planned_in_stages():
    """The published 52-billion model in four stages of 16 ranks each."""
    words = "--preset gpt-1.3b-moe-128 --pipeline-model-parallel-size 4 --moe-expert-parallel-size 16 --global-batch-size 512"
    plan = plan_of(f"{words} --micro-batch-size 4", 64)
    assert [s["layers"] for s in plan["pipeline"]["stages"]] == [list(range(first, first + 6)) for first in (1, 7, 13, 19)]
    whole = plan_of("--preset gpt-1.3b-moe-128 --moe-expert-parallel-size 64", 64)["per_rank"]["fullest"]["expert_parameters"]
    assert plan["per_rank"]["fullest"]["expert_parameters"] == whole  # a quarter of the layers, four times the experts


# ---------------------------------------------------------------- groups, time, data


def test_groups_are_those_of_the_tables_and_long_ones_are_cut():
    words = "--preset gpt-350m-pr-moe-32-64 --tensor-model-parallel-size 2"
    groups = plan_of(words, 64)["groups"]
    for axis, table in dense_groups(64, tp=2).items():
        assert groups[axis]["ranks"] == table
    for degree in (32, 64):
        ep, edp = expert_groups(64, degree, tp=2)
        assert (groups["ep"][str(degree)]["ranks"], groups["edp"][str(degree)]["ranks"]) == (ep, edp)
    assert groups["dp"] | {"ranks": 0} == {"number": 2, "size": 32, "stride": 2, "ranks": 0}
    many = plan_of(words + " --micro-batch-size 1", 256)["groups"]["edp"]["64"]
    assert many == {"number": 64, "size": 4, "stride": 64, "ranks": [[0, 64, 128, 192], [63, 127, 191, 255]]}


def test_batch_length_and_learning_rate_are_resolved():
    plan = plan_of(f"{TINY} --global-batch-size 32 --train-samples 100 --lr-warmup-samples 16", 2)
    sizes = [{"from_step": 1, "sequences": 32, "length": 128}]
    assert plan["batch"] == {
        "micro_batch_size": 4,
        "global_batch_size": 32,
        "micro_batches_per_step": 4,
        "tokens_per_step": 32 * 128,
        "sizes": sizes,
    }
    assert plan["length"] == {"iterations": 4, "samples": 128, "tokens": 128 * 128, "decided_by": "--train-samples"}
    rate = plan["learning_rate"]
    assert (rate["unit"], rate["warmup"], rate["decay"], rate["warmup_iterations"], rate["decay_iterations"]) == (
        "samples",
        16,
        128,
        0.5,
        4,
    )
    assert plan["flops"]["whole_run"] == plan["flops"]["per_token"] * 128 * 128 == plan["flops"]["per_step"] * 4


def test_epochs_are_counted_where_the_data_is_and_missing_data_is_listed(tmp_path):
    text = runs.write_text(tmp_path / "corpus")
    words = (
        f"--preset tiny --seq-length 16 --vocab-size 64 --split 1,0,0 --global-batch-size 4 --train-iters 50 --data-path 0.75 {text} 0.25 "
    )
    second = runs.write_text(tmp_path / "second", documents=20)
    data = plan_of(words + str(second))["data"]
    assert [s["prefix"] for s in data["sources"]] == [str(text), str(second)]
    for source in data["sources"]:
        assert source["samples"] == (source["tokens"] - 1) // 16
        assert source["epochs"] == pytest.approx(source["weight"] * 200 / source["samples"], abs=1e-4)
    assert data["epochs"] == pytest.approx(200 / sum(s["samples"] for s in data["sources"]), abs=1e-4)
    assert data["train_tokens"] == sum(s["tokens"] for s in data["sources"])
    absent = plan_of(words + "/nowhere/text")
    assert (absent["missing_paths"], absent["data"]["epochs"], absent["data"]["sources"]) == (["/nowhere/text"], None, [])


# ---------------------------------------------------------------- bad input, and files


def test_files_that_are_here_are_checked_and_those_that_are_not_are_listed(tmp_path):
    (tmp_path / "bad.idx").write_bytes(b"PK\x03\x04" + bytes(200))
    (tmp_path / "bad.bin").write_bytes(b"")
    words = f"--preset tiny --vocab-size 64 --train-iters 2 --lr-warmup-iters 9 --data-path 0.5 {tmp_path / 'bad'} 0.5 /nowhere/text"
    first, second = problems_of(words)
    assert str(tmp_path / "bad") in first and "warm-up (9 iterations)" in second
    words = f"{TINY} --config {tmp_path / 'none.yaml'} --load /nowhere/run --tokenizer-model /nowhere/tokenizer.json"
    plan = plan_of(words)
    assert plan["missing_paths"] == [str(tmp_path / "none.yaml"), "/nowhere/tokenizer.json", "/nowhere/run"]
    assert plan["vocabulary"] == {"size": 50257, "padded": 50304, "is_known": False}


def test_nothing_is_written_where_the_run_would_save(tmp_path):
    plan_of(f"{TINY} --save {tmp_path / 'run'} --tensorboard-dir {tmp_path / 'events'}")
    assert list(tmp_path.iterdir()) == []


def test_world_problems_come_with_the_other_way_out():
    (problem,) = problems_of("--preset gpt-350m-moe-128")
    assert "ranks (1)" in problem and "expert-parallel degree (64)" in problem and "--dry-run-world-size" in problem
    assert plan_of("--preset gpt-350m-moe-128 --moe-expert-parallel-size 1")["world_size"] == 1


def test_settings_are_a_config_file(tmp_path):
    words = f"{TINY} --num-layers 8 --num-experts 2 2 4 4 --disable-bias-linear --moe-noisy-gate-policy Jitter --train-tokens 3e6"
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(plan_of(words)["settings"]))
    assert parse_args(["--config", str(file)]).run == parse_args(words.split()).run


def run_command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "pretrain_gpt_moe.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_prints_one_json_object_and_warns_elsewhere():
    done = run_command(*EXAMPLES["gpt-1.3b-moe-128"].flags, "--dry-run", "--dry-run-world-size", "64")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == plan_of_known("gpt-1.3b-moe-128")
    assert "warning: --no-pipeline-parallel has no effect" in done.stderr


def test_all_problems_of_a_plan_come_at_once():
    done = run_command(*shlex.split(f"{TINY} --dry-run --dry-run-world-size 3 --moe-expert-parallel-size 2 --lr-warmup-iters 200"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "3 problems" in done.stderr, done.stderr
    for part in ("--global-batch-size (8)", "expert-parallel degree (2)", "warm-up (200 iterations)"):
        assert part in done.stderr
    done = run_command("--dry-run-world-size", "4")
    assert done.returncode == 2 and "--dry-run-world-size (4) needs --dry-run" in done.stderr


def test_plan_names_the_checks_and_what_a_proof_of_the_layout_would_train():
    checks = plan_of(
        f"{TINY} --moe-expert-parallel-size 8 --tensor-model-parallel-size 4 --global-batch-size 64 --check-replicas-interval 50", 32
    )["checks"]
    assert (checks["replicas_interval"], checks["timeout_minutes"]) == (50, 10.0)
    (layout,) = checks["verify_parallelism"]
    assert layout["processes"] == 8 and {"TP 4 -> 2", "EP 4 -> 2", "EP 8 -> 4", "data ranks 8 -> 4"} <= set(layout["folded"])
