"""Causal attention by matrix products of our own, against the scores written out, and where it is chosen."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron_moe.kernels import causal_attention as kernel
from megatron_moe.kernels.causal_attention import causal_attention
from megatron_moe.model import core
from megatron_moe.model.core import CausalCore, Context


def operands(batch, heads, groups, length, width, value_width, dtype=torch.float64):
    """As attention makes them: heads are a dim of its projections, turned to the front."""
    generator = torch.Generator().manual_seed(length)
    sizes = ((heads, width), (groups, width), (groups, value_width), (heads, value_width))
    *qkv, dy = (torch.randn(batch, length, *size, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for size in sizes)
    return [t.requires_grad_() for t in qkv], dy


def written_out(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (scale * (q @ k.transpose(-1, -2))).masked_fill(ahead, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    ("shape", "rows", "scores", "scale"),
    [
        ((2, 4, 2, 37, 6, 6), 64, 1 << 19, None),  # one block
        ((2, 4, 2, 37, 6, 6), 8, 1 << 19, None),  # a last block of five
        ((3, 6, 2, 32, 5, 3), 8, 700, 0.3),  # pairs one by one, values of another width
        ((2, 2, 2, 16, 4, 4), 1, 1, None),
        ((1, 3, 1, 1, 4, 4), 64, 1 << 19, None),
        ((0, 4, 2, 8, 4, 4), 4, 1 << 19, None),
    ],
)
def test_output_and_gradients_are_those_of_scores_written_out(shape, rows, scores, scale):
    operand, dy = operands(*shape)
    with mock.patch.object(kernel, "ROWS", rows), mock.patch.object(kernel, "SCORES", scores):
        found = causal_attention(*operand, scale)
        grads = torch.autograd.grad(found, operand, dy)
    expected = written_out(*operand, scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(grads, torch.autograd.grad(expected, operand, dy)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [64, 200])
def test_bf16_is_no_further_from_the_truth_than_torchs_own_kernel(length):
    operand, dy = operands(2, 4, 2, length, 16, 16, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in operand]
    truth = [(y := written_out(*exact)), *torch.autograd.grad(y, exact, dy.double())]

    def errors(attend):
        y = attend(*operand)
        return [((a - b).norm() / b.norm()).item() for a, b in zip([y, *torch.autograd.grad(y, operand, dy)], truth)]

    theirs = errors(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for found, bound in zip(errors(causal_attention), theirs):
        assert found < 1.5 * bound + 1e-3


def test_the_operator_is_what_torch_compile_takes_it_for():
    (q, k, v), _ = operands(1, 4, 2, 9, 4, 6)
    torch.library.opcheck(torch.ops.megatron_moe.causal_attention.default, (q, k, v, 0.5))


def test_the_model_uses_it_for_what_it_can_do_and_nothing_else():
    def used(dtype=torch.bfloat16, length=64, **kind):
        (q, k, v), _ = operands(1, 2, 2, length, 8, 8, dtype)
        positions = torch.arange(length)[None]
        context = Context(positions, kind.get("segments"), kind.get("keys"))
        with mock.patch.object(core, "causal_attention", side_effect=causal_attention) as attend:
            CausalCore(kind.get("dropout", 0.0), window=kind.get("window"))(q, k, v, context, kind.get("sinks"))
        return attend.called

    assert used() and used(window=64)
    assert not used(torch.float32) and not used(torch.float64) and not used(length=32)
    assert not used(window=63) and not used(segments=torch.zeros(1, 64, dtype=torch.int64)) and not used(sinks=torch.zeros(2))
    assert not used(dropout=0.5, keys=torch.zeros(1, 64, dtype=torch.int64))
