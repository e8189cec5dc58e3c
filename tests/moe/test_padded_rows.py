"""Padding to the capacity in one process: property tests against the unpadded dispatcher, odd sizes and ties of nothing included."""
# T tokens, D hidden, E experts, K experts per token, C capacity

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.dispatch import Limits, LocalDispatcher, PaddedDispatcher
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import token_keys

D = 4


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(0, 9), experts=st.integers(1, 6), k=st.integers(1, 3), dropped=st.sampled_from([0.0, 0.3, 1.0]),
    has_capacity=st.booleans(), slack=st.integers(0, 3), seed=st.integers(0, 999),
)  # fmt: skip
def test_padded_rows_are_the_unpadded_ones_and_zeros(tokens, experts, k, dropped, has_capacity, slack, seed):
    k, generator = min(k, experts), torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :k]
    ids = torch.where(torch.rand(ids.shape, generator=generator) < dropped, -1, ids)
    x = torch.randn(tokens, D, generator=generator).requires_grad_()
    weights = torch.rand(tokens, k, generator=generator).requires_grad_()
    load = max((ids == e).sum().item() for e in range(experts))
    limits = Limits(capacity=load + slack if has_capacity else None, most_tokens=tokens + 1)
    padded, plain = PaddedDispatcher(experts), LocalDispatcher(experts)
    rows, ends, row_weights, plan = padded.dispatch(x, ids, weights, padded.plan(ids, limits))
    capacity = min(load + slack, tokens + 1) if has_capacity else load
    assert ends.tolist() == [capacity * (e + 1) for e in range(experts)]
    assert len(rows) == len(row_weights) == capacity * experts
    plain_rows, plain_ends, plain_weights, plain_plan = plain.dispatch(x, ids, weights)
    start = 0
    for e, end in enumerate(plain_ends.tolist()):
        n, first = end - start, e * capacity
        assert torch.equal(rows[first : first + n], plain_rows[start:end])
        assert torch.equal(row_weights[first : first + n], plain_weights[start:end])
        assert not rows[first + n : first + capacity].any()
        assert not row_weights[first + n : first + capacity].any()
        start = end
    y, expected = padded.combine(rows * row_weights[:, None], plan), plain.combine(plain_rows * plain_weights[:, None], plain_plan)
    assert torch.equal(y, expected)
    if tokens:
        for a, b in zip(torch.autograd.grad(y.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights))):
            torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 20), k=st.integers(1, 3), dropping=st.booleans(), training=st.booleans(), bias=st.booleans(),
    activation=st.sampled_from(["gelu", "relu", "squared_relu", "swiglu"]), latent=st.sampled_from([None, 3]),
)  # fmt: skip
def test_a_padded_layer_computes_what_the_unpadded_one_does(tokens, k, dropping, training, bias, activation, latent):
    """With biases a zero row has an answer; its weight of zero must take it away, from output and gradients."""
    layers = []
    for pad in (False, True):
        torch.manual_seed(0)
        moe = MoEConfig(num_experts=(5,), topk=k, moe_token_dropping=dropping, moe_min_capacity=1, moe_latent_size=latent,
                        moe_train_capacity_factor=0.7, moe_eval_capacity_factor=2.0, moe_pad_expert_input_to_capacity=pad)  # fmt: skip
        layer = MoELayer(2, 5, D, 6, moe, activation, bias).double().train(training)
        layer.loss_weight = 0.1
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(0, 0.7)
        layers.append(layer)
    assert [layer.dispatcher.name for layer in layers] == ["local", "padded"]
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    info = TokenInfo(token_keys(1, 2, torch.arange(1), tokens).flatten())
    results = []
    for layer in layers:
        y = layer(x, info)
        results.append([y, *torch.autograd.grad((y * torch.linspace(1, 2, D)).sum(), [x, *layer.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
