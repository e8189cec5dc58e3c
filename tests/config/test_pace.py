"""What each step takes: the rules of ramp-up and curriculum, and sums over a run against a walk of all its steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.arguments import parse_args
from megatron_moe.config.curriculum import CurriculumConfig
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.pace import Consumed, Pace, RampUp

TINY = ["--preset", "tiny", "--mock-data"]


def megatron_batch_size(consumed: int, start: int, increment: int, samples: int, full: int) -> int:
    """Megatron-LM's rule in words: so many equal parts of SAMPLES as there are increments, one increment more after each."""
    if consumed > samples:
        return full
    increments, size, edge = (full - start) // increment, start, 0.0
    for i in range(1, increments + 1):
        edge = i * samples / increments
        size = start + i * increment if consumed >= edge - 1e-9 * samples else size
    return size


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 6), st.integers(1, 500), st.integers(0, 600))
def test_the_batch_grows_by_megatrons_rule(start, increment, increments, samples, consumed):
    full = start + increment * increments
    assert RampUp(start, increment, samples, full).batch_size(consumed) == megatron_batch_size(consumed, start, increment, samples, full)


def deepspeed_length(step: int, low: int, high: int, total: int, multiple: int, degree: float) -> int:
    """DeepSpeed's rule, which rounds down whatever comes."""
    length = math.floor((step / total) ** (1 / degree) * (high - low) + low)
    return min(length - length % multiple, high)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 60), st.integers(1, 16), st.sampled_from([1.0, 2.0, 3.0]), st.integers(1, 90))
def test_the_length_grows_by_deepspeeds_rule(low, more, total, multiple, degree, step):
    low, high = low * multiple, (low + more) * multiple  # where both ends are multiples, the two rules are one
    kind = "fixed_linear" if degree == 1 else "fixed_root"
    curriculum = CurriculumConfig(
        curriculum_learning=True, curriculum_schedule_type=kind, curriculum_min_difficulty=low, curriculum_max_difficulty=high,
        curriculum_total_step=total, curriculum_difficulty_step=multiple, curriculum_root_degree=degree,
    )  # fmt: skip
    assert curriculum.length(step, 10**6) == deepspeed_length(step, low, high, total, multiple, degree)


def test_odd_ends_are_kept_and_reached():
    curriculum = CurriculumConfig(curriculum_learning=True, curriculum_min_difficulty=5, curriculum_total_step=4)
    assert [curriculum.length(step, 30) for step in range(1, 7)] == [8, 16, 16, 30, 30, 30]
    assert curriculum.length(0, 30) == 5


def test_a_table_is_read_as_deepspeed_reads_it():
    table = CurriculumConfig(
        curriculum_learning=True, curriculum_schedule_type="fixed_discrete", curriculum_difficulty=(4, 8, 16), curriculum_max_step=(2, 5)
    )
    assert [table.length(step, 16) for step in range(1, 8)] == [4, 4, 8, 8, 8, 16, 16]


# ---------------------------------------------------------------- sums over a run


def walk(pace: Pace, steps: int, at: Consumed) -> list[Consumed]:
    """Where the run is after each step, one by one."""
    places = [at]
    for _ in range(steps):
        batch, length = pace.step_after(places[-1])
        i, s, t = places[-1]
        places.append(Consumed(i + 1, s + batch, t + batch * length))
    return places


@st.composite
def paces(draw) -> tuple[Pace, Consumed]:
    start, increment, increments = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 5))
    full, longest, low = start + increment * increments, draw(st.integers(1, 40)), draw(st.integers(1, 40))
    ramp = RampUp(start, increment, draw(st.integers(1, 120)), full) if draw(st.booleans()) else None
    curriculum = CurriculumConfig(
        curriculum_learning=draw(st.booleans()), curriculum_min_difficulty=min(low, longest), curriculum_total_step=draw(st.integers(1, 30)),
        curriculum_difficulty_step=draw(st.integers(1, 9)), curriculum_schedule_type=draw(st.sampled_from(["fixed_linear", "fixed_root"])),
    )  # fmt: skip
    at = draw(st.sampled_from([Consumed(), Consumed(0, 17, 100), Consumed(12, 30, 31)]))
    return Pace(full, longest, ramp.batch_size if ramp else None, lambda step: curriculum.length(step, longest), at), at


@settings(deadline=None, max_examples=150)
@given(paces(), st.integers(0, 80), st.integers(0, 3000))
def test_sums_over_phases_are_sums_over_steps(made, steps, amount):
    pace, at = made
    places = walk(pace, 80, at)
    assert pace.after(at.iterations + steps) == places[steps]
    for unit in ("samples", "tokens"):
        reached = next((p.iterations for p in places if p.of(unit) >= amount), None)
        if reached is not None and amount > at.of(unit):
            assert pace.steps_until(unit, amount) == reached
            before, after = places[reached - 1 - at.iterations], places[reached - at.iterations]
            part = (amount - before.of(unit)) / (after.of(unit) - before.of(unit))
            assert pace.iterations_at(unit, amount) == pytest.approx(before.iterations + part)
    assert len(pace.phases) <= 50


def test_a_million_steps_are_a_few_phases():
    pace = parse_args([
        "--preset", "gpt-1.3b", "--rampup-batch-size", "32", "32", "1953125", "--curriculum-learning", "--curriculum-min-difficulty", "80",
        "--curriculum-total-step", "110138",
    ]).run.pace(64)  # fmt: skip
    assert len(pace.phases) < 300
    steps = samples = tokens = 0
    while tokens < 300_000_000_000:
        batch, length = pace.batch_size(samples), pace.length(steps + 1)
        steps, samples, tokens = steps + 1, samples + batch, tokens + batch * length
    assert pace.steps_until("tokens", 300_000_000_000) == steps and pace.after(steps) == (steps, samples, tokens)


# ---------------------------------------------------------------- what a run is told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rampup-batch-size 4 4", ["--rampup-batch-size wants START INCREMENT SAMPLES, not 4 4"]),
        ("--rampup-batch-size 4 4 0", ["--rampup-batch-size must be at least 1, not 0"]),
        ("--curriculum-learning", ["fixed_linear needs --curriculum-min-difficulty", "fixed_linear needs --curriculum-total-step"]),
        ("--curriculum-learning --curriculum-min-difficulty 200 --curriculum-total-step 4", ["must not exceed the longest length (128)"]),
        ("--curriculum-learning --curriculum-min-difficulty 8 --curriculum-max-difficulty 200 --curriculum-total-step 4",
         ["a curriculum up to 200 tokens does not fit into --seq-length (128)"]),
        ("--curriculum-learning --curriculum-schedule-type fixed_discrete --curriculum-difficulty 8 4 --curriculum-max-step 3 4",
         ["one length more than --curriculum-max-step has steps, not 2 and 2", "--curriculum-difficulty must ascend, not 8 4"]),
        ("--curriculum-learning --curriculum-min-difficulty 8 --curriculum-total-step 4 --compile", ["leave one of them out"]),
        ("--weight-decay-incr-style linear", ["needs both --start-weight-decay and --end-weight-decay"]),
        ("--start-weight-decay 0.1", ["need --weight-decay-incr-style linear or cosine"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, said):
    with pytest.raises(ConfigError) as refused:
        parse_args([*TINY, *words.split()])
    assert all(any(s in p for p in refused.value.problems) for s in said), refused.value.problems


def test_every_size_of_a_ramp_must_split_over_the_data_ranks():
    run = parse_args([*TINY, *["--global-batch-size", "32", "--micro-batch-size", "2", "--rampup-batch-size", "5", "3", "100"]]).run
    assert list(run.world_problems(4)) == [
        "START (5) of --rampup-batch-size must be divisible by --micro-batch-size (2) x data-parallel size (4) = 8; use 8",
        "INCREMENT (3) of --rampup-batch-size must be divisible by --micro-batch-size (2) x data-parallel size (4) = 8; use 8",
    ]
    run = parse_args([*TINY, *["--global-batch-size", "32", "--micro-batch-size", "2", "--rampup-batch-size", "8", "16", "100"]]).run
    (problem,) = run.world_problems(4)
    assert problem.endswith("plus a multiple of INCREMENT (16); use one of 8, 24")
    run = parse_args([*TINY, *["--global-batch-size", "32", "--micro-batch-size", "2", "--rampup-batch-size", "40", "8", "100"]]).run
    assert list(run.world_problems(4)) == ["START (40) of --rampup-batch-size must not exceed the global batch size (32)"]


def test_settings_of_a_curriculum_that_is_off_warn():
    words = ["--curriculum-min-difficulty", "8", "--curriculum-root-degree", "3"]
    assert parse_args([*TINY, *words]).warnings == [
        f"{flag} has no effect: it is a setting of --curriculum-learning" for flag in words[::2]
    ]  # fmt: skip


def test_settings_of_another_schedule_warn():
    words = (
        "--curriculum-learning --curriculum-min-difficulty 8 --curriculum-total-step 4 --curriculum-root-degree 3 --curriculum-max-step 2"
    )
    assert parse_args([*TINY, *words.split()]).warnings == [
        "--curriculum-root-degree has no effect: it is a setting of --curriculum-schedule-type fixed_root",
        "--curriculum-max-step has no effect: it is a setting of --curriculum-schedule-type fixed_discrete",
    ]
    words = "--curriculum-learning --curriculum-schedule-type fixed_discrete --curriculum-difficulty 8 128 --curriculum-max-step 2"
    assert parse_args([*TINY, *words.split()]).warnings == []


def test_lengths_of_a_run_follow_the_ramp():
    flags = "--global-batch-size 12 --micro-batch-size 2 --rampup-batch-size 4 4 16"
    run = parse_args([*TINY, *flags.split(), "--train-samples", "41"]).run  # 4 4 8 12 12 12
    assert run.train_iterations(1) == 6
    assert run.pace(1).after(6) == Consumed(6, 52, 52 * 128)
    assert run.wanted_samples(1) == (41, (5 // 50 + 1) * 4 * 12, 4 * 12)  # Megatron leaves out the last, partial step
    in_iters = parse_args([*TINY, *flags.split(), "--train-iters", "5"]).run
    assert in_iters.wanted_samples(1)[0] == 40
    assert run.train_iterations(1, Consumed(0, 28, 28 * 128)) == 2  # what is left of it, counted anew (--reset-iteration)
