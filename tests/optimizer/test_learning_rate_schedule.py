"""Learning-rate schedules against numbers worked by hand, and what must hold for all of them."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_moe.config.pace import Pace, RampUp
from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.schedule import build_schedule, build_weight_decay

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


def build(batch=2, iterations=100, seq_length=10, **optimizer):
    return build_schedule(OptimizerConfig(**optimizer), Pace(batch, seq_length), iterations)


def rates(schedule, iterations, batch=2, seq_length=10):
    return [schedule.at(i, i * batch, i * batch * seq_length) for i in iterations]


def test_linear_decay_matches_the_worked_example():
    schedule = build(lr=1.0, min_lr=0.1, lr_warmup_iters=5, lr_decay_iters=15, lr_decay_style="linear")
    got = rates(schedule, [1, 2, 3, 4, 5, 6, 10, 15, 16, 1000])
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.91, 0.55, 0.1, 0.1, 0.1])


def test_first_step_of_the_warm_up_is_not_zero():
    assert rates(build(lr=0.3, lr_warmup_iters=3), [1]) == pytest.approx([0.1])


def test_without_warm_up_linear_decay_starts_one_step_below_the_highest_rate():
    assert rates(build(lr=1.0, iterations=10), [1, 5, 10]) == pytest.approx([0.9, 0.5, 0.0])


def test_constant_stays_at_the_highest_rate_after_the_decay_ends():
    schedule = build(lr=0.5, lr_warmup_iters=2, lr_decay_iters=4, lr_decay_style="constant")
    assert rates(schedule, [1, 2, 3, 4, 5, 99]) == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_cosine_is_half_way_in_the_middle():
    schedule = build(lr=1.0, min_lr=0.2, lr_warmup_iters=2, lr_decay_iters=6, lr_decay_style="cosine")
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(schedule, [1, 2, 3, 4, 6, 7]) == pytest.approx([0.5, 1.0, quarter, 0.6, 0.2, 0.2])


def test_inverse_square_root_halves_at_four_times_the_warm_up_and_stops_at_the_lowest_rate():
    schedule = build(lr=1.0, min_lr=0.4, lr_warmup_iters=4, lr_decay_style="inverse-square-root")
    assert rates(schedule, [2, 4, 9, 16, 64, 101]) == pytest.approx([0.5, 1.0, 2 / 3, 0.5, 0.4, 0.4])


def test_inverse_square_root_without_warm_up_starts_at_the_highest_rate_in_every_unit():
    for extra in ({}, {"lr_decay_samples": 200}, {"lr_decay_tokens": 2000}):
        schedule = build(lr=1.0, lr_decay_style="inverse-square-root", **extra)
        assert rates(schedule, [1, 4, 100]) == pytest.approx([1.0, 0.5, 0.1])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.55), ("cosine", 0.55), ("exponential", 0.1 + 0.9 * (2 * math.sqrt(0.5) - 1))])
def test_wsd_is_stable_and_then_decays_over_the_given_iterations(shape, middle):
    schedule = build(
        lr=1.0, min_lr=0.1, lr_warmup_iters=10, lr_decay_style="WSD", lr_wsd_decay_style=shape, lr_wsd_decay_iters=20, iterations=100
    )
    assert rates(schedule, [5, 10, 50, 80, 90, 100, 101]) == pytest.approx([0.5, 1.0, 1.0, 1.0, middle, 0.1, 0.1])


def test_wsd_decays_over_a_tenth_of_the_run_when_no_length_is_given():
    schedule = build(lr=1.0, lr_decay_style="WSD", lr_wsd_decay_style="linear", iterations=200)
    assert rates(schedule, [180, 190, 200]) == pytest.approx([1.0, 0.5, 0.0])


def test_warm_up_fraction_is_a_share_of_the_decay():
    schedule = build(lr=1.0, lr_warmup_fraction=0.25, lr_decay_iters=40, lr_decay_style="constant")
    assert rates(schedule, [5, 10, 11]) == pytest.approx([0.5, 1.0, 1.0])


def test_the_published_recipe_counts_tokens():
    schedule = build(
        batch=256, seq_length=2048, lr=3e-4, min_lr=1e-6, lr_warmup_tokens=375_000_000, lr_decay_tokens=300_000_000_000,
        lr_decay_style="cosine", iterations=1_716_613,
    )  # fmt: skip
    assert schedule.unit == "tokens"
    assert schedule.at(1, 256, 256 * 2048) == pytest.approx(3e-4 * 256 * 2048 / 375e6)
    assert schedule.at(0, 0, 375_000_000) == 3e-4
    assert schedule.at(0, 0, 300_000_000_000) == pytest.approx(1e-6)


def test_tokens_win_over_iterations_given_beside_them():
    schedule = build(lr=1.0, lr_warmup_iters=5, lr_decay_tokens=400, lr_decay_style="linear")  # 20 tokens per step
    assert (schedule.unit, schedule.warmup, schedule.decay) == ("tokens", 100, 400)
    assert build(lr_warmup_tokens=40, lr_decay_iters=30).decay == 600


def test_samples_decide_when_only_they_are_given():
    schedule = build(lr=1.0, lr_warmup_samples=20, iterations=50)
    assert (schedule.unit, schedule.warmup, schedule.decay) == ("samples", 20, 100)


def test_warm_up_longer_than_the_decay_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"warm-up \(30 iterations\).*\(20 iterations\).*--lr-warmup-iters"):
        build(lr_warmup_iters=30, lr_decay_iters=20)
    assert build(lr_warmup_iters=30, lr_decay_iters=20, lr_decay_style="constant").warmup == 30


def test_wsd_decay_that_does_not_fit_behind_the_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"--lr-wsd-decay-iters \(95\).*use at most 90"):
        build(lr_decay_style="WSD", lr_warmup_iters=10, lr_wsd_decay_iters=95)


@st.composite
def schedules(draw):
    iterations = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, iterations - 1))
    lr = draw(st.floats(1e-6, 1.0))
    return build(
        iterations=iterations,
        lr=lr,
        min_lr=lr * draw(st.floats(0.0, 1.0)),
        lr_warmup_iters=warmup,
        lr_decay_style=draw(st.sampled_from(STYLES)),
        lr_wsd_decay_style=draw(st.sampled_from(["linear", "cosine", "exponential"])),
        lr_wsd_decay_iters=draw(st.none() | st.integers(1, iterations - warmup)),
    )


@settings(max_examples=200, deadline=None)
@given(schedules(), st.floats(0, 1000))
def test_rate_never_leaves_its_bounds(schedule, t):
    rate = schedule.at_progress(t)
    assert 0 <= rate <= schedule.max_lr * (1 + 1e-12)
    if t > schedule.warmup:
        assert rate >= schedule.min_lr * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(schedules(), st.floats(1e-3, 1))
@example(build(iterations=123, lr=1.0, lr_decay_style="inverse-square-root"), 1.0)
def test_rate_is_continuous_up_to_the_end_of_the_decay(schedule, where):
    t = where * schedule.decay * (1 - 1e-9)
    after = min(t + 1e-9 * schedule.decay, schedule.decay)  # a sum of floats may lie behind the end, where the rate is the lowest
    # No style falls faster than a full swing over a hundredth of its phase, nor warms up faster than lr per step.
    assert abs(schedule.at_progress(after) - schedule.at_progress(t)) <= 1e-5 * schedule.max_lr


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(STYLES), st.integers(1, 8), st.integers(1, 64), st.integers(0, 49), st.integers(50, 100))
def test_units_agree_when_the_batch_is_constant(style, batch, seq_length, warmup, decay):
    common = {"batch": batch, "seq_length": seq_length, "lr": 1.0, "min_lr": 0.1, "lr_decay_style": style}
    in_iterations = build(lr_warmup_iters=warmup, lr_decay_iters=decay, **common)
    in_samples = build(lr_warmup_samples=warmup * batch, lr_decay_samples=decay * batch, **common)
    in_tokens = build(lr_warmup_tokens=warmup * batch * seq_length, lr_decay_tokens=decay * batch * seq_length, **common)
    steps = range(1, 120, 7)
    expected = rates(in_iterations, steps, batch, seq_length)
    assert rates(in_samples, steps, batch, seq_length) == pytest.approx(expected)
    assert rates(in_tokens, steps, batch, seq_length) == pytest.approx(expected)


# ---------------------------------------------------------------- under a ramp-up


def test_lengths_are_converted_at_the_pace_of_the_run():
    """Batches 2 2 4 4 6 6 ... of length 10: three steps are 8 samples, 80 tokens."""
    pace = Pace(6, 10, RampUp(2, 2, 8, 6).batch_size)
    assert [pace.after(i).samples for i in range(7)] == [0, 2, 4, 8, 14, 20, 26]
    schedule = build_schedule(OptimizerConfig(lr=1.0, lr_warmup_iters=3, lr_decay_samples=20), pace, 100)
    assert (schedule.unit, schedule.warmup, schedule.decay) == ("samples", 8, 20)
    schedule = build_schedule(
        OptimizerConfig(lr=1.0, lr_warmup_iters=2, lr_decay_style="WSD", lr_wsd_decay_iters=2, lr_decay_tokens=260), pace, 6
    )
    assert (schedule.unit, schedule.warmup, schedule.decay, schedule.wsd_decay) == ("tokens", 40, 260, 120)
    assert build_schedule(OptimizerConfig(lr=1.0, lr_decay_style="inverse-square-root", lr_decay_samples=20), pace, 6).first_step == 2
    whole = build_schedule(OptimizerConfig(lr=1.0, lr_warmup_samples=3), pace, 6)
    assert (whole.unit, whole.decay) == ("samples", 26)
    fraction = build_schedule(OptimizerConfig(lr=1.0, lr_warmup_fraction=0.5), pace, 6)
    assert (fraction.unit, fraction.warmup, fraction.decay) == ("samples", 13, 26)
    assert build_schedule(OptimizerConfig(lr=1.0, lr_decay_iters=6), pace, 6).unit == "iterations"
    assert build_schedule(OptimizerConfig(lr=1.0), Pace(6, 10), 6).unit == "iterations"


# ---------------------------------------------------------------- weight decay


def megatron_weight_decay(samples: int, total: int, start: float, end: float, style: str) -> float:
    """Megatron-LM's rule, written again."""
    if samples > total:
        return end
    ratio = samples / total
    return start + (end - start) * (ratio if style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1))


@settings(deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.floats(0, 1), st.floats(0, 1), st.integers(1, 50), st.integers(0, 120))
def test_weight_decay_goes_by_megatrons_rule(style, start, end, iterations, samples):
    config = OptimizerConfig(weight_decay_incr_style=style, start_weight_decay=start, end_weight_decay=end)
    schedule = build_weight_decay(config, Pace(2, 10), iterations)
    assert schedule.at(samples) == pytest.approx(megatron_weight_decay(samples, 2 * iterations, start, end, style), abs=1e-12)


def test_a_constant_weight_decay_is_that_of_the_flag():
    schedule = build_weight_decay(OptimizerConfig(weight_decay=0.3), Pace(2, 10), 10)
    assert {schedule.at(samples) for samples in (0, 1, 20, 21, 1000)} == {0.3}
