"""Which layers a pipeline stage gets, and which layouts are refused with what advice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.pipeline import fits_rounds, nearest_that_fit, split_layers

TINY = "--preset tiny --mock-data --train-iters 2"  # 4 layers, micro-batch 4


def sizes(*args) -> list[int]:
    return [len(layers) for layers in split_layers(*args)]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((8, 4), [2, 2, 2, 2]),
        ((10, 4), [2, 3, 3, 2]),  # the middle first
        ((10, 3), [3, 4, 3]),
        ((10, 6), [1, 2, 2, 2, 2, 1]),
        ((11, 6), [2, 2, 2, 2, 2, 1]),  # then the first, never the last
        ((3, 2), [2, 1]),
        ((8, 4, 1), [1, 3, 2, 2]),
        ((8, 4, None, 1), [2, 3, 2, 1]),
        ((8, 4, 1, 1), [1, 3, 3, 1]),
        ((5, 2, 1), [1, 4]),
        ((5, 2, 2, 3), [2, 3]),
        ((5, 1), [5]),
    ],
)
def test_layers_that_do_not_divide_go_to_the_middle(args, expected):
    assert sizes(*args) == expected


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_layer_is_on_one_stage_in_order_and_no_stage_is_empty(num_layers, stages):
    if num_layers < stages:
        return
    split = split_layers(num_layers, stages)
    assert [layer for layers in split for layer in layers] == list(range(1, num_layers + 1))
    counts = [len(layers) for layers in split]
    assert max(counts) - min(counts) <= 1 and counts[-1] == min(counts) > 0


@given(st.integers(1, 60), st.integers(2, 8))
def test_the_nearest_numbers_of_micro_batches_fit(n, pp):
    near = nearest_that_fit(n, pp)
    assert all(fits_rounds(m, pp) for m in near)
    if fits_rounds(n, pp):
        assert near == [n]
    else:
        assert near[0] < n < near[1] and not any(fits_rounds(m, pp) for m in range(near[0] + 1, near[1]))


def problems(flags: str, world: int = 2) -> list[str]:
    try:
        parsed = parse_args(f"{TINY} {flags}".split())
    except ConfigError as error:
        return error.problems
    return list(parsed.run.world_problems(world))


BAD = [  # flags, ranks, parts of the one message
    ("--pipeline-model-parallel-size 8", 8, ["(8)", "--num-layers is 4", "use PP 4"]),
    ("--pipeline-model-parallel-size 6", 6, ["(6)", "4 or less (3 divides 6)"]),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        2,
        ["(3) must divide the 2 layers of a rank", "use 1, 2"],
    ),
    ("--pipeline-model-parallel-size 3 --num-layers-per-virtual-pipeline-stage 1", 3, ["(4) to be divisible", "(3)", "use PP 1, 2, 4"]),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule interleaved", 2, ["--num-layers-per-virtual-pipeline-stage", "one of 1"]),
    (
        "--pipeline-model-parallel-size 2 --pipeline-schedule 1f1b --num-layers-per-virtual-pipeline-stage 1",
        2,
        ["1f1b has one stage on each rank", "makes 2", "use interleaved or zero-bubble"],
    ),
    ("--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --pipeline-schedule gpipe", 2, ["not gpipe", "leave one of them out"]),
    ("--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --zero-stage 3", 2, ["--zero-stage 3", "use --zero-stage 2"]),
    ("--pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --compile", 2, ["--compile does not go with the zero-bubble"]),
    (
        "--num-layers 8 --pipeline-model-parallel-size 2 --pipeline-schedule zero-bubble --num-layers-per-virtual-pipeline-stage 1",
        2,
        ["at most 3 stages on a rank, not 4"],
    ),
    ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2", 4, ["(2) leave 2", "3 further stage(s)", "1 or less"]),
    (
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 1",
        2,
        ["(2) and", "(1) are all stages", "add up to --num-layers (4)"],
    ),
    (
        "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 1 --num-layers-per-virtual-pipeline-stage 1",
        2,
        ["makes all stages alike"],
    ),
    (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 20",
        2,
        ["20 sequences is 5 micro-batches", "2 rounds", "a multiple of 8", "16 or 24"],
    ),
    (
        "--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --global-batch-size 32 --rampup-batch-size 4 4 400",
        2,
        ["20 sequences is 5 micro-batches"],
    ),
    ("--pipeline-model-parallel-size 2 --moe-expert-parallel-size 4", 4, ["ranks of a pipeline stage (2)", "degree (4)", "1, 2"]),
    ("--pipeline-model-parallel-size 2 --mos --load-teacher x", 2, ["must be 1, not 2, with --mos or --kd"]),
]


@pytest.mark.parametrize(("flags", "world", "parts"), BAD, ids=[flags.replace("--", "").replace(" ", "_") for flags, *_ in BAD])
def test_what_does_not_go_together_is_said_with_the_nearest_that_does(flags, world, parts):
    found = problems(flags, world)
    assert any(all(part in problem for part in parts) for problem in found), found


def test_a_pipeline_of_one_takes_no_settings():
    words = "--num-layers-per-virtual-pipeline-stage 3 --enable-zbh1-pipeline --pipeline-schedule interleaved --decoder-last-pipeline-num-layers 9"
    parsed = parse_args(f"{TINY} {words}".split())
    assert sum("has no effect with --pipeline-model-parallel-size 1" in w for w in parsed.warnings) == 4
    assert parsed.run.layers_of_stages() == [[1, 2, 3, 4]]


def test_what_a_stage_keeps_and_who_waits_is_warned_of():
    parsed = parse_args(f"{TINY} --pipeline-model-parallel-size 4 --zero-stage 2 --global-batch-size 8".split())
    assert any("--zero-stage 2 saves less memory" in w for w in parsed.warnings)
    (told,) = parsed.run.world_warnings(4)
    assert "2 micro-batch(es) per step are fewer than the 4 pipeline ranks" in told and "idle 60%" in told
