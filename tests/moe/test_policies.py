"""Routing policies against loops, in the layer with all gradients and by themselves over odd sizes; and what each of them promises."""
# T tokens, D hidden, E experts, K experts per token

from __future__ import annotations

import ast
import inspect
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import policy_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe import policies
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.metrics import summarise
from megatron_moe.moe.policies.base import dealt
from megatron_moe.moe.policies.sinkhorn import column_scale
from megatron_moe.moe.routing import combine_weights
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import token_keys

T, D, E, WORDS = 24, 8, 8, 50
EXACT = {"rtol": 0, "atol": 1e-10}
quick = settings(max_examples=40, deadline=None)

DEEPSEEK = {
    "topk": 4, "moe_router_score_function": "sigmoid", "moe_router_num_groups": 4, "moe_router_group_topk": 2,
    "moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5, "moe_router_normalize": "chosen",
}  # fmt: skip
VARIANTS = {
    "top-1": {"topk": 1},
    "top-1 drawn": {"topk": 1, "moe_noisy_gate_policy": "RSample"},
    "top-2": {"topk": 2, "moe_top2_2nd_expert_sampling": False},
    "top-2 sampled": {"topk": 2},
    "top-3 raw": {"topk": 3, "moe_router_normalize": "none"},
    "sigmoid top-2": {"topk": 2, "moe_router_score_function": "sigmoid", "moe_top2_2nd_expert_sampling": False},
    "softmax bias": {"topk": 3, "moe_router_enable_expert_bias": True},
    "softmax groups": {"topk": 2, "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_top2_2nd_expert_sampling": False},
    "groups by their best expert": {"topk": 3, "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_group_best": 1},
    "deepseek": DEEPSEEK,
    "expert choice": {"topk": 2, "moe_router_policy": "expert_choice"},
    "expert choice, sigmoid": {"topk": 1, "moe_router_policy": "expert_choice", "moe_router_score_function": "sigmoid"},
    "hash 1": {"topk": 1, "moe_router_policy": "hash"},
    "hash 3": {"topk": 3, "moe_router_policy": "hash"},
    "hash 2 raw": {"topk": 2, "moe_router_policy": "hash", "moe_router_normalize": "none"},
    "sinkhorn 1": {"topk": 1, "moe_router_policy": "sinkhorn"},
    "sinkhorn 2": {"topk": 2, "moe_router_policy": "sinkhorn", "moe_router_sinkhorn_iterations": 2},
    "balanced": {"topk": 2, "moe_router_policy": "balanced"},
    "zipf": {"topk": 2, "moe_router_policy": "zipf", "moe_router_zipf_exponent": 1.5},
}
EVERY = pytest.mark.parametrize("moe", VARIANTS.values(), ids=VARIANTS.keys())
ONE_OF_EACH = {v.get("moe_router_policy", "topk"): v for v in VARIANTS.values()}
EVERY_POLICY = pytest.mark.parametrize("moe", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())


def build(num_experts=E, number=3, **moe) -> MoELayer:
    """A float64 layer without dropping, whose weights leave no near-ties; a bias that changes choices."""
    torch.manual_seed(0)
    config = {"moe_loss_coeff": 0.0, "moe_min_capacity": 0, "moe_token_dropping": False} | moe
    layer = MoELayer(number, num_experts, D, 12, MoEConfig(num_experts=(num_experts,), **config)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
        if layer.gate.expert_bias is not None:
            layer.gate.expert_bias = torch.randn(num_experts) * 0.1
    return layer


def tokens(count=T, seed=1):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def info(count=T, iteration=0) -> TokenInfo:
    words = torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(5))
    return TokenInfo(token_keys(7, iteration, torch.arange(1), count).flatten(), words)


def gradients(layer, x, loss):
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))


def route(layer, x, of: TokenInfo):
    with torch.no_grad():
        return layer.route(x, of)[0]


# ---------------------------------------------------------------- against loops


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_output_and_every_gradient_equal_the_loops(moe, training):
    layer, x = build(**moe).train(training), tokens()
    expected, ids = oracle.looped(layer, x, info())
    y = layer(x, info())
    assert route(layer, x, info()).ids_TK.tolist() == ids
    torch.testing.assert_close(y, expected, **EXACT)
    upstream = torch.randn(T, D, dtype=torch.float64)
    got, want = gradients(layer, x, (y * upstream).sum()), gradients(layer, x, (expected * upstream).sum())
    for name in want:
        wanted = torch.zeros_like(got[name]) if want[name] is None else want[name]  # the router of hash routing
        torch.testing.assert_close(got[name], wanted, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    assert got["gate.weight"].any() != (layer.config.moe_router_policy == "hash")


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 14), st.sampled_from([1, 2, 3, 5, 8]), st.booleans(), st.integers(0, 99), st.data())
def test_choices_equal_the_loops_for_any_size_ties_and_masks(variant, count, num_experts, training, seed, data):
    moe = dict(VARIANTS[variant])
    if moe.get("moe_top2_2nd_expert_sampling", True) and "sampled" not in variant:
        moe |= {"topk": 1 if "drawn" in variant else data.draw(st.integers(min(2, num_experts), num_experts))}
        moe["moe_top2_2nd_expert_sampling"] = False
    moe["topk"] = min(moe["topk"], num_experts)
    if "moe_router_num_groups" in moe:
        moe |= {"moe_router_num_groups": num_experts, "moe_router_group_topk": moe["topk"]}
    layer = build(num_experts, **moe).train(training)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (count, num_experts), generator=generator).double()  # a coarse grid has ties
    if "sinkhorn" in variant or "bias" in variant or "deepseek" in variant:  # sums, which loops may round apart
        logits += torch.randn(logits.shape, generator=generator).double()
    layer.gate.forward = lambda x: logits
    of = info(count)
    if data.draw(st.booleans()):
        of = replace(of, used_T=torch.rand(count, generator=generator) < data.draw(st.sampled_from([0.0, 0.5])))
    got, chosen = route(layer, torch.zeros(count, D, dtype=torch.float64), of), oracle.choose(layer, logits, of)
    assert got.ids_TK.tolist() == chosen
    assert got.counts_E.tolist() == [sum(row.count(e) for row in chosen) for e in range(num_experts)]
    for row in ([e for e in row if e >= 0] for row in chosen):
        assert len(set(row)) == len(row), "an expert was given a token twice"
    assert not got.weights_TK[got.ids_TK < 0].any()
    assert got.weights_TK.isfinite().all()


# ---------------------------------------------------------------- numbers of experts are names

BY_NUMBER = ("hash", "balanced", "zipf", "drawn", "sampled")  # in training
UNNAMED = [(n, training) for n in VARIANTS for training in (True, False) if not n.startswith(BY_NUMBER[:3])
           and not (training and n.endswith(BY_NUMBER[3:]))]  # fmt: skip


@pytest.mark.parametrize(("name", "training"), UNNAMED)
def test_relabelling_the_experts_changes_nothing_but_their_order(name, training):
    moe = VARIANTS[name] | {"moe_loss_coeff": 0.3, "moe_router_z_loss_coeff": 0.1}
    layer, other, x = build(**moe).train(training), build(**moe).train(training), tokens()
    groups = moe.get("moe_router_num_groups", 1)
    generator = torch.Generator().manual_seed(3)
    # experts of a group stay together: groups are renamed, and the experts within each
    parts = [g * (E // groups) + torch.randperm(E // groups, generator=generator) for g in torch.randperm(groups, generator=generator)]
    order_E = torch.cat(parts)
    assert not torch.equal(order_E, torch.arange(E))
    with torch.no_grad():
        for p, q in zip(layer.parameters(), other.parameters()):
            q.copy_(p[order_E])
        if layer.gate.expert_bias is not None:
            other.gate.expert_bias = layer.gate.expert_bias[order_E]
    layer.loss_weight = other.loss_weight = 1 / T
    y, z = layer(x, info()), other(x, info())
    torch.testing.assert_close(z, y, **EXACT)
    a, b = gradients(layer, x, y.square().sum()), gradients(other, x, z.square().sum())
    for p in a:
        torch.testing.assert_close(b[p], a[p] if p == "x" else a[p][order_E], **EXACT, msg=lambda m, p=p: f"{p}: {m}")


# ---------------------------------------------------------------- few tokens, no tokens, broken tokens


@EVERY
def test_no_token_and_one_token_make_dense_gradients(moe):
    for count in (0, 1):
        layer, x = build(**moe | {"moe_loss_coeff": 0.1}), tokens(count)
        layer.loss_weight = 1.0
        y = layer(x, info(count))
        assert y.shape == (count, D)
        got = gradients(layer, x, y.square().sum())
        for name, grad in got.items():
            assert grad is not None and grad.isfinite().all(), name
        assert bool(got["experts.w1"].any()) == bool(count)


@EVERY
@pytest.mark.parametrize("dropping", [False, True], ids=["dropless", "dropping"])
def test_tokens_that_are_all_padding_go_nowhere_and_change_nothing(moe, dropping):
    layer, x = build(**moe, moe_token_dropping=dropping), tokens()
    layer.loss_weight = 1.0
    of = replace(info(), used_T=torch.zeros(T, dtype=torch.bool))
    y = layer(x, of)
    assert not y.any()
    assert not layer.stats.counts_E.any()
    for name, grad in gradients(layer, x, y.square().sum()).items():
        assert not grad.any(), name


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_balance_loss_counts_padding_in_both_means(k):
    """DeepSpeed's sense: padding chooses nobody, but it is a token of the means, and its probabilities count."""
    layer, x = build(topk=k, moe_top2_2nd_expert_sampling=False), tokens()
    used = torch.arange(T) % 3 > 0
    route(layer, x, replace(info(), used_T=used))
    probs = (x @ layer.gate.weight.t()).softmax(1)
    chosen = [row[: 1 if k == 2 else k] for row, is_used in zip(probs.argsort(1, descending=True).tolist(), used.tolist()) if is_used]
    per_choice = len(chosen[0])
    expected = E * sum(sum(row.count(e) for row in chosen) / T / per_choice * probs[:, e].mean().item() for e in range(E))
    measured = layer.stats.sums[-2].item() / T
    assert measured == pytest.approx(expected, rel=1e-10)


def test_losses_and_entropy_of_sigmoid_scores_are_about_their_shares():
    layer, x = build(topk=3, moe_router_score_function="sigmoid"), tokens()
    routing = route(layer, x, info())
    scores = 1 / (1 + torch.exp(-(x @ layer.gate.weight.t())))
    share = (scores / scores.sum(1, keepdim=True)).detach()
    load = summarise(3, layer.stats.sums)
    assert load.aux_loss == pytest.approx(E * (routing.counts_E.double() / (3 * T) * share.mean(0)).sum().item(), rel=1e-10)
    assert load.router_entropy == pytest.approx(-(share * share.log()).sum(1).mean().item() / math.log(E), rel=1e-6)


@EVERY
def test_a_slice_of_the_tokens_is_routed_as_in_the_whole(moe):
    """What tensor parallelism relies on; all but the two policies that look at all tokens."""
    layer, x, of = build(**moe), tokens(), info()
    if layer.config.moe_router_policy in ("expert_choice", "sinkhorn"):
        return
    whole = route(layer, x, of).ids_TK
    parts = [route(layer, x[p], of.of(p, None, x)).ids_TK for p in (slice(0, 9), slice(9, 10), slice(10, T))]
    assert torch.equal(torch.cat(parts), whole)


@EVERY
def test_padding_changes_no_other_token(moe):
    """By place: a token that is not used takes no room, neither in capacity nor in the balance of the others."""
    layer, x = build(**moe | {"moe_train_capacity_factor": 10.0}), tokens()
    used = torch.arange(T) < T - 6
    whole, short = (
        layer(x, replace(info(), used_T=used)),
        layer(x[: T - 6], replace(info(), keys_T=info().keys_T[:-6], ids_T=info().ids_T[:-6])),
    )
    torch.testing.assert_close(whole[: T - 6], short, **EXACT)
    assert not whole[T - 6 :].any()


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_broken_logits_still_name_experts_and_show_in_the_statistics(moe, training):
    """No id may be out of range, or an exchange between ranks would end otherwise than by the message about the loss."""
    layer, x = build(**moe).train(training), tokens().detach()
    x[3] = float("nan")
    ids = route(layer, x, info()).ids_TK
    assert ((ids >= -1) & (ids < E)).all()
    for row in ids.tolist():
        assert len({e for e in row if e >= 0}) == len([e for e in row if e >= 0])
    assert not layer.stats.sums[-1].isfinite()  # the z loss, by which the run names the layer


# ---------------------------------------------------------------- what each policy promises


@pytest.mark.parametrize("count", [24, 7, 1])
def test_experts_that_choose_take_their_capacity_with_and_without_token_dropping(count):
    for dropping in (False, True):
        layer = build(topk=2, moe_router_policy="expert_choice", moe_token_dropping=dropping, moe_train_capacity_factor=1.5)
        routing, limits = layer.route(tokens(count), info(count))
        capacity = -(-count * 3 // E)
        assert limits.capacity == capacity
        assert routing.counts_E.tolist() == [min(capacity, count)] * E
        plan = layer.dispatcher.plan(routing.ids_TK, limits)
        assert len(plan.slot_R) == min(E * capacity, E * count)  # room for what the experts take, not for E experts per token


def test_experts_that_choose_take_padding_only_when_nothing_else_is_left():
    layer, x = build(topk=2, moe_router_policy="expert_choice"), tokens()  # capacity 6
    for used in (3, 6, 12):
        used_T = torch.arange(T) % (T // used) == 0
        ids = route(layer, x, replace(info(), used_T=used_T)).ids_TK
        assert (ids >= 0).sum(0).tolist() == [min(used, 6)] * E
        assert (ids[~used_T] == -1).all()


def test_experts_that_choose_prefer_the_earlier_of_equal_tokens():
    layer, x = build(topk=1, moe_router_policy="expert_choice"), tokens(1).detach().expand(T, D)
    assert (route(layer, x, info()).ids_TK[: T // E] >= 0).all()
    assert (route(layer, x, info()).ids_TK[T // E :] == -1).all()


@EVERY_POLICY
def test_in_evaluation_no_token_depends_on_a_later_one(moe):
    layer, x = build(**moe).eval(), tokens().detach()
    changed = torch.cat([x[:10], tokens(seed=9).detach()[10:]])
    torch.testing.assert_close(layer(changed, info())[:10], layer(x, info())[:10], **EXACT)


@pytest.mark.parametrize("policy", ["expert_choice", "sinkhorn"])
def test_in_training_these_policies_look_ahead(policy):
    layer, x = build(topk=1, moe_router_policy=policy), tokens().detach()
    changed = torch.cat([x[:10], tokens(seed=9).detach()[10:] * 3])
    assert not torch.equal(route(layer, changed, info()).ids_TK[:10], route(layer, x, info()).ids_TK[:10])


@quick
@given(st.integers(0, 40), st.sampled_from([2, 3, 8]), st.integers(1, 3), st.integers(0, 99))
def test_dealt_numbers_are_spread_evenly_and_choices_differ(count, num_experts, k, key):
    k = min(k, num_experts)
    ids = dealt(torch.arange(count), torch.tensor(key), num_experts, k).tolist()
    assert all(len(set(row)) == k for row in ids)
    for choice in range(k):
        load = Counter(row[choice] for row in ids)
        assert max(load.values(), default=0) - min((load[e] for e in range(num_experts)), default=0) <= 1


def word_experts(words=WORDS, topk=2, **build_with):
    of = TokenInfo(ids_T=torch.arange(words))
    return route(build(topk=topk, moe_router_policy="hash", **build_with), tokens(words), of).ids_TK


def test_a_word_has_the_same_experts_wherever_it_stands_and_others_in_another_layer():
    table = word_experts()
    layer = build(topk=2, moe_router_policy="hash")
    for training in (True, False):
        for iteration in (0, 1):
            of = info(iteration=iteration)
            assert torch.equal(route(layer.train(training), tokens(), of).ids_TK, table[of.ids_T])
    assert not torch.equal(word_experts(number=4), table)
    assert not torch.equal(word_experts(moe_router_hash_seed=5), table)
    assert torch.equal(word_experts(words=20), table[:20])


def test_a_layer_of_one_expert_is_that_expert_and_can_be_looked_at():
    layer, x = build(num_experts=1, topk=1), tokens()
    torch.testing.assert_close(layer(x, info()), oracle.one_expert(layer, 0, x), **EXACT)
    load = summarise(3, layer.stats.sums)
    assert (load.tokens_per_expert, load.router_entropy, load.aux_loss) == ([T], 0.0, 1.0)


@pytest.mark.parametrize("k", [1, 3])
def test_hash_routing_reports_how_evenly_words_fall_and_not_what_the_idle_router_thinks(k):
    layer, of = build(topk=k, moe_router_policy="hash"), info()
    route(layer, tokens(), of)
    load = summarise(3, layer.stats.sums)
    shares = torch.bincount(word_experts(topk=k)[of.ids_T].flatten(), minlength=E) / (T * k)
    assert load.aux_loss == pytest.approx(E * shares.square().sum().item(), rel=1e-6)  # 1: balanced
    assert load.router_entropy == pytest.approx(math.log(k) / math.log(E))


def test_hash_routing_without_token_ids_says_what_is_missing():
    with pytest.raises(ValueError, match=r"routes by token ids.*TokenInfo"):
        build(moe_router_policy="hash")(tokens(), TokenInfo())


def skewed(count=256):
    """Logits of which plain top-k sends most tokens to expert 0."""
    return torch.randn(count, E, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + torch.tensor([4.0] + [0.0] * (E - 1))


def busiest(ids_TK) -> float:
    """Load of the busiest expert over the mean."""
    load = torch.bincount(ids_TK[ids_TK >= 0], minlength=E).double()
    return (load.max() / load.mean()).item()


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_balances_what_plain_choices_pile_up(k):
    logits = skewed()
    plain, planned = logits.topk(k).indices, (logits + column_scale(logits, None, 8)).topk(k).indices
    assert busiest(plain) > 3.5
    assert busiest(planned) < 1.35
    # the plan itself: with every row a share of 1, each expert is given T / E
    plan = (logits + column_scale(logits, None, 40)).softmax(1)
    torch.testing.assert_close(plan.sum(0), torch.full((E,), 256 / E, dtype=torch.float64), rtol=1e-6, atol=0)


def test_sinkhorn_takes_logits_that_overflow_an_exponential():
    assert column_scale(skewed().float() * 100, None, 8).isfinite().all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_zipf_is_as_skewed_as_asked_for(exponent):
    count = 20000
    layer = build(topk=1, moe_router_policy="zipf", moe_router_zipf_exponent=exponent)
    for of in (info(count), TokenInfo()):  # with and without keys
        load = route(layer, tokens(count), of).counts_E.sort(descending=True).values / count
        share = torch.arange(1, E + 1).float() ** -exponent
        torch.testing.assert_close(load, share / share.sum(), rtol=0, atol=0.012)
    popular = {
        route(build(number=n, topk=1, moe_router_policy="zipf"), tokens(500), info(500)).counts_E.argmax().item() for n in range(1, 9)
    }
    assert len(popular) > 2  # another expert in other layers


def test_balanced_is_balanced_and_its_gate_learns():
    layer, x = build(topk=3, moe_router_policy="balanced"), tokens()
    assert route(layer, x, TokenInfo()).counts_E.tolist() == [T * 3 // E] * E
    assert gradients(layer, x, layer(x).square().sum())["gate.weight"].abs().min() > 0


def test_one_token_takes_its_best_experts_with_sinkhorn():
    layer = build(topk=2, moe_router_policy="sinkhorn").float()
    for seed in range(20):
        logits = torch.randn(1, E, generator=torch.Generator().manual_seed(seed)) * 3
        layer.gate.forward = lambda x, logits=logits: logits
        assert route(layer, torch.zeros(1, D), info(1)).ids_TK.tolist() == logits.topk(2).indices.tolist()


@pytest.mark.parametrize(("normalize", "weights"), [("none", [0.5, 0.0]), ("chosen", [0.625, 0.0]), ("survivors", [1.0, 0.0])])
def test_weights_of_a_token_that_lost_its_second_expert(normalize, weights):
    scores, chosen, kept = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0, 1]]), torch.tensor([[0, -1]])
    torch.testing.assert_close(combine_weights(scores, chosen, kept, normalize), torch.tensor([weights]))
    torch.testing.assert_close(combine_weights(scores, chosen, kept, normalize, 3.0), torch.tensor([weights]) * 3)


# ---------------------------------------------------------------- the bias


def test_a_bias_changes_choices_and_leaves_weights_and_gradients_alone():
    layer, x = (
        build(**DEEPSEEK | {"moe_router_num_groups": None, "moe_router_group_topk": None, "topk": 1, "moe_router_normalize": "none"}),
        tokens(),
    )
    with torch.no_grad():
        layer.gate.expert_bias[:] = torch.tensor([0.0] * (E - 1) + [9.0])
    routing = route(layer, x, info())
    assert (routing.ids_TK == E - 1).all()
    score = torch.sigmoid(x @ layer.gate.weight[E - 1]).detach()
    torch.testing.assert_close(routing.weights_TK[:, 0], 2.5 * score, **EXACT)
    assert not gradients(layer, x, layer(x).sum())["gate.weight"][: E - 1].any()


def test_the_bias_balances_a_skewed_layer_without_a_loss():
    layer = build(topk=2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_top2_2nd_expert_sampling=False)
    layer.gate.expert_bias.zero_()
    layer.gate.forward = lambda x: skewed() / 4
    loads = []
    for _ in range(200):
        layer.begin_step(0.0)
        loads.append(busiest(route(layer, tokens(256), info(256)).ids_TK))
        layer.gate.move_bias(layer.stats.counts_E, 0.01)
    assert loads[0] > 2
    assert max(loads[-20:]) < 1.25  # it steps to and fro by 0.01


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    layer = build(num_experts=4, moe_router_enable_expert_bias=True, topk=3)
    layer.gate.expert_bias = torch.zeros(4)
    layer.gate.move_bias(torch.tensor([10.0, 2.0, 6.0, 6.0], dtype=torch.float64), 0.25)
    assert layer.gate.expert_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert layer.gate.expert_bias.dtype == torch.float32


def test_the_bias_counts_choices_before_dropping():
    layer = build(moe_router_enable_expert_bias=True, topk=3, moe_token_dropping=True, moe_train_capacity_factor=0.1)
    routing = route(layer, tokens(), info())
    assert (routing.ids_TK < 0).any()
    assert layer.stats.counts_E.sum() == 3 * T


# ---------------------------------------------------------------- how they are written


def test_every_policy_is_under_60_lines_and_in_the_table():
    assert set(get_args(get_type_hints(MoEConfig)["moe_router_policy"])) == set(policies.POLICIES)
    for policy in policies.POLICIES.values():
        assert len(inspect.getsource(policy).splitlines()) < 60
    for path in Path(policies.__file__).parent.glob("*.py"):
        imported = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [
            m for m in imported if m and m.startswith(("megatron_moe.moe.dispatch", "megatron_moe.moe.routing", "megatron_moe.parallel"))
        ]
