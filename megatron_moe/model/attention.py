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
    """What a block needs to know about its tokens beside their vectors. All [B, S]; split like the tokens, but for `segments_BS`."""

    positions_BS: Tensor
    segments_BS: Tensor | None = None  # document number of every token of the whole sequences; attention stays within a document
    keys_BS: Tensor | None = None  # sources of dropout and routing noise; None in evaluation
    tokens_BS: Tensor | None = None  # token ids, for hash routing
    places_BS: Tensor | None = None  # int64: where each token stands in the micro-batch; None: all of them are here, in order
    length: int | None = None  # tokens of a whole sequence; None: as many as are here
    stream: Context | None = None  # that of the tokens whose vectors are here between attention and MLP; None: of all of these

    @property
    def of_stream(self) -> Context:
        return self if self.stream is None else self.stream

    def of_layer(self, layer: int) -> Context:
        """With the keys from which the parts of `layer` draw."""
        if self.keys_BS is None:
            return self
        stream = None if self.stream is None else self.stream.of_layer(layer)
        return replace(self, keys_BS=layer_keys(self.keys_BS, layer), stream=stream)

    def token_info(self, batch: int, length: int, most_tokens: int | None) -> TokenInfo:
        """For an MoE layer, which sees the tokens of all sequences in one row."""
        known = (("keys_T", self.keys_BS), ("ids_T", self.tokens_BS), ("places_T", self.places_BS))
        flat = {name: None if v is None else v.flatten() for name, v in known}
        return TokenInfo(**flat, num_sequences=batch, sequence_length=self.length or length, most_tokens=most_tokens)


def all_are_here(context: Context) -> Context:
    """Where the tokens of a model stand that has all of them."""
    return context


class CausalCore:
    """How queries meet keys: all keys are here. Swapped by context parallelism."""

    def __init__(self, dropout: float):
        self.dropout, self.first_head = dropout, 0

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor, context: Context) -> Tensor:
        k_BHSh, v_BHSh = (repeat_heads(t, q_BHSh.shape[1]) for t in (k_BGSh, v_BGSh))
        if context.segments_BS is None and not self.draws(context):
            return F.scaled_dot_product_attention(q_BHSh, k_BHSh, v_BHSh, is_causal=True)
        return self.masked(q_BHSh, k_BHSh, v_BHSh, visible(context), context.keys_BS, k_BHSh.shape[2])

    def draws(self, context: Context) -> bool:
        return bool(self.dropout) and context.keys_BS is not None

    def masked(self, q_BHqh: Tensor, k_BHkh: Tensor, v_BHkh: Tensor, mask: Tensor, keys_Bq: Tensor | None, length: int) -> Tensor:
        """Of q queries and the first k tokens of a sequence of `length`: draws are numbered by the token that is looked at."""
        if not self.dropout or keys_Bq is None:
            return F.scaled_dot_product_attention(q_BHqh, k_BHkh, v_BHkh, attn_mask=mask)
        # the explicit product: fused kernels draw their own numbers, which would differ between layouts
        heads = q_BHqh.shape[1]
        scores = q_BHqh @ k_BHkh.transpose(-1, -2) * q_BHqh.shape[-1] ** -0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs_BHqk = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(-1)
        draws = uniform(keys_Bq, Purpose.ATTENTION_DROPOUT, heads * length, self.first_head * length)
        keep_BHqk = (draws >= self.dropout).unflatten(-1, (heads, length)).transpose(1, 2)[..., : k_BHkh.shape[2]]
        return (probs_BHqk * keep_BHqk / (1.0 - self.dropout)).to(v_BHkh.dtype) @ v_BHkh


def repeat_heads(t_BGSh: Tensor, heads: int) -> Tensor:
    """A key/value head for every query head: [B, H, S, h]."""
    each = heads // t_BGSh.shape[1]
    return t_BGSh if each == 1 else t_BGSh.repeat_interleave(each, dim=1)


def visible(context: Context, first: int = 0, queries: int | None = None) -> Tensor:
    """bool [B, 1, q, k], True where a query may look: not ahead, and not into another document.

    Of the queries at the places `first` ... of their sequences, and the keys up to the last of these. All of them if not given."""
    queries = context.positions_BS.shape[1] if queries is None else queries
    end = first + queries
    mask = torch.ones(queries, end, dtype=torch.bool, device=context.positions_BS.device).tril(first)[None, None]
    if context.segments_BS is None:
        return mask
    return mask & (context.segments_BS[:, None, first:end, None] == context.segments_BS[:, None, None, :end])


class Attention(nn.Module):
    """softmax(q k^T / sqrt(h)) v over the tokens before; biases and rotary positions by configuration."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.rotary_base = config.rotary_base if config.position_embedding_type == "rope" else None
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
        y_BHSh = self.core(q, k, v, context)
        return self.out_proj(y_BHSh.transpose(1, 2).flatten(2))
