"""--moe-router-policy and what goes with it: what has no effect is refused by name, what misleads is warned about."""

from __future__ import annotations

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.moe import MoEConfig

BASE = "--preset tiny --mock-data --train-iters 2 --num-experts 4 --mlp-type standard --moe-router-policy"


def problems_of(flags: str) -> str:
    try:
        parse_args(f"{BASE} {flags}".split())
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def warnings_of(flags: str) -> str:
    return "\n".join(parse_args(f"{BASE} {flags}".split()).warnings)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("hash --moe-router-num-groups 2 --moe-router-group-topk 1", "--moe-router-num-groups"),
        ("hash --moe-router-score-function sigmoid", "--moe-router-score-function"),
        ("hash --moe-router-z-loss-coeff 0.1", "--moe-router-z-loss-coeff"),
        ("hash --moe-seq-loss-coeff 0.1", "--moe-seq-loss-coeff"),
        ("hash --moe-noisy-gate-policy Jitter", "--moe-noisy-gate-policy Jitter"),
        ("expert_choice --moe-router-enable-expert-bias", "--moe-router-enable-expert-bias"),
        ("expert_choice --topk 2 --moe-router-normalize chosen", "--moe-router-normalize"),
        ("expert_choice --moe-token-drop-policy probs", "--moe-token-drop-policy"),
        ("expert_choice --moe-eval-capacity-factor 2", "--moe-eval-capacity-factor"),
        ("expert_choice --moe-global-loss-coeff 0.1", "--moe-global-loss-coeff"),
        ("sinkhorn --moe-noisy-gate-policy RSample", "--moe-noisy-gate-policy RSample"),
        ("sinkhorn --moe-router-score-function sigmoid", "--moe-router-score-function"),
        ("zipf --moe-router-enable-expert-bias", "--moe-router-enable-expert-bias"),
        ("balanced --moe-router-zipf-exponent 2", "--moe-router-zipf-exponent"),
        ("topk --moe-router-sinkhorn-iterations 3", "--moe-router-sinkhorn-iterations"),
        ("sinkhorn --moe-router-hash-seed 3", "--moe-router-hash-seed"),
    ],
)
def test_a_flag_without_effect_is_refused_by_name(flags, refused):
    told = problems_of(flags)
    policy = flags.split()[0]
    assert f"{refused} has no effect with --moe-router-policy {policy}" in told, told


@pytest.mark.parametrize("policy", ["topk", "expert_choice", "hash", "sinkhorn", "balanced", "zipf"])
def test_every_policy_takes_the_defaults_a_residual_mlp_and_any_k(policy):
    for k in (1, 2, 4):
        assert problems_of(f"{policy} --topk {k} --mlp-type residual --disable-moe-token-dropping --moe-noisy-gate-policy None") == ""
        assert problems_of(f"{policy} --topk {k} --disable-moe-top2-2nd-expert-sampling --no-moe-rts") == ""
    assert "--topk (5) cannot exceed the experts of a layer (4)" in problems_of(f"{policy} --topk 5")


@pytest.mark.parametrize("policy", ["topk", "sinkhorn", "balanced", "zipf"])
def test_one_renormalised_choice_leaves_the_router_without_a_gradient(policy):
    for how in ("chosen", "survivors"):
        told = problems_of(f"{policy} --topk 1 --moe-router-normalize {how}")
        assert f"--moe-router-normalize {how} with --topk 1" in told and "no gradient" in told and "--topk 2" in told, told


def test_expert_choice_says_that_it_looks_ahead_and_others_do_not():
    assert "looks ahead in a causal model" in warnings_of("expert_choice")
    assert "looks ahead" not in warnings_of("sinkhorn") + warnings_of("topk")
    assert "looks ahead" not in "\n".join(parse_args(f"{BASE} expert_choice --num-experts 1".split()).warnings)


@pytest.mark.parametrize("policy", ["expert_choice", "hash"])
def test_a_balance_loss_without_effect_is_warned_about_when_somebody_asked_for_it(policy):
    default = f"--moe-loss-coeff {MoEConfig().moe_loss_coeff}"
    assert f"--moe-router-policy {policy}" in warnings_of(f"{policy} --moe-loss-coeff 0.01")
    assert "--moe-loss-coeff (0.1) has no effect" in warnings_of(f"{policy} {default}")
    assert "--moe-loss-coeff" not in warnings_of(f"{policy} --moe-loss-coeff 0")
    without_preset = f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 --num-experts 4 --mock-data --train-iters 1 --moe-router-policy {policy}"
    assert "--moe-loss-coeff" not in "\n".join(parse_args(without_preset.split()).warnings)


def test_the_assignment_of_words_and_the_bias_belong_to_the_architecture():
    """A checkpoint is not silently read with another assignment, or without its bias."""
    plain, hashed, other, biased = (
        parse_args(f"{BASE} {flags}".split()).run.architecture(64)
        for flags in ("topk", "hash", "hash --moe-router-hash-seed 5", "topk --topk 3 --moe-router-enable-expert-bias")
    )
    assert len({str(a) for a in (plain, hashed, other, biased)}) == 4
    assert "moe_router_hash_seed" not in plain
    assert not {"moe_router_policy"} & set(plain)  # all others have the same weights: a router may be trained on with another policy


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--topk 2 --moe-router-num-groups 3 --moe-router-group-topk 1", ["--moe-router-num-groups (3)", "(4)", "1, 2 or 4"]),
        ("--topk 2 --moe-router-num-groups 2", ["belong together"]),
        ("--topk 3 --moe-router-num-groups 2 --moe-router-group-topk 2", ["--moe-router-group-topk (2)", "--topk (3)"]),
        ("--topk 3 --moe-router-num-groups 4 --moe-router-group-topk 1", ["leave 3 experts", "use 3"]),
        (
            "--topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-group-best 3",
            ["--moe-router-group-best (3)", "4 / 2 = 2"],
        ),
        ("--topk 2 --moe-router-group-best 1", ["--moe-router-group-best", "--moe-router-num-groups"]),
        ("--topk 2 --moe-router-enable-expert-bias", ["--disable-moe-top2-2nd-expert-sampling"]),
        ("--topk 1 --moe-noisy-gate-policy RSample --moe-router-enable-expert-bias", ["RSample", "expert bias"]),
        ("--topk 2 --moe-noisy-gate-policy RSample", ["RSample is defined for --topk 1"]),
        ("--topk 2 --moe-router-pre-softmax --moe-router-normalize chosen", ["exclude each other"]),
        ("--moe-router-policy expert-choice", ["--moe-router-policy", "did you mean 'expert_choice'"]),
    ],
)
def test_impossible_routers_are_refused_with_a_way_out(flags, said):
    told = problems_of(f"topk {flags}")
    assert all(words in told for words in said), told
