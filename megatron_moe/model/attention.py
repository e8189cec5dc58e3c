"""Causal self-attention with grouped queries."""
# B batch, S sequence, D hidden, H query heads (those here, under tensor parallelism), G key/value heads, h head width

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.rope import rotate
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import Purpose, layer_keys, uniform


@dataclass
class Context:
    """What a block needs to know about its tokens beside their vectors. All [B, S]; split like the tokens."""

    positions_BS: Tensor
    segments_BS: Tensor | None = None  # document number; tokens attend within their own document
    keys_BS: Tensor | None = None  # sources of dropout and routing noise; None in evaluation
    tokens_BS: Tensor | None = None  # token ids, for hash routing

    def of_layer(self, layer: int) -> Context:
        """With the keys from which the parts of `layer` draw."""
        return self if self.keys_BS is None else replace(self, keys_BS=layer_keys(self.keys_BS, layer))

    def token_info(self, batch: int, length: int, most_tokens: int | None) -> TokenInfo:
        """For an MoE layer, which sees the tokens of all sequences in one row."""
        flat = {n: None if v is None else v.flatten() for n, v in (("keys_T", self.keys_BS), ("ids_T", self.tokens_BS))}
        return TokenInfo(**flat, num_sequences=batch, sequence_length=length, most_tokens=most_tokens)


class CausalCore:
    """How queries meet keys: all keys are here. Swapped by context parallelism."""

    def __init__(self, dropout: float):
        self.dropout, self.first_head = dropout, 0

    def __call__(self, q_BHSh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, context: Context) -> Tensor:
        keys = context.keys_BS if self.dropout else None
        if keys is not None:
            return self._with_dropout(q_BHSh, k_BHSh, v_BHSh, context)
        if context.segments_BS is None:
            return F.scaled_dot_product_attention(q_BHSh, k_BHSh, v_BHSh, is_causal=True)
        return F.scaled_dot_product_attention(q_BHSh, k_BHSh, v_BHSh, attn_mask=visible(context))

    def _with_dropout(self, q_BHSh: Tensor, k_BHSh: Tensor, v_BHSh: Tensor, context: Context) -> Tensor:
        """The explicit product: fused kernels draw their own numbers, which would differ between layouts."""
        heads, length = q_BHSh.shape[1], k_BHSh.shape[2]
        scores = q_BHSh @ k_BHSh.transpose(-1, -2) * q_BHSh.shape[-1] ** -0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs_BHSS = scores.to(wide).masked_fill(~visible(context), float("-inf")).softmax(-1)
        draws = uniform(context.keys_BS, Purpose.ATTENTION_DROPOUT, heads * length, self.first_head * length)
        keep_BHSS = (draws >= self.dropout).unflatten(-1, (heads, length)).transpose(1, 2)
        return (probs_BHSS * keep_BHSS / (1.0 - self.dropout)).to(v_BHSh.dtype) @ v_BHSh


def visible(context: Context) -> Tensor:
    """bool [B, 1, S, S], True where a query may look: not ahead, and not into another document."""
    length = context.positions_BS.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=context.positions_BS.device).tril()[None, None]
    if context.segments_BS is None:
        return mask
    return mask & (context.segments_BS[:, None, :, None] == context.segments_BS[:, None, None, :])


class Attention(nn.Module):
    """softmax(q k^T / sqrt(h)) v over the tokens before; biases and rotary positions by configuration."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.rotary_base = config.rotary_base if config.position_embedding_type == "rope" else None
        self.queries_per_key = config.num_attention_heads // config.key_value_heads
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(D, q_width, bias=config.add_bias_linear)
        self.k_proj = nn.Linear(D, kv_width, bias=config.add_bias_linear)
        self.v_proj = nn.Linear(D, kv_width, bias=config.add_bias_linear)
        self.out_proj = nn.Linear(q_width, D, bias=config.add_bias_linear)
        self.core = CausalCore(config.attention_dropout)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        # -1, not the number of heads: under tensor parallelism a projection yields this rank's heads only
        q, k, v = (p(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary_base is not None:
            q, k = (rotate(t, context.positions_BS, self.rotary_base) for t in (q, k))
        if self.queries_per_key > 1:
            k, v = (t.repeat_interleave(self.queries_per_key, dim=1) for t in (k, v))
        y_BHSh = self.core(q, k, v, context)
        return self.out_proj(y_BHSh.transpose(1, 2).flatten(2))
