"""Multi-head latent attention: keys and values of all heads come out of one narrow vector per token (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A head's query and key have a part without position and a part with: the latter is rotated, and of the keys it is one for all heads.
Queries may pass a narrow vector of their own. Both narrow vectors are normalised before they are widened.
"""
# B batch, S sequence, D hidden, H heads (those here), L narrow width, n head width without position, r with, w of values

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.linear import Linear
from megatron_moe.model.core import CausalCore, Context
from megatron_moe.model.norm import build_norm
from megatron_moe.model.rope import build_rotary, softmax_scale
from megatron_moe.utils.dtensor import local_weight


class LatentAttention(nn.Module):
    """q = [q_n, rotated q_r] and k = [k_n, rotated k_r] of width n + r; v of width w."""

    def __init__(self, config: ModelConfig, layer: int = 1):
        super().__init__()
        D, H, bias = config.hidden_size, config.num_attention_heads, config.add_bias_linear
        self.n, self.r, self.w, self.L = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim, config.kv_lora_rank
        q_width, narrow = H * (self.n + self.r), config.q_lora_rank
        self.q_proj = Linear(D, q_width, bias=bias) if narrow is None else None
        self.q_down_proj = Linear(D, narrow, bias=bias) if narrow else None
        self.q_norm = build_norm(config, narrow) if narrow else None
        self.q_up_proj = Linear(narrow, q_width, bias=bias) if narrow else None
        self.kv_down_proj = Linear(D, self.L + self.r, bias=bias)
        self.kv_norm = build_norm(config, self.L)
        self.kv_up_proj = Linear(self.L, H * (self.n + self.w), bias=bias)
        self.out_proj = Linear(H * self.w, D, bias=bias)
        self.sinks = nn.Parameter(torch.empty(H)) if config.softmax_type == "learnable" else None
        self.rotary = build_rotary(config, self.r)
        self.core = CausalCore(config.attention_dropout, softmax_scale(config), config.window_of(layer))

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        q = self.q_up_proj(self.q_norm(self.q_down_proj(x_BSD))) if self.q_proj is None else self.q_proj(x_BSD)
        q_n, q_r = q.unflatten(-1, (-1, self.n + self.r)).transpose(1, 2).split([self.n, self.r], -1)
        narrow_BSL, k_r = self.kv_down_proj(x_BSD).split([self.L, self.r], -1)
        kv = self.kv_up_proj(self.kv_norm(narrow_BSL)).unflatten(-1, (-1, self.n + self.w)).transpose(1, 2)
        k_n, v_BHSw = kv.split([self.n, self.w], -1)
        k_r = k_r[:, None]  # one for all heads
        if self.rotary is not None:
            q_r, k_r = (self.rotary(t, context.positions_BS) for t in (q_r, k_r))
        q_BHSh, k_BHSh = torch.cat([q_n, q_r], -1), torch.cat([k_n, k_r.expand(-1, k_n.shape[1], -1, -1)], -1)
        sinks = () if self.sinks is None else (local_weight(self.sinks),)
        y_BHSw = self.core(q_BHSh, k_BHSh, v_BHSw, context, *sinks)
        return self.out_proj(y_BHSw.transpose(1, 2).flatten(2))
