"""Experts of any kind against the same modules called one by one: output, gradients, idle experts, what is refused, initial weights."""
# T tokens, D hidden, E experts

import pytest
import torch
from torch import nn
from torch.func import functional_call

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, initialize_parameters
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.tokens import NO_INFO
from megatron_moe.optimizer.groups import weight_decay_groups

T, D, E = 20, 8, 4
EXACT = {"rtol": 0, "atol": 1e-12}


class Odd(nn.Module):
    """A norm, a vector, a number; the tuple of Megatron's modules."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, width))
        self.scale, self.mix = nn.Parameter(torch.ones(width)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.inner(self.norm(x)) * self.scale + self.mix * x, None


def build(factory=Odd, dropless=True, **moe):
    torch.manual_seed(0)
    config = MoEConfig(num_experts=(E,), moe_token_dropping=not dropless, moe_loss_coeff=0.0, **moe)
    layer = MoELayer(1, E, D, 0, config, expert_factory=factory).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
    return layer


def tokens(seed=1):
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def looped(layer, x):
    """Every token through each of its experts, alone; a plain module holds one expert's slice of the stacks."""
    routing, _ = layer.route(x, NO_INFO)
    experts = []
    for e in range(E):
        expert = Odd(layer.experts.width).double()
        experts.append(lambda row, e=e, expert=expert: functional_call(expert, slices(layer, e), (row,))[0])
    rows = x if layer.latent_down is None else x @ layer.latent_down.weight.t()
    out = []
    for t in range(T):
        chosen = [(w, e) for w, e in zip(routing.weights_TK[t], routing.ids_TK[t].tolist()) if e >= 0]
        out.append(sum((w * experts[e](rows[t : t + 1])[0] for w, e in chosen), torch.zeros_like(rows[t])))
    y = torch.stack(out)
    return y if layer.latent_up is None else y @ layer.latent_up.weight.t()


def slices(layer, e):
    return {name: p[e] for name, p in layer.experts.stack.named_parameters()}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("dropless", [True, False], ids=["dropless", "dropping"])
@pytest.mark.parametrize("latent", [None, 6], ids=["", "latent"])
def test_output_and_gradients_equal_each_module_called_alone(k, padded, dropless, latent):
    layer = build(dropless=dropless, topk=k, moe_min_capacity=2, moe_train_capacity_factor=0.6, moe_latent_size=latent,
                  moe_pad_expert_input_to_capacity=padded)  # fmt: skip
    x = tokens()
    y, expected = layer(x), looped(layer, x)
    torch.testing.assert_close(y, expected, **EXACT)
    upstream, wrt = torch.randn_like(y), [x, *layer.parameters()]
    got = torch.autograd.grad((y * upstream).sum(), wrt)
    want = torch.autograd.grad((expected * upstream).sum(), wrt)
    for name, a, b in zip(["x", *(n for n, _ in layer.named_parameters())], got, want):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_behind_the_last_expert_come_out_as_zero_with_zero_gradients():
    experts = build().experts
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0] * 5 + [0.0] * 2, dtype=torch.float64)
    y = experts(x, torch.tensor([2, 2, 5, 5], dtype=torch.int32), weights, True)
    assert y.shape == x.shape
    assert not y[5:].any()
    y.sum().backward()
    assert not x.grad[5:].any()
    assert x.grad[:5].any(1).all()


def test_idle_experts_have_zero_gradients_and_not_none_also_when_all_are_idle():
    experts = build().experts
    for rows, busy in (([0, 3, 0, 0], [1]), ([0, 0, 0, 0], [])):
        experts.zero_grad()
        x = torch.randn(sum(rows), D, dtype=torch.float64)
        y = experts(x, torch.tensor(rows).cumsum(0).to(torch.int32), torch.ones(sum(rows), dtype=torch.float64))
        y.sum().backward()
        for name, p in experts.named_parameters():
            assert p.grad is not None, name
            assert not p.grad[[e for e in range(E) if e not in busy]].any(), name


def test_bf16_rows_stay_bf16():
    layer = build().bfloat16()
    layer.gate.float()
    assert layer(tokens().bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------- what is refused


class Returns(nn.Module):
    def __init__(self, width, result):
        super().__init__()
        self.linear, self.result = nn.Linear(width, width), result

    def forward(self, x):
        return self.result(self.linear(x))


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


REFUSED = {
    "another width": (lambda d: nn.Linear(d, d + 1), r"\[2, 8\] became \[2, 9\]"),
    "one row less": (lambda d: Returns(d, lambda y: y[1:]), r"\[2, 8\] became \[1, 8\]"),
    "wants another width": (lambda d: nn.Linear(d - 1, d), "cannot take 2 rows of width 8"),
    "no rows": (lambda d: Returns(d, lambda y: y - y[0]), "cannot take no rows of width 8"),
    "batch norm": (lambda d: nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d)), "batch norms .1.running_mean, 1.running_var"),
    "batch norm without statistics": (lambda d: nn.Sequential(nn.BatchNorm1d(d, track_running_stats=False)), r"batch norms \(0\)"),
    "dropout": (lambda d: nn.Sequential(nn.Linear(d, d), nn.Dropout(0.1)), r"Sequential draws random numbers \("),
    "dropout as a function": (lambda d: Returns(d, lambda y: nn.functional.dropout(y, 0.1)), "draws random numbers"),
    "noise": (lambda d: Returns(d, lambda y: y + torch.randn_like(y)), r"draws random numbers \(aten::randn_like"),
    "a bias beside": (lambda d: Returns(d, lambda y: (y, y[0])), "add the bias inside"),
    "three results": (lambda d: Returns(d, lambda y: (y, None, None)), "tuple of 3"),
    "tied weights": (Tied, r"two names \(b.weight\)"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("which", list(REFUSED))
def test_a_module_that_cannot_be_an_expert_is_refused_when_the_layer_is_built(which, device):
    factory, message = REFUSED[which]
    with torch.device(device), pytest.raises(ValueError, match=message):
        MoELayer(1, E, D, 0, MoEConfig(num_experts=(E,)), expert_factory=factory)


def test_a_shape_that_changes_with_the_rows_is_refused_in_the_forward():
    layer = build(lambda d: Returns(d, lambda y: y[:2]))
    with pytest.raises(ValueError, match=r"must return rows of the shape it is given: \[\d+, 8\] became \[2, 8\]"):
        layer(tokens())


def test_what_is_close_to_refused_is_not():
    for factory in (
        lambda d: nn.Sequential(nn.Linear(d, d), nn.Dropout(0.0)),
        lambda d: Returns(d, lambda y: (y, None)),
    ):
        build(factory)


# ---------------------------------------------------------------- initial weights, names


def model_of(factory=Odd, identical=False, seed=3):
    config = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, max_position_embeddings=8, make_vocab_size_divisible_by=16)
    moe = MoEConfig(num_experts=(E,), expert_interval=1, moe_token_dropping=False)
    model = build_on_meta(lambda: GPT(config, moe, 20, factory), torch.float32).to_empty(device="cpu")
    initialize_parameters(model, seed, 0.02, 2, identical)
    return model


def test_each_expert_of_each_layer_starts_with_weights_of_its_own_as_its_module_draws_them():
    model, again, other = model_of(), model_of(), model_of(seed=4)
    first, second = (model.layers[i].moe.experts.stack for i in ("1", "2"))
    weights = [*first.inner[0].weight, *second.inner[0].weight]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    for w in weights:
        assert 0.9 / 4 < w.abs().max() <= 1 / 4  # nn.Linear draws from U(-1/sqrt(inputs), 1/sqrt(inputs)), not from N(0, 0.02)
    assert torch.equal(first.scale, torch.ones(E, 16))
    assert torch.equal(first.mix, torch.full((E,), 0.5))
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert not torch.equal(first.inner[0].weight, other.layers["1"].moe.experts.stack.inner[0].weight)


def test_experts_start_identical_when_asked_to():
    stack = model_of(identical=True).layers["1"].moe.experts.stack
    for name, p in stack.named_parameters():
        assert all(torch.equal(p[0], expert) for expert in p), name


def test_drawing_experts_leaves_the_generator_of_the_caller_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model_of()
    assert torch.equal(torch.rand(3), expected)


def test_biases_norms_and_vectors_of_modules_do_not_decay():
    model = model_of(lambda d: nn.Sequential(Odd(d)))  # a number in the name is no number of an expert
    names = {p: n for n, p in model.named_parameters()}
    decaying = {names[p] for p in weight_decay_groups(model, 0.1)[0]["params"]}
    assert {n.partition("experts.")[2] for n in decaying if "experts" in n} == {"stack.0.inner.0.weight", "stack.0.inner.2.weight"}


def test_frozen_parameters_stay_frozen():
    def factory(width):
        module = Odd(width)
        module.scale.requires_grad_(False)
        return module

    experts = build(factory).experts
    assert {n for n, p in experts.named_parameters() if not p.requires_grad} == {"stack.scale"}


def test_dropout_is_for_those_who_ask_for_it_and_the_trial_draws_nothing():
    config = MoEConfig(num_experts=(E,), moe_token_dropping=False)
    modules = [nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)) for _ in range(E)]
    left = iter(modules)
    torch.manual_seed(1)
    nn.init.normal_(torch.empty(E, D))  # the gate's
    before = torch.get_rng_state()
    torch.manual_seed(1)
    layer = MoELayer(1, E, D, 0, config, expert_factory=lambda _: next(left), experts_may_draw=True)
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(T, D)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
