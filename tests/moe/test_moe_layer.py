"""The MoE layer against a loop over tokens and experts: output, every gradient, auxiliary losses, dropping, noise."""
# T tokens, D hidden, E experts, K experts per token

import gate_oracle as oracle
import pytest
import torch
import torch.nn.functional as F

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.metrics import summarise
from megatron_moe.moe.tokens import NO_INFO, TokenInfo
from megatron_moe.utils.random import Purpose, stream, token_keys, uniform

T, D, FFN, E = 24, 8, 12, 4
EXACT = {"rtol": 0, "atol": 1e-10}


def build(activation="gelu", bias=True, num_experts=E, layer=3, **moe):
    """A float64 layer whose weights are large enough that routing has no near-ties."""
    torch.manual_seed(0)
    moe = {"moe_top2_2nd_expert_sampling": False, "moe_loss_coeff": 0.0, "moe_min_capacity": 0} | moe
    layer = MoELayer(layer, num_experts, D, FFN, MoEConfig(num_experts=(num_experts,), **moe), activation, bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
    return layer


def tokens(count=T, seed=1):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def keys(samples=1, iteration=0, seed=7, length=T):
    return token_keys(seed, iteration, torch.arange(samples), length).flatten()


def info(**of_keys):
    return TokenInfo(keys(**of_keys))


def one_expert(layer, e, x):
    """The MLP of expert e as it is written in the paper: activation, second product, bias, nothing weighted."""
    w = layer.experts
    bias = (lambda name: getattr(w, name)[e]) if w.b1 is not None else (lambda name: 0.0)
    h = x @ w.w1[e] + bias("b1")
    if w.activation == "swiglu":
        h = F.silu(x @ w.w_gate[e] + bias("b_gate")) * h
    else:
        h = {"gelu": F.gelu(h), "relu": h.clamp_min(0), "squared_relu": h.clamp_min(0) ** 2}[w.activation]
    return h @ w.w2[e] + bias("b2")


def looped(layer, x, order="position"):
    """Output of the layer by loops, differentiable; also probabilities, choices and survivors."""
    c = layer.config
    probs = F.softmax(x @ layer.gate.weight.t(), dim=-1)
    ids = oracle.choose(probs.tolist(), c.topk)
    kept = ids
    if c.moe_token_dropping:
        factor = c.moe_train_capacity_factor if layer.training else c.moe_eval_capacity_factor
        priority = [[probs[t, e].item() for e in row] for t, row in enumerate(ids)]
        kept = oracle.keep(ids, oracle.capacity(len(x), layer.num_experts, factor, c.topk, c.moe_min_capacity), order, priority)
    rows = []
    for t, chosen in enumerate(kept):
        survivors = [e for e in chosen if e >= 0]
        total = 1.0 if c.topk == 1 else sum(probs[t, e] for e in survivors)
        rows.append(sum((probs[t, e] / total * one_expert(layer, e, x[t]) for e in survivors), torch.zeros_like(x[t])))
    return torch.stack(rows), probs, ids, kept


def gradients(layer, x, loss):
    names = ["x", *(n for n, _ in layer.named_parameters())]
    return dict(zip(names, torch.autograd.grad(loss, [x, *layer.parameters()])))


def assert_same_gradients(layer, x, loss, expected):
    got, want = gradients(layer, x, loss), gradients(layer, x, expected)
    for name in want:
        torch.testing.assert_close(got[name], want[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")


DROPPING = {
    "no dropping": {"moe_token_dropping": False},
    "half dropped": {"moe_train_capacity_factor": 0.5},
    "by probability": {"moe_train_capacity_factor": 0.5, "moe_token_drop_policy": "probs"},
}


@pytest.mark.parametrize("drop", DROPPING.values(), ids=DROPPING.keys())
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu", "swiglu"])
def test_output_and_gradients_equal_the_loop_over_tokens_and_experts(activation, bias, k, drop):
    layer, x = build(activation, bias, topk=k, **({"moe_token_drop_policy": "position"} | drop)), tokens()
    expected, _, ids, kept = looped(layer, x, layer.drop_order)
    assert (kept != ids) == layer.config.moe_token_dropping  # somebody was dropped
    y = layer(x)
    torch.testing.assert_close(y, expected, **EXACT)
    upstream = torch.randn(T, D, dtype=torch.float64)
    assert_same_gradients(layer, x, (y * upstream).sum(), (expected * upstream).sum())


def test_evaluation_takes_its_own_capacity_factor():
    layer, x = build(moe_train_capacity_factor=0.25, moe_eval_capacity_factor=4.0, moe_rts=False), tokens()
    layer.eval()
    expected, _, ids, kept = looped(layer, x)
    assert kept == ids
    torch.testing.assert_close(layer(x), expected, **EXACT)
    layer.train()
    torch.testing.assert_close(layer(x), looped(layer, x)[0], **EXACT)
    assert not torch.equal(layer(x), expected)


def test_min_capacity_lifts_the_capacity():
    layer, x = build(moe_train_capacity_factor=0.01, moe_min_capacity=T), tokens()
    assert torch.equal(layer(x), build(moe_token_dropping=False)(x))


def test_a_token_of_which_nothing_survives_passes_the_layer_as_zero():
    layer, x = build(moe_train_capacity_factor=0.5, moe_rts=False, topk=2), tokens()
    y, kept = layer(x), torch.tensor(looped(layer, x)[3])
    gone = (kept < 0).all(1)
    assert gone.any()
    assert not y[gone].any()
    assert y[~gone].any(1).all()


def test_no_token_at_all_is_a_layer_without_rows():
    for moe in ({}, {"moe_token_dropping": False}):
        layer = build(**moe, moe_loss_coeff=0.1, moe_router_z_loss_coeff=0.1)
        layer.loss_weight = 1.0
        x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
        y = layer(x, info(length=0))
        y.sum().backward()
        assert y.shape == (0, D)
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_an_idle_expert_has_a_zero_gradient_and_not_none(k):
    layer, x = build(topk=k, moe_token_dropping=False), tokens()
    with torch.no_grad():
        layer.gate.weight[2] = 0
        layer.gate.weight[:, 0], x[:, 0] = torch.tensor([1.0, 1, -1, 1]) * 50, 1.0  # nobody wants expert 2
    layer(x).square().sum().backward()
    for name, p in layer.experts.named_parameters():
        assert not p.grad[2].any(), name
        assert p.grad[[0, 1, 3]].any(), name


def test_the_router_has_a_gradient_with_one_choice():
    layer, x = build(topk=1, moe_token_dropping=False), tokens()
    layer(x).square().sum().backward()
    assert (layer.gate.weight.grad != 0).all()


# ---------------------------------------------------------------- auxiliary losses


@pytest.mark.parametrize("drop", [False, True], ids=["no dropping", "dropping"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_auxiliary_gradients_equal_autograd_of_the_formulas(k, drop, aux, z):
    """The balance loss counts the choices before dropping (of k = 2 the first ones); a multiplier of 0 on the output isolates it."""
    layer = build(
        topk=k, moe_loss_coeff=aux, moe_router_z_loss_coeff=z, moe_token_dropping=drop, moe_train_capacity_factor=0.5, moe_rts=False
    )
    x, layer.loss_weight = tokens(), 1.0 / 100
    probs = F.softmax(x @ layer.gate.weight.t(), dim=-1)
    chosen = [row[:1] if k == 2 else row for row in oracle.choose(probs.tolist(), k)]
    share = torch.tensor(oracle.counts(chosen, E), dtype=torch.float64) / sum(map(len, chosen))
    balance = E * (share * probs.mean(0)).sum()
    z_loss = torch.logsumexp(x @ layer.gate.weight.t(), dim=-1).square().mean()
    expected = (aux * balance + z * z_loss) * (T / 100)
    want = torch.autograd.grad(expected, [x, layer.gate.weight])
    got = gradients(layer, x, 0.0 * layer(x).sum())
    torch.testing.assert_close(got["x"], want[0], **EXACT)
    torch.testing.assert_close(got["gate.weight"], want[1], **EXACT)
    assert want[1].abs().max() > 1e-4
    assert not any(g.any() for name, g in got.items() if name.startswith("experts"))


def test_the_main_gradient_is_the_same_with_and_without_auxiliary_losses():
    """Gradients are additive: main + auxiliary; the output does not change at all."""
    plain, both, x = build(), build(moe_loss_coeff=0.3), tokens()
    both.loss_weight = 0.1
    torch.testing.assert_close(both(x), plain(x), rtol=0, atol=0)
    main = gradients(plain, x, plain(x).square().sum())
    auxiliary = gradients(both, x, 0.0 * both(x).sum())
    together = gradients(both, x, both(x).square().sum())
    for name in main:
        torch.testing.assert_close(together[name], main[name] + auxiliary[name], **EXACT)


QUIET = {
    "coefficients 0": ({"moe_loss_coeff": 0.0}, 1.0, True),
    "loss weight 0": ({"moe_loss_coeff": 0.3, "moe_router_z_loss_coeff": 0.3}, 0.0, True),
    "evaluation": ({"moe_loss_coeff": 0.3, "moe_router_z_loss_coeff": 0.3}, 1.0, False),
}


@pytest.mark.parametrize(("moe", "weight", "training"), QUIET.values(), ids=QUIET.keys())
def test_auxiliary_losses_add_nothing(moe, weight, training):
    layer, x = build(**moe).train(training), tokens()
    layer.loss_weight = weight
    assert not any(g.any() for g in gradients(layer, x, 0.0 * layer(x).sum()).values())


def test_auxiliary_losses_are_measured_also_in_evaluation():
    layer, x = build().eval(), tokens()
    with torch.no_grad():
        layer(x)
    _, probs, ids, _ = looped(layer, x)
    load = summarise(3, layer.stats.vector(torch.device("cpu")))
    assert load.aux_loss == pytest.approx(oracle.balance(probs.tolist(), ids, E), rel=1e-10)
    assert load.tokens_per_expert == oracle.counts(ids, E)
    z = torch.logsumexp(x @ layer.gate.weight.t(), dim=-1).square().mean()
    assert load.z_loss == pytest.approx(z.item(), rel=1e-10)
    entropy = -(probs * probs.log()).sum(1).mean() / torch.tensor(float(E)).log()
    assert load.router_entropy == pytest.approx(entropy.item(), rel=1e-6)


def test_statistics_count_the_dropped_share_and_add_up_over_microbatches():
    layer = build(moe_train_capacity_factor=0.5, moe_rts=False)
    dropped = 0
    for seed in (1, 2):
        x = tokens(seed=seed)
        layer(x)
        dropped += sum(row == [-1] for row in looped(layer, x)[3])
    load = summarise(3, layer.stats.vector(torch.device("cpu")))
    assert sum(load.tokens_per_expert) == 2 * T
    assert load.dropped_fraction == pytest.approx(dropped / (2 * T))
    layer.stats.reset()
    assert not layer.stats.vector(torch.device("cpu")).any()


def test_equal_logits_have_balance_loss_one():
    layer, x = build(), tokens()
    with torch.no_grad():
        layer.gate.weight.zero_()
    layer(x)
    load = summarise(3, layer.stats.vector(torch.device("cpu")))
    assert load.aux_loss == pytest.approx(1.0)
    assert load.router_entropy == pytest.approx(1.0)


def test_losses_of_two_microbatches_with_equal_counts_add_up_to_the_whole():
    """loss_weight is 1 / tokens of the global batch, so shares of microbatches need no further factor."""
    layer, x = build(moe_loss_coeff=0.3, moe_router_z_loss_coeff=0.1), tokens()
    layer.reducer.over_microbatch = lambda counts: torch.tensor([3, 1, 1, 1])
    layer.loss_weight = 1 / T
    whole = gradients(layer, x, 0.0 * layer(x).sum())
    halves = gradients(layer, x, 0.0 * (layer(x[: T // 2]).sum() + layer(x[T // 2 :]).sum()))
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name], **EXACT)


# ---------------------------------------------------------------- noise


def survivors(layer, x, of=NO_INFO):
    with torch.no_grad():
        return layer.route(x, of)[0].ids_TK


def test_random_selection_draws_survivors_from_the_keys_alone():
    layer, x = build(moe_train_capacity_factor=0.5), tokens()
    first, again, next_iteration = (survivors(layer, x, info(iteration=i)) for i in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_iteration)
    assert not torch.equal(first, survivors(layer, x))  # without keys: by position


def test_random_selection_keeps_the_highest_draws_of_each_expert():
    layer, x = build(moe_train_capacity_factor=0.5), tokens()
    draws = uniform(keys(), stream(3, Purpose.TOKEN_SELECTION), 1)
    ids = looped(layer, x)[2]
    assert survivors(layer, x, info()).tolist() == oracle.keep(ids, T // E // 2, "random", draws.tolist())


@pytest.mark.parametrize(
    ("moe", "order"),
    [
        ({"topk": 1}, "random"), ({"topk": 1, "moe_rts": False}, "position"), ({"topk": 2}, "position"), ({"topk": 3}, "probs"),
        ({"topk": 4}, "probs"), ({"topk": 3, "moe_token_drop_policy": "position"}, "position"),
        ({"topk": 2, "moe_token_drop_policy": "random"}, "random"), ({"topk": 1, "moe_token_drop_policy": "probs"}, "probs"),
    ],
)  # fmt: skip
def test_who_is_dropped_follows_deepspeed_unless_the_policy_says_otherwise(moe, order):
    layer, x = build(moe_train_capacity_factor=0.5, **moe), tokens()
    _, probs, ids, _ = looped(layer, x)
    k = layer.config.topk
    priority = uniform(keys(), stream(3, Purpose.TOKEN_SELECTION), k) if order == "random" else probs.gather(1, torch.tensor(ids))
    assert survivors(layer, x, info()).tolist() == oracle.keep(ids, T // E * k // 2, order, priority.tolist())


def test_random_selection_favours_no_position():
    layer = build(moe_train_capacity_factor=0.5)
    with torch.no_grad():
        layer.gate.weight.zero_()  # everybody to expert 0, of which 3 of 24 stay
    kept = sum((survivors(layer, tokens(), info(iteration=i)) >= 0).double() for i in range(400)).flatten()
    assert kept.sum() == 400 * 3
    assert ((kept - 50).square() / 50).sum() < 55  # chi-square of 24 positions: 99.98 % lie below


@pytest.mark.parametrize(
    "moe",
    [{}, {"moe_noisy_gate_policy": "Jitter"}, {"moe_noisy_gate_policy": "RSample"}, {"topk": 2, "moe_top2_2nd_expert_sampling": True}],
    ids=["random selection", "jitter", "rsample", "second expert"],
)
def test_evaluation_is_deterministic_and_ignores_the_keys(moe):
    layer, x = build(**moe, moe_eval_capacity_factor=0.5).eval(), tokens()
    expected = looped(layer, x, "position")[0]
    torch.testing.assert_close(layer(x, info()), expected, **EXACT)
    torch.testing.assert_close(layer(x), expected, **EXACT)


NOISY = {
    "jitter": {"moe_noisy_gate_policy": "Jitter"},
    "rsample": {"moe_noisy_gate_policy": "RSample"},
    "second expert": {"topk": 2, "moe_top2_2nd_expert_sampling": True},
}


@pytest.mark.parametrize("moe", NOISY.values(), ids=NOISY.keys())
def test_noise_in_training_changes_with_the_iteration_and_needs_keys(moe):
    layer, x = build(**moe, moe_token_dropping=False), tokens()
    quiet = looped(layer, x)[0]
    torch.testing.assert_close(layer(x), quiet, **EXACT)
    noisy = [layer(x, info(iteration=i)) for i in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.allclose(noisy[0], quiet)


@pytest.mark.parametrize("moe", NOISY.values(), ids=NOISY.keys())
def test_noise_follows_sample_and_position_when_the_batch_is_permuted(moe):
    layer = build(**moe, moe_token_dropping=False)
    samples, length = torch.tensor([5, 9, 2]), 8
    x_BSD = tokens().detach().view(3, length, D)
    order = torch.tensor([2, 0, 1])
    y_BSD = layer(x_BSD.flatten(0, 1), TokenInfo(token_keys(1, 1, samples, length).flatten())).view(3, length, D)
    permuted = layer(x_BSD[order].flatten(0, 1), TokenInfo(token_keys(1, 1, samples[order], length).flatten())).view(3, length, D)
    torch.testing.assert_close(permuted, y_BSD[order], **EXACT)


@pytest.mark.parametrize("moe", NOISY.values(), ids=NOISY.keys())
def test_noise_differs_between_layers_samples_and_positions(moe):
    x = tokens(1).detach().expand(T, D)  # one token, many times: only the noise can tell them apart
    ids_or_weights = []
    for layer in (3, 4):
        routing = build(**moe, moe_token_dropping=False, layer=layer).route(x, info())[0]
        ids_or_weights.append(torch.cat([routing.ids_TK.double(), routing.weights_TK], dim=1))
    assert len(ids_or_weights[0].unique(dim=0)) > 1
    assert not torch.equal(ids_or_weights[0], ids_or_weights[1])


def test_jitter_scales_every_input_of_the_gate_by_at_most_one_percent():
    layer, x = build(moe_noisy_gate_policy="Jitter", moe_token_dropping=False), tokens()
    seen = []
    layer.gate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x, info())
    factor = (seen[0] / x).detach()
    assert 0.99 <= factor.min() < 0.992
    assert 1.008 < factor.max() <= 1.01
    assert abs(factor.mean() - 1) < 0.002


def test_rsample_draws_experts_in_proportion_to_their_probability_and_weighs_them_cleanly():
    layer = build(moe_noisy_gate_policy="RSample", moe_token_dropping=False)
    x = tokens(1).detach().expand(4000, D)
    routing = layer.route(x, info(length=4000))[0]
    probs = F.softmax(x[0] @ layer.gate.weight.t(), dim=-1)
    share = routing.counts_E / 4000
    torch.testing.assert_close(share, probs.detach().float(), rtol=0, atol=0.03)
    torch.testing.assert_close(routing.weights_TK, probs[routing.ids_TK], **EXACT)


# ---------------------------------------------------------------- dtypes and swaps


def test_the_router_decides_in_float32_whatever_the_tokens_are():
    torch.manual_seed(0)
    layer = MoELayer(1, E, 16, 32, MoEConfig(num_experts=(E,), moe_token_dropping=False))
    x = torch.randn(T, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.gate(x).dtype == torch.float32
    layer.experts.bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer.gate(x), x.float() @ layer.gate.weight.t(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu", "swiglu"])
def test_the_layer_equals_its_reference_kernels_in_float32(activation, padded, bias):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=(E,), topk=2, moe_pad_expert_input_to_capacity=padded)
    layer = MoELayer(1, E, 16, 32, moe, activation, bias)
    x = torch.randn(T, 16)
    fast = layer(x)
    layer.experts.use_reference = True
    torch.testing.assert_close(layer(x), fast, rtol=1e-4, atol=1e-6)


def test_routing_happens_once_outside_of_what_may_be_recomputed():
    layer, x = build(moe_train_capacity_factor=0.5), tokens()
    calls = []
    layer.run = lambda function, *args: calls.append(function) or function(*args) * 0 + function(*args)
    once = layer(x, info())
    tokens_seen = sum(summarise(3, layer.stats.vector(torch.device("cpu"))).tokens_per_expert)
    assert calls == [layer.compute]
    assert tokens_seen == T
    layer.run = lambda function, *args: function(*args)
    torch.testing.assert_close(layer(x, info()), once, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_balance_loss_is_handed_out_where_it_is_not_attached(training):
    """With its gradient, as the sum over the tokens; and never both, or it would count twice."""
    layer = build(topk=3, moe_token_dropping=False).train(training)
    _, routing = layer.routed(tokens(), info())
    probs = F.softmax(tokens() @ layer.gate.weight.t(), dim=-1)
    expected = E * (routing.counts_E.double() / routing.counts_E.sum() * probs.sum(0)).sum()
    torch.testing.assert_close(routing.balance, expected, **EXACT)
    got, want = (torch.autograd.grad(loss, layer.gate.weight)[0] for loss in (routing.balance, expected))
    torch.testing.assert_close(got, want, **EXACT)
    layer.loss_weight = 1 / T
    assert (layer.routed(tokens(), info())[1].balance is None) == training
