"""Triton's kernels of the weighted activation against the reference, in Triton's interpreter. Run by test_triton_kernels.py."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import reference
from megatron_moe.kernels.activation import activate
from megatron_moe.kernels.weighted_activation import WeightedActivation

NAMES = ["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def operands(name, counts, spare, F, dtype=torch.float32, bias=True, seed=0):
    """h, gate, weights, b1, b_gate (those that there are) and the offsets."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    R, E = sum(counts) + spare, len(counts)
    weights = draw(R)
    weights[R - spare :] = 0.0
    gated = name == "swiglu"
    tensors = [draw(R, F).to(dtype), draw(R, F).to(dtype) if gated else None, weights]
    tensors += [draw(E, F).to(dtype) if bias else None, draw(E, F).to(dtype) if bias and gated else None]
    return [t if t is None else t.requires_grad_() for t in tensors], torch.tensor(counts).cumsum(0).to(torch.int32)


def results(function, name, tensors, offsets, dout):
    h, gate, weights, b1, b_gate = tensors
    out = function(name, h, gate, weights, offsets, b1, b_gate)
    there = [t for t in tensors if t is not None]
    return [out, *torch.autograd.grad(out, there, dout.to(out.dtype))]


def same(name, tensors, offsets, spare, dtype=torch.float32):
    h = tensors[0]
    dout = torch.randn(h.shape, generator=torch.Generator().manual_seed(9))
    dout[len(h) - spare :] = 0.0
    got = results(WeightedActivation.apply, name, tensors, offsets, dout)
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    want = results(reference.weighted_activation, name, wide, offsets, dout.to(dtype).double())
    for g, w in zip(got, want):
        assert g.shape == w.shape
        if w.numel():
            assert (g.double() - w).abs().max() <= TOLERANCE[dtype] * w.abs().max().clamp_min(1.0)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(NAMES), counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), spare=st.integers(0, 5),
    F=st.sampled_from([1, 3, 16, 37]), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_rows_and_widths_equal_the_reference(name, counts, spare, F, bias, seed):
    same(name, *operands(name, counts, spare, F, bias=bias, seed=seed), spare)


@pytest.mark.parametrize("name", NAMES)
def test_every_activation_over_several_tiles(name):
    same(name, *operands(name, [3, 0, 35, 1], 2, 600), 2)


@pytest.mark.parametrize("counts", [[5], [0, 0], [0, 7, 0]], ids=["one expert", "no rows", "idle experts"])
def test_bf16_is_rounded_once(counts):
    same("swiglu", *operands("swiglu", counts, 1, 24, torch.bfloat16), 1, torch.bfloat16)


def test_no_rows_at_all():
    same("gelu", *operands("gelu", [0, 0, 0], 0, 8), 0)


def test_spare_rows_are_not_read():
    tensors, offsets = operands("swiglu", [2, 3], 0, 8)
    tensors = [torch.cat([t.detach(), torch.full((4, *t.shape[1:]), float("nan"))]) if len(t) == 5 else t.detach() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    out, *grads = results(
        WeightedActivation.apply, "swiglu", tensors, offsets, torch.full((9, 8), float("nan")).index_fill(0, torch.arange(5), 1.0)
    )
    for t in (out, *grads[:3]):
        assert not t[5:].any()
        assert t[:5].isfinite().all()
    assert all(g.isfinite().all() for g in grads[3:])


def test_gradient_of_a_row_weight_is_the_product_of_dout_and_the_activation():
    (h, _, weights, *_), offsets = operands("relu", [2], 0, 4, bias=False)
    dout = torch.ones(2, 4)
    _, _, dw = results(WeightedActivation.apply, "relu", [h, None, weights, None, None], offsets, dout)
    torch.testing.assert_close(dw, activate("relu", h).sum(1))
