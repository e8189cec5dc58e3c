"""Alerts about experts, on records that a run could have made."""

import re

import pytest

from megatron_moe.config.moe import MoEConfig
from megatron_moe.metrics.alerts import QUIET_STEPS, STEPS_IN_A_ROW, ExpertAlerts
from megatron_moe.metrics.tracker import moe_layer_record

EXPERTS, TOKENS = 8, 10_000
WELL = {"tokens_per_expert": [8] * EXPERTS, "dropped_fraction": 0.0, "router_entropy": 0.9, "router_logit_rms": 3.0}
ILL = {  # condition: what is wrong, the number and the flag that the alert names
    "dropping": ({"dropped_fraction": 0.234}, "23.4%", "--moe-train-capacity-factor"),
    "dead": ({"tokens_per_expert": [16, 16, 16, 16, 16, 0, 16, 0]}, "2 dead of 8 experts (5, 7)", "--moe-loss-coeff"),
    "entropy": ({"router_entropy": 0.004}, "0.4%", "--moe-router-z-loss-coeff"),
    "collapse": ({"tokens_per_expert": [57, 1, 1, 1, 1, 1, 1, 1]}, "7.12", "--moe-loss-coeff"),
    "logits": ({"router_logit_rms": 31.24}, "31.2", "--moe-router-z-loss-coeff"),
    "bias": ({"bias_range": (-0.7, 0.55)}, "1.25", "--moe-router-bias-update-rate"),
}


def record(layer=3, **wrong):
    return moe_layer_record(layer, **(WELL | wrong))


def alerts(dropped_fraction=0.1, **moe):
    return ExpertAlerts(MoEConfig(num_experts=(EXPERTS,), **moe), dropped_fraction)


def follow(watch, *records, tokens=TOKENS):
    """Conditions reported after each step of one layer."""
    return [[a.condition for a in watch.check([r], tokens)] for r in records]


def reported(watch, *records, tokens=TOKENS):
    return [condition for step in follow(watch, *records, tokens=tokens) for condition in step]


@pytest.mark.parametrize("condition", list(ILL))
def test_a_condition_is_one_line_that_names_layer_number_and_flag_and_comes_once(condition):
    wrong, number, flag = ILL[condition]
    watch, found = alerts(), []
    for _ in range(3 * STEPS_IN_A_ROW):
        found += watch.check([record(3, **wrong), record(5)], TOKENS)
    (alert,) = found
    assert (alert.condition, alert.layer, alert.flag) == (condition, 3, flag)
    assert alert.reason.startswith("layer 3 ")
    assert number in alert.reason
    assert flag in alert.reason
    assert "\n" not in alert.reason
    assert alert.value == pytest.approx(float(re.search(r"[\d.]+", number)[0]) / (100 if "%" in number else 1), rel=0.01)


@pytest.mark.parametrize("condition", list(ILL))
def test_it_takes_three_logged_steps_in_a_row(condition):
    bad, good = record(**ILL[condition][0]), record()
    watch = alerts()
    assert follow(watch, bad, bad, good, bad, bad) == [[]] * 5
    assert follow(watch, bad) == [[condition]]


@pytest.mark.parametrize("condition", list(ILL))
def test_it_is_reported_again_only_when_it_comes_back_after_a_quiet_time(condition):
    bad, good = record(**ILL[condition][0]), record()
    watch = alerts()
    assert reported(watch, *[bad] * 5) == [condition]
    assert reported(watch, *[good] * (QUIET_STEPS - STEPS_IN_A_ROW), *[bad] * 5) == []
    assert reported(watch, *[good] * QUIET_STEPS, *[bad] * 5) == [condition]


def test_layers_and_conditions_are_reported_apart():
    watch, found = alerts(), []
    for step in range(6):
        second = ILL["dropping"][0] | ILL["logits"][0] if step > 1 else {}
        found.append([(a.condition, a.layer) for a in watch.check([record(1, **ILL["dropping"][0]), record(2, **second)], TOKENS)])
    assert found == [[], [], [("dropping", 1)], [], [("dropping", 2), ("logits", 2)], []]


def test_layers_with_the_same_news_share_a_line_about_the_worst():
    wrong = [
        record(n, dropped_fraction=d, router_entropy=e) for n, d, e in [(1, 0.2, 0.006), (2, 0.0, 0.9), (3, 0.4, 0.004), (4, 0.3, 0.9)]
    ]
    watch = alerts()
    dropping, entropy = [a for _ in range(6) for a in watch.check(wrong, TOKENS)]
    assert (dropping.layer, dropping.layers, dropping.value) == (3, (1, 3, 4), 0.4)
    assert dropping.reason.startswith("layer 3, the worst of 3 layers (1, 3, 4), drops 40.0% of its assignments")
    assert (entropy.layer, entropy.layers) == (3, (1, 3))


def test_a_healthy_layer_is_never_reported():
    watch = alerts()
    uneven = record(tokens_per_expert=[16, 12, 8, 8, 8, 6, 4, 2], dropped_fraction=0.1, bias_range=(-0.3, 0.4))
    assert follow(watch, *[uneven] * 200) == [[]] * 200


def test_experts_that_are_idle_in_turn_are_not_dead():
    watch = alerts()
    idle = [record(tokens_per_expert=[8 * (e != step % 2) for e in range(EXPERTS)]) for step in range(20)]
    assert follow(watch, *idle) == [[]] * 20


def test_idle_experts_are_no_news_where_tokens_are_few():
    bad = record(**ILL["dead"][0])
    assert follow(alerts(), *[bad] * 5, tokens=16 * EXPERTS - 1) == [[]] * 5
    assert reported(alerts(), *[bad] * 5, tokens=16 * EXPERTS) == ["dead"]


@pytest.mark.parametrize(("k", "load", "is_collapse"), [(1, 3.9, False), (1, 4.1, True), (2, 3.2, False), (2, 3.3, True), (8, 1.0, False)])
def test_how_busy_an_expert_may_be_depends_on_how_busy_it_could_be(k, load, is_collapse):
    """8 experts: at worst an expert has 8 / k times the mean; with k = 8 all have the same."""
    rest = (8 - load) / 7
    bad = record(tokens_per_expert=[1000 * load] + [1000 * rest] * 7)
    assert reported(alerts(topk=k), *[bad] * 5) == ["collapse"] * is_collapse


def test_a_router_without_probabilities_has_not_made_up_its_mind():
    assert reported(alerts(), *[record(router_entropy=0.0)] * 5) == []


@pytest.mark.parametrize(
    ("moe", "advice"),
    [
        ({}, "raise --moe-loss-coeff (0.1)"),
        ({"moe_loss_coeff": 0.0}, "raise --moe-loss-coeff (0)"),
        ({"moe_loss_coeff": 0.0, "moe_seq_loss_coeff": 1e-4}, "raise --moe-seq-loss-coeff (0.0001)"),
        ({"moe_loss_coeff": 0.0, "moe_global_loss_coeff": 0.02}, "raise --moe-global-loss-coeff (0.02)"),
        ({"moe_router_enable_expert_bias": True}, "raise --moe-router-bias-update-rate (0.001)"),
    ],
)
def test_advice_is_about_what_balances_this_run(moe, advice):
    watch = alerts(**moe)
    found = [a for _ in range(3) for a in watch.check([record(**ILL["collapse"][0])], TOKENS)]
    assert advice in found[0].reason
    assert found[0].flag in advice


def test_the_threshold_of_dropping_is_a_flag():
    bad = record(dropped_fraction=0.2)
    assert reported(alerts(dropped_fraction=0.15), *[bad] * 5) == ["dropping"]
    assert reported(alerts(dropped_fraction=0.2), *[bad] * 5) == []


def test_a_number_that_is_not_finite_is_left_to_the_alert_that_is_about_it():
    bad = record(dropped_fraction=float("nan"), router_entropy=float("nan"), router_logit_rms=float("nan"))
    assert follow(alerts(), *[bad] * 5) == [[]] * 5
