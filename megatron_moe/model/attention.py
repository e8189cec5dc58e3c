"""Causal self-attention with grouped queries."""
# B batch, S sequence, D hidden, H query heads (those here, under tensor parallelism), G key/value heads, h head width

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.linear import Linear
from megatron_moe.model.core import CausalCore, Context
from megatron_moe.model.latent_attention import LatentAttention
from megatron_moe.model.norm import build_norm
from megatron_moe.model.rope import build_rotary, softmax_scale
from megatron_moe.utils.dtensor import local_weight


class Attention(nn.Module):
    """softmax(q k^T / sqrt(h)) v over the tokens before; biases, norms of q and k, rotary positions, window and sinks by configuration.

    Norms of q and k (Henry et al., arXiv 2010.04245) work on each head with one weight for all (Qwen3), or on all heads together (OLMoE).
    """

    def __init__(self, config: ModelConfig, layer: int = 1):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.key_value_heads * self.head_dim
        has_bias = config.add_bias_linear or config.add_qkv_bias
        self.q_proj = Linear(D, q_width, bias=has_bias)
        self.k_proj = Linear(D, kv_width, bias=has_bias)
        self.v_proj = Linear(D, kv_width, bias=has_bias)
        self.out_proj = Linear(q_width, D, bias=config.add_bias_linear)
        self.norms_heads = config.qk_layernorm and config.qk_layernorm_scope == "head"
        self.norms_all = config.qk_layernorm and config.qk_layernorm_scope == "hidden"
        widths = (self.head_dim,) * 2 if self.norms_heads else (q_width, kv_width)
        self.q_norm, self.k_norm = (build_norm(config, width) if config.qk_layernorm else None for width in widths)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.softmax_type == "learnable" else None
        self.rotary = build_rotary(config, self.head_dim)
        self.core = CausalCore(config.attention_dropout, softmax_scale(config), config.window_of(layer))

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        q, k, v = (p(x_BSD) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.norms_all:
            q, k = self.q_norm(q), self.k_norm(k)
        # -1, not the number of heads: under tensor parallelism a projection yields this rank's heads only
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = (self.rotary(t, context.positions_BS) for t in (q, k))
        sinks = () if self.sinks is None else (local_weight(self.sinks),)
        y_BHSh = self.core(q, k, v, context, *sinks)
        return self.out_proj(y_BHSh.transpose(1, 2).flatten(2))


def build_attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    return (LatentAttention if config.multi_latent_attention else Attention)(config, layer)
