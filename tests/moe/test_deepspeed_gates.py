"""DeepSpeed's own gates against ours: the same logits, the same random numbers, the same experts, weights, loss and counts.

Needs the package `deepspeed` (an oracle, no dependency). Where we differ on purpose, the last tests say how.
"""
# T tokens, E experts, K experts per token, C capacity

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.metrics import summarise
from megatron_moe.moe.routing import drop_over_capacity
from megatron_moe.moe.tokens import NO_INFO, TokenInfo
from megatron_moe.utils.random import Purpose, gumbel, layer_keys, token_keys, uniform

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
gates = pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")

SIZES = [(64, 8), (50, 4), (33, 16), (6, 3), (128, 128)]
FACTORS = [0.5, 1.0, 1.25, 2.0]


def build(experts: int, k: int, **moe) -> MoELayer:
    config = {"topk": k, "moe_min_capacity": 0, "moe_top2_2nd_expert_sampling": False} | moe
    return MoELayer(2, experts, 8, 8, MoEConfig(num_experts=(experts,), **config))


def logits_of(tokens: int, experts: int, seed: int = 0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def keys(tokens: int):
    """Of the layer, as its policy and its dropping see them; and of the step, as the layer is given them."""
    of_step = token_keys(3, 4, torch.arange(1), tokens).flatten()
    return layer_keys(of_step, 2), of_step


def ours(layer: MoELayer, logits, info: TokenInfo = NO_INFO):
    """Weight of each token at each expert, loss, counts before dropping."""
    tokens, experts = logits.shape
    layer.stats.reset()
    layer.gate.forward = lambda _: logits
    routing = layer.route(torch.zeros(tokens, 8), info)[0]
    weights_TE = torch.zeros(tokens, experts + 1).scatter_add(1, routing.ids_TK % (experts + 1), routing.weights_TK)[:, :experts]
    return weights_TE, summarise(2, layer.stats.vector(torch.device("cpu"))).aux_loss, routing.counts_E


def theirs(gate, logits, *args, **kwargs):
    loss, weights_TEC, mask_TEC, counts = gate(logits.clone(), *args, **kwargs)
    assert torch.equal(mask_TEC, weights_TEC != 0)
    return weights_TEC.sum(2), loss.item(), counts


def assert_equal(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[0] != 0, want[0] != 0)  # the same experts
    assert got[1] == pytest.approx(want[1], rel=1e-5)
    assert got[2].tolist() == want[2].tolist()


def random_selection(draws_T1):
    """DeepSpeed draws a number for each token and expert, of which one counts; ours draws one for each token."""
    return mock.patch.dict(gates.exp_selection_uniform_map, {torch.device("cpu"): lambda shape: draws_T1.expand(shape)})


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
@pytest.mark.parametrize("noise", [None, "RSample"])
def test_top1_with_random_token_selection(tokens, experts, factor, noise):
    mine, step = keys(tokens)
    layer = build(experts, 1, moe_train_capacity_factor=factor, moe_noisy_gate_policy=noise or "None")
    logits = logits_of(tokens, experts)
    draws, noise_TE = uniform(mine, Purpose.TOKEN_SELECTION, 1), gumbel(mine, Purpose.GATE_SAMPLING, experts)
    with random_selection(draws), mock.patch.object(gates, "gumbel_rsample", return_value=noise_TE):
        want = theirs(gates.top1gating, logits, factor, 0, noisy_gate_policy=noise)
    assert_equal(ours(layer, logits, TokenInfo(step)), want)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (33, 16), (50, 5)])
def test_without_dropping(tokens, experts, k):
    logits, gate = logits_of(tokens, experts), {1: gates.top1gating, 2: gates.top2gating}.get(k, gates.topkgating)
    args = (1.0, 0) if k < 3 else (k, 1.0, 0)
    more = {1: {"use_rts": False}, 2: {"top2_2nd_expert_sampling": False}}.get(k, {})
    want = theirs(gate, logits, *args, drop_tokens=False, **more)
    assert_equal(ours(build(experts, k, moe_token_dropping=False), logits), want)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("tokens", "experts"), SIZES)
@pytest.mark.parametrize("sampling", [False, True])
def test_top2_with_and_without_a_sampled_second_expert(tokens, experts, factor, sampling):
    mine, step = keys(tokens)
    layer = build(experts, 2, moe_train_capacity_factor=factor, moe_top2_2nd_expert_sampling=sampling)
    logits, noise_TE = logits_of(tokens, experts), gumbel(mine, Purpose.GATE_SAMPLING, experts)
    with mock.patch.object(gates, "gumbel_rsample", return_value=noise_TE):
        want = theirs(gates.top2gating, logits, factor, 0, top2_2nd_expert_sampling=sampling)
    assert_equal(ours(layer, logits, TokenInfo(step)), want)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(64, 8, 3), (33, 16, 4), (50, 5, 5), (6, 3, 3)])
def test_topk_by_probability_and_by_position(tokens, experts, k, policy, factor):
    layer, logits = build(experts, k, moe_train_capacity_factor=factor, moe_token_drop_policy=policy), logits_of(tokens, experts)
    assert_equal(ours(layer, logits), theirs(gates.topkgating, logits, k, factor, 0, drop_policy=policy))


@pytest.mark.parametrize("minimum", [0, 4, 9])
def test_min_capacity(minimum):
    layer, logits = build(16, 2, moe_train_capacity_factor=0.3, moe_min_capacity=minimum), logits_of(40, 16)
    assert_equal(ours(layer, logits), theirs(gates.top2gating, logits, 0.3, minimum, top2_2nd_expert_sampling=False))


@pytest.mark.parametrize("dropping", [False, True])
def test_top1_with_tokens_that_are_not_used(dropping):
    mine, step = keys(64)
    layer, logits = build(8, 1, moe_token_dropping=dropping, moe_train_capacity_factor=0.5), logits_of(64, 8)
    used = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.6
    with random_selection(uniform(mine, Purpose.TOKEN_SELECTION, 1)):
        want = theirs(gates.top1gating, logits, 0.5, 0, used_token=used.long(), drop_tokens=dropping)
    assert_equal(ours(layer, logits, TokenInfo(step, used_T=used)), want)


def test_gradients_of_weights_and_loss():
    """Of top-2 with dropping: through the weights of the survivors, and through the loss."""
    for seed in range(3):
        a, b = (logits_of(64, 8, seed).requires_grad_() for _ in range(2))
        upstream = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
        layer = build(8, 2, moe_train_capacity_factor=0.7, moe_loss_coeff=0.3)
        layer.loss_weight = 1 / 64
        (ours(layer, a)[0] * upstream).sum().backward()
        loss, weights_TEC, _, _ = gates.top2gating(b + 0, 0.7, 0, top2_2nd_expert_sampling=False)
        ((weights_TEC.sum(2) * upstream).sum() + 0.3 * loss).backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- where we differ on purpose


def test_without_random_selection_ours_is_first_come_first_served():
    """DeepSpeed's use_rts=False takes topk of a column of zeros and ones, whose order of ties is open: as many, but others."""
    logits = logits_of(200, 4)
    want = theirs(gates.top1gating, logits, 0.5, 0, use_rts=False)
    got = ours(build(4, 1, moe_train_capacity_factor=0.5, moe_rts=False), logits)
    assert ((got[0] != 0).sum(0) == (want[0] != 0).sum(0)).all()
    ids = logits.argmax(1, keepdim=True)
    assert torch.equal((got[0] != 0).any(1), drop_over_capacity(ids, 25, "position")[:, 0] >= 0)


def test_evaluation_draws_nothing():
    layer, logits = build(8, 2, moe_top2_2nd_expert_sampling=True).eval(), logits_of(64, 8)
    assert_equal(ours(layer, logits, TokenInfo(keys(64)[1])), theirs(gates.top2gating, logits, 1.0, 0, top2_2nd_expert_sampling=False))


def test_tokens_that_are_not_used_go_nowhere_for_any_k():
    """DeepSpeed knows `used_token` for k = 1 only."""
    used = torch.arange(64) < 40
    for k in (2, 3):
        weights_TE, _, counts = ours(build(8, k, moe_token_dropping=False), logits_of(64, 8), TokenInfo(used_T=used))
        assert counts.sum() == 40 * k
        assert not weights_TE[~used].any()
