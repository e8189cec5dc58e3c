"""Attention against loops and itself: dropout path, documents, grouped queries; rotary positions against complex numbers."""
# B batch, S sequence, H heads, h head width

import math

import pytest
import torch

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.attention import Attention
from megatron_moe.model.core import CausalCore, Context, visible
from megatron_moe.model.rope import Rotary
from megatron_moe.utils.random import Purpose, token_keys, uniform

B, S, H, h = 2, 7, 4, 6
EXACT = {"rtol": 0, "atol": 1e-10}
ROTARY = Rotary(h, 1e4)


def qkv(heads=H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, S, h, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


def context(segments=None, keys=True, positions=None):
    positions = torch.arange(S).expand(B, S) if positions is None else positions
    return Context(positions, segments, token_keys(1, 2, torch.tensor([3, 8]), S) if keys else None)


def looped(q, k, v, segments=None, kept=None, p=0.0):
    """softmax over what a query may see, one query at a time."""
    rows = []
    for b in range(B):
        for head in range(q.shape[1]):
            for i in range(S):
                seen = [j for j in range(i + 1) if segments is None or segments[b, i] == segments[b, j]]
                probs = torch.stack([q[b, head, i] @ k[b, head, j] / math.sqrt(h) for j in seen]).softmax(0)
                if kept is not None:
                    probs = probs * torch.stack([kept[b, head, i, j] for j in seen]) / (1 - p)
                rows.append(sum(w * v[b, head, j] for w, j in zip(probs, seen)))
    return torch.stack(rows).view(B, -1, S, h)


SEGMENTS = {"one document": None, "two documents": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [4, 5, 5, 5, 5, 5, 9]])}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("keys", [False, True], ids=["evaluation", "training"])
def test_fused_attention_equals_the_loop_with_gradients(segments, keys):
    q, k, v = qkv()
    y, expected = CausalCore(0.0)(q, k, v, context(segments, keys)), looped(q, k, v, segments)
    torch.testing.assert_close(y, expected, **EXACT)
    for got, want in zip(torch.autograd.grad(y.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v))):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_attention_with_dropout_equals_the_loop_with_the_same_draws(segments):
    q, k, v = qkv()
    draws = uniform(context().keys_BS, Purpose.ATTENTION_DROPOUT, H * S).view(B, S, H, S).transpose(1, 2)
    y = CausalCore(0.3)(q, k, v, context(segments))
    torch.testing.assert_close(y, looped(q, k, v, segments, draws >= 0.3, 0.3), **EXACT)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_the_dropout_path_without_drops_is_the_fused_path(segments):
    q, k, v = qkv()
    explicit, fused = (CausalCore(p)(q, k, v, context(segments)) for p in (1e-12, 0.0))
    torch.testing.assert_close(explicit, fused, **EXACT)


def test_dropout_needs_keys():
    q, k, v = qkv()
    assert torch.equal(CausalCore(0.5)(q, k, v, context(keys=False)), CausalCore(0.0)(q, k, v, context()))


def test_a_share_of_the_heads_draws_what_it_would_draw_among_all():
    """Under tensor parallelism a rank has heads first_head .. and must drop as one process would."""
    q, k, v = qkv()
    whole = CausalCore(0.3)(q, k, v, context())
    core = CausalCore(0.3)
    core.first_head = 2
    torch.testing.assert_close(core(q[:, 2:], k[:, 2:], v[:, 2:], context()), whole[:, 2:], **EXACT)


def test_heads_queries_and_keys_drop_independently():
    q, k, v = (torch.zeros(B, H, S, S, dtype=torch.float64) for _ in range(3))
    v[:] = torch.eye(S)  # output = the probabilities themselves
    kept = CausalCore(0.5)(q, k, v, context()) > 0
    assert len({tuple(row.tolist()) for row in kept[:, :, -1].flatten(0, 1)}) > H
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not torch.equal(kept[0, 0], kept[1, 0])


def test_a_query_sees_itself_and_what_came_before_in_its_document():
    mask = visible(context(SEGMENTS["two documents"]))
    assert mask.shape == (B, 1, S, S)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                assert mask[b, 0, i, j] == (j <= i and SEGMENTS["two documents"][b, i] == SEGMENTS["two documents"][b, j])


def attention(**changes):
    torch.manual_seed(0)
    return Attention(ModelConfig(hidden_size=24, num_attention_heads=4, attention_dropout=0.0, **changes)).double()


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_queries_equal_heads_whose_keys_and_values_are_repeated(groups):
    grouped, full = attention(num_key_value_heads=groups), attention()
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
        for name in ("k_proj", "v_proj"):
            for kind in ("weight", "bias"):
                few = getattr(getattr(grouped, name), kind).view(groups, 6, -1)
                getattr(getattr(full, name), kind).copy_(few.repeat_interleave(4 // groups, dim=0).reshape(24, *[24] * (kind == "weight")))
    x = torch.randn(B, S, 24, dtype=torch.float64)
    torch.testing.assert_close(grouped(x, context()), full(x, context()), **EXACT)


def test_head_width_may_differ_from_hidden_size_over_heads():
    layer = attention(kv_channels=10)
    assert layer.q_proj.weight.shape == (40, 24)
    assert layer(torch.randn(B, S, 24, dtype=torch.float64), context()).shape == (B, S, 24)


# ---------------------------------------------------------------- rotary positions


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x = torch.randn(B, H, S, h, dtype=torch.float64)
    positions = torch.randint(0, 1000, (B, S))
    frequency = torch.tensor([500.0 ** (-2 * i / h) for i in range(h // 2)], dtype=torch.float64)
    angle = positions[:, None, :, None].double() * frequency
    turned = torch.complex(x[..., : h // 2], x[..., h // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(Rotary(h, 500.0)(x, positions), torch.cat([turned.real, turned.imag], dim=-1), **EXACT)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k, _ = qkv()
    for shift in (1, 100, 100_000):
        a = ROTARY(q, torch.full((B, S), 3)) * ROTARY(k, torch.full((B, S), 1))
        b = ROTARY(q, torch.full((B, S), 3 + shift)) * ROTARY(k, torch.full((B, S), 1 + shift))
        torch.testing.assert_close(a.sum(-1), b.sum(-1), rtol=0, atol=1e-9)


def test_position_zero_is_the_identity_and_lengths_are_kept():
    x = torch.randn(B, H, S, h, dtype=torch.float64)
    assert torch.equal(ROTARY(x, torch.zeros(B, S, dtype=torch.int64)), x)
    torch.testing.assert_close(ROTARY(x, torch.arange(S).expand(B, S)).norm(dim=-1), x.norm(dim=-1))


def test_attention_with_rotary_positions_does_not_change_when_all_positions_move():
    layer = attention(position_embedding_type="rope")
    x = torch.randn(B, S, 24, dtype=torch.float64)
    here = layer(x, context())
    torch.testing.assert_close(layer(x, context(positions=torch.arange(50, 50 + S).expand(B, S))), here, rtol=0, atol=1e-9)
    stretched = layer(x, context(positions=3 * torch.arange(S).expand(B, S)))
    assert not torch.allclose(stretched, here)


def test_angles_are_float32_also_for_bfloat16_heads():
    """At position 1000 a bf16 angle would be off by up to 4 radians."""
    x = torch.randn(1, 1, 1, h)
    position = torch.tensor([[1001]])
    exact = ROTARY(x.bfloat16().float(), position)
    got = ROTARY(x.bfloat16(), position)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.01, atol=0.01)
