"""Windows, sinks, norms of q and k, latent attention and rotary variants against NumPy, one query at a time."""
# B batch, S sequence, D hidden, H heads, h head width

import dataclasses
import math

import numpy as np
import pytest
import torch

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.attention import Attention, build_attention
from megatron_moe.model.core import CausalCore, Context
from megatron_moe.model.gpt import GPT
from megatron_moe.model.latent_attention import LatentAttention
from megatron_moe.model.rope import Rotary, build_rotary, softmax_scale
from megatron_moe.utils.random import token_keys

B, S, D, H = 2, 9, 24, 4
EXACT = {"rtol": 0, "atol": 1e-10}
ROPE = {"position_embedding_type": "rope"}
LATENT = {"multi_latent_attention": True, "kv_lora_rank": 7, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5, **ROPE}


def config(**changes):
    return ModelConfig(**({"num_layers": 4, "hidden_size": D, "num_attention_heads": H, "attention_dropout": 0.0} | changes))


def context(segments=None):
    return Context(torch.arange(S).expand(B, S), segments)


def filled(module):
    """Every parameter random, norms too."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.5)
    return module.double()


def x_BSD():
    return torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attended(q, k, v, scale, window=None, sinks=None, segments=None):
    """[S, H, h] each -> [S, H, width of v]; in NumPy, from the definition."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for i in range(len(q)):
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            seen = [j for j in range(len(q)) if j <= i and (window is None or i - j < window)]
            seen = [j for j in seen if segments is None or segments[i] == segments[j]]
            scores = np.array([scale * q[i, head] @ k[j, group] for j in seen])
            exp = np.exp(scores - scores.max())
            total = exp.sum() + (0 if sinks is None else np.exp(sinks[head] - scores.max()))
            out[i, head] = sum(e / total * v[j, group] for e, j in zip(exp, seen))
    return out


# ---------------------------------------------------------------- window and sinks


@pytest.mark.parametrize("segments", [None, [0, 0, 0, 0, 1, 1, 1, 1, 1]], ids=["one", "two"])
@pytest.mark.parametrize(("window", "has_sinks"), [(3, False), (None, True), (4, True), (1, False), (100, True)])
def test_window_and_sinks_equal_the_loop(window, has_sinks, segments):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, S, 6, dtype=torch.float64) for n in (H, 2, 2))
    sinks = torch.randn(H, dtype=torch.float64) if has_sinks else None
    there = None if segments is None else torch.tensor([segments])
    y = CausalCore(0.0, 0.3, window)(q, k, v, Context(torch.arange(S)[None], there), sinks)
    logits = None if sinks is None else sinks.numpy()
    expected = attended(*(t[0].transpose(0, 1).numpy() for t in (q, k, v)), 0.3, window, logits, segments)
    np.testing.assert_allclose(y[0].transpose(0, 1).numpy(), expected, rtol=0, atol=1e-12)


def test_the_gradient_of_a_sink_is_that_of_one_logit_more():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, S, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    y = CausalCore(0.0)(q, k, v, Context(torch.arange(S)[None]), sinks)
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) / math.sqrt(6)).masked_fill(~mask, float("-inf"))
    probs = torch.cat([scores, sinks[None, :, None, None].expand(1, H, S, 1)], -1).softmax(-1)[..., :-1]
    want = torch.autograd.grad((probs @ v).square().sum(), (q, k, v, sinks))
    for a, b in zip(torch.autograd.grad(y.square().sum(), (q, k, v, sinks)), want):
        torch.testing.assert_close(a, b, **EXACT)


def test_dropout_with_a_sink_drops_what_it_drops_without():
    torch.manual_seed(0)
    q, k = (torch.randn(B, H, S, 6, dtype=torch.float64) for _ in range(2))
    v = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)  # output = the probabilities themselves
    c = Context(torch.arange(S).expand(B, S), None, token_keys(1, 2, torch.tensor([3, 8]), S))
    plain, beside = (CausalCore(0.4)(q, k, v, c, sinks) for sinks in (None, torch.zeros(H, dtype=torch.float64)))
    assert torch.equal(plain > 0, beside > 0)
    assert (beside.sum(-1) <= plain.sum(-1)).all()
    assert (beside.sum(-1) < plain.sum(-1)).any()


@pytest.mark.parametrize(
    ("skip", "windows"), [(None, [3, 3, 3, 3]), (2, [3, None, 3, None]), ((3,), [3, 3, None, 3]), ((0, 1, 1, 0), [None, 3, 3, None])]
)
def test_layers_with_and_without_the_window(skip, windows):
    c = config(window_size=3, window_attn_skip_freq=skip)
    assert [c.window_of(layer) for layer in range(1, 5)] == windows
    model = GPT(dataclasses.replace(c, mtp_num_layers=1), MoEConfig(), 30)
    assert [block.attn.core.window for block in model.blocks] == [*windows, windows[-1]]  # multi-token prediction: as the last layer


# ---------------------------------------------------------------- norms, biases


@pytest.mark.parametrize("scope", ["head", "hidden"])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_of_queries_and_keys_equal_the_formula(scope, normalization):
    kind = {"num_key_value_heads": 2, "qk_layernorm": True, "qk_layernorm_scope": scope, "normalization": normalization}
    layer = filled(Attention(config(**kind, add_bias_linear=False, add_qkv_bias=True)))
    assert layer.out_proj.bias is None
    x, h = x_BSD(), 6

    def normed(t, norm):
        t = t if scope == "hidden" else t.reshape(B, S, -1, h)
        if normalization == "LayerNorm":
            t = t - t.mean(-1, keepdims=True)
        t = t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.detach().numpy()
        return (t + (norm.bias.detach().numpy() if normalization == "LayerNorm" else 0)).reshape(B, S, -1, h)

    q, k, v = ((x @ p.weight.T + p.bias).detach().numpy() for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = normed(q, layer.q_norm), normed(k, layer.k_norm), v.reshape(B, S, -1, h)
    expected = np.stack([attended(q[b], k[b], v[b], h**-0.5).reshape(S, -1) for b in range(B)]) @ layer.out_proj.weight.detach().numpy().T
    np.testing.assert_allclose(layer(x, context()).detach().numpy(), expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- latent attention


@pytest.mark.parametrize("narrow", [None, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_latent_attention_equals_the_formulas_of_the_paper(narrow, has_bias):
    """DeepSeek-V2, equations 9 to 19 (appendix C): every head's query and key from narrow vectors, a rotated part beside them."""
    c = config(**LATENT, q_lora_rank=narrow, normalization="RMSNorm", add_bias_linear=has_bias, rotary_interleaved=True)
    layer = filled(build_attention(c, 1))
    assert isinstance(layer, LatentAttention)
    x, n, r, w, rank = x_BSD().numpy(), 6, 4, 5, 7

    def linear(p, t):
        return t @ p.weight.detach().numpy().T + (p.bias.detach().numpy() if has_bias else 0)

    def rms(norm, t):
        return t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * norm.weight.detach().numpy()

    def rotated(t, position):
        z = (t[..., 0::2] + 1j * t[..., 1::2]) * np.exp(1j * position * 10000.0 ** (-np.arange(r // 2) * 2 / r))
        return np.stack([z.real, z.imag], -1).reshape(t.shape)

    for b in range(B):
        q = linear(layer.q_proj, x[b]) if narrow is None else linear(layer.q_up_proj, rms(layer.q_norm, linear(layer.q_down_proj, x[b])))
        down = linear(layer.kv_down_proj, x[b])
        up = linear(layer.kv_up_proj, rms(layer.kv_norm, down[:, :rank])).reshape(S, H, n + w)
        q = q.reshape(S, H, n + r)
        queries = np.stack([np.concatenate([q[i, :, :n], rotated(q[i, :, n:], i)], -1) for i in range(S)])
        keys = np.stack([np.concatenate([up[i, :, :n], np.tile(rotated(down[i, rank:], i), (H, 1))], -1) for i in range(S)])
        expected = linear(layer.out_proj, attended(queries, keys, up[..., n:], (n + r) ** -0.5).reshape(S, -1))
        np.testing.assert_allclose(layer(x_BSD(), context())[b].detach().numpy(), expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- rotary variants


def test_a_part_of_a_head_is_rotated_and_the_rest_stays():
    x = torch.randn(B, H, S, 8, dtype=torch.float64)
    part = build_rotary(config(kv_channels=8, rotary_percent=0.5, **ROPE), 8)
    y = part(x, torch.arange(S).expand(B, S))
    torch.testing.assert_close(y[..., :4], Rotary(4, 1e4)(x[..., :4], torch.arange(S).expand(B, S)), **EXACT)
    assert torch.equal(y[..., 4:], x[..., 4:])


def test_neighbouring_pairs_give_the_scores_of_half_width_pairs_of_permuted_channels():
    x, positions = torch.randn(B, H, S, 8, dtype=torch.float64), torch.randint(0, 50, (B, S))
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    y = Rotary(8, 1e4, is_interleaved=True)(x, positions)
    torch.testing.assert_close(y[..., order], Rotary(8, 1e4)(x[..., order], positions), **EXACT)


def frequencies(**changes):
    rotary = build_rotary(config(kv_channels=16, **ROPE, **changes), 16)
    return rotary.frequencies(torch.device("cpu"), torch.float64), rotary.factor


def test_scaled_frequencies_equal_their_definitions():
    plain, _ = frequencies()
    torch.testing.assert_close(frequencies(rope_scaling_type="linear", rope_scaling_factor=4.0)[0], plain / 4, **EXACT)
    llama, _ = frequencies(rope_scaling_type="llama3", rope_scaling_factor=8.0, rope_original_max_position_embeddings=256)
    for got, f in zip(llama.tolist(), plain.tolist()):  # by wavelength, as Meta's code says it
        wave, ratio = 2 * math.pi / f, 256 * f / (2 * math.pi)
        smooth = (ratio - 1) / 3
        want = f if wave < 256 / 4 else f / 8 if wave > 256 else (1 - smooth) * f / 8 + smooth * f
        assert got == pytest.approx(want, rel=1e-12)
    yarn, factor = frequencies(rope_scaling_type="yarn", rope_scaling_factor=8.0, rope_original_max_position_embeddings=256)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    turns = [256 * f / (2 * math.pi) for f in plain.tolist()]
    for got, f, t in zip(yarn.tolist(), plain.tolist(), turns):
        assert f / 8 * (1 - 1e-12) <= got <= f * (1 + 1e-12)
        if t < 0.3:
            assert got == pytest.approx(f / 8)
    assert yarn[0] == plain[0]


def test_mscale_of_all_channels_goes_into_the_scale_of_the_scores():
    yarn = {"rope_scaling_type": "yarn", "rope_scaling_factor": 40.0, "rope_mscale": 0.7, "rope_mscale_all_dim": 0.7}
    c = config(**LATENT, **yarn)
    assert build_rotary(c, 4).factor == 1
    assert softmax_scale(c) == pytest.approx(10**-0.5 * (0.07 * math.log(40) + 1) ** 2)
    assert build_attention(c, 1).core.scale == softmax_scale(c)
    assert softmax_scale(config(**LATENT)) is None


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 3, "window_attn_skip_freq": (1, 0)}, "a 0 or 1 for each of the 4 layers, not 1 0"),
        ({"window_size": 3, "window_attn_skip_freq": (1, 0, 2, 1)}, "a 0 or 1 for each of the 4 layers"),
        ({"window_size": 3, "window_attn_skip_freq": 0}, "must be at least 1"),
        ({**ROPE, "rotary_percent": 0.5}, r"not 6 x --rotary-percent \(0.5\) = 3"),
        ({"rope_scaling_type": "yarn"}, "add --position-embedding-type rope"),
        ({**ROPE, "rope_scaling_type": "llama3", "rope_low_freq_factor": 4.0}, "must be less than --rope-high-freq-factor"),
        ({**ROPE, "rope_scaling_type": "yarn", "rope_beta_slow": 40.0}, "must be less than --rope-beta-fast"),
        ({**LATENT, "num_key_value_heads": 2}, "--num-key-value-heads has no meaning with --multi-latent-attention"),
        ({**LATENT, "qk_layernorm": True}, "--qk-layernorm has no meaning"),
        ({**LATENT, "qk_pos_emb_head_dim": 5}, "even number of channels, not 5"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_first_layers_are_dense_and_the_interval_goes_on_counting():
    assert MoEConfig(num_experts=(4,), expert_interval=1, moe_first_k_dense_replace=2).experts_per_layer(5) == (1, 1, 4, 4, 4)
    assert MoEConfig(num_experts=(4, 8), moe_first_k_dense_replace=3).experts_per_layer(7) == (1, 1, 1, 4, 1, 8, 1)
    with pytest.raises(ValueError, match="--moe-first-k-dense-replace 6 make 0 MoE layers"):
        MoEConfig(num_experts=(4,), moe_first_k_dense_replace=6).experts_per_layer(6)
