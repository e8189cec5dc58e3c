"""How queries meet keys, and what is known about the tokens: the part of attention that parallelism and generation swap."""
# B batch, S sequence, H query heads (those here, under tensor parallelism), G key/value heads, h head width of q and k, w of v

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.kernels.causal_attention import causal_attention, is_faster
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
    """All keys are here. `scale` multiplies the scores, 1/sqrt(h) if not given; `window`: a token sees itself and the window - 1 before it.

    `sinks_H` of a call are one logit per head that takes part in the softmax and has no value (attention sinks, gpt-oss). Context
    parallelism and generation put other cores of the same dropout, scale and window in the place of this one.
    """

    def __init__(self, dropout: float, scale: float | None = None, window: int | None = None):
        self.dropout, self.scale, self.window, self.first_head = dropout, scale, window, 0

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, context: Context, sinks_H: Tensor | None = None) -> Tensor:
        length = k_BGSh.shape[2]
        sees_all = context.segments_BS is None and (self.window is None or self.window >= length)
        is_plain = sees_all and sinks_H is None and not self.draws(context)
        if is_plain and is_faster(q_BHSh, k_BGSh, v_BGSw):
            return causal_attention(q_BHSh, k_BGSh, v_BGSw, self.scale)
        k_BHSh, v_BHSw = (repeat_heads(t, q_BHSh.shape[1]) for t in (k_BGSh, v_BGSw))
        if is_plain:
            return F.scaled_dot_product_attention(q_BHSh, k_BHSh, v_BHSw, is_causal=True, scale=self.scale)
        return self.masked(q_BHSh, k_BHSh, v_BHSw, visible(context, window=self.window), context.keys_BS, length, sinks_H)

    def draws(self, context: Context) -> bool:
        return bool(self.dropout) and context.keys_BS is not None

    def masked(self, q_BHqh: Tensor, k_BHkh: Tensor, v_BHkw: Tensor, mask: Tensor, keys_Bq: Tensor | None, length: int,
               sinks_H: Tensor | None = None) -> Tensor:  # fmt: skip
        """Of q queries and the first k tokens of a sequence of `length`: draws are numbered by the token that is looked at."""
        heads, keys = q_BHqh.shape[1], k_BHkh.shape[2]
        scale = q_BHqh.shape[-1] ** -0.5 if self.scale is None else self.scale
        if sinks_H is not None:
            q_BHqh, k_BHkh, v_BHkw, mask = beside_sinks(q_BHqh, k_BHkh, v_BHkw, mask, sinks_H / scale)
        if not self.dropout or keys_Bq is None:
            return F.scaled_dot_product_attention(q_BHqh, k_BHkh, v_BHkw, attn_mask=mask, scale=scale)
        # the explicit product: fused kernels draw their own numbers, which would differ between layouts
        scores = q_BHqh @ k_BHkh.transpose(-1, -2) * scale
        wide = torch.promote_types(scores.dtype, torch.float32)
        probs_BHqk = scores.to(wide).masked_fill(~mask, float("-inf")).softmax(-1)
        draws = uniform(keys_Bq, Purpose.ATTENTION_DROPOUT, heads * length, self.first_head * length)
        keep_BHqk = (draws >= self.dropout).unflatten(-1, (heads, length)).transpose(1, 2)[..., :keys]
        keep_BHqk = F.pad(keep_BHqk, (0, probs_BHqk.shape[-1] - keys), value=True)  # the sink has no value that could be dropped
        return (probs_BHqk * keep_BHqk / (1.0 - self.dropout)).to(v_BHkw.dtype) @ v_BHkw


def beside_sinks(q_BHqh: Tensor, k_BHkh: Tensor, v_BHkw: Tensor, mask: Tensor, logits_H: Tensor) -> tuple[Tensor, ...]:
    """The same with one key more, which every query sees, whose score is `logits_H` (before the scale) and whose value is zero.

    Queries get a column of ones, which meets the logit in that key and zeros in the others: fused kernels need no bias with a gradient.
    Eight columns instead of one keep the width a multiple of eight, which the kernels of a GPU ask for.
    """
    B, H, _, h = k_BHkh.shape
    q = torch.cat([q_BHqh, torch.ones_like(q_BHqh[..., :1]), torch.zeros_like(q_BHqh[..., :1]).expand(-1, -1, -1, 7)], -1)
    sink = F.pad(logits_H.to(k_BHkh.dtype)[None, :, None, None], (h, 7)).expand(B, -1, -1, -1)
    return q, torch.cat([F.pad(k_BHkh, (0, 8)), sink], 2), F.pad(v_BHkw, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=True)


def repeat_heads(t_BGSh: Tensor, heads: int) -> Tensor:
    """A key/value head for every query head: [B, H, S, h]."""
    each = heads // t_BGSh.shape[1]
    return t_BGSh if each == 1 else t_BGSh.repeat_interleave(each, dim=1)


def visible(context: Context, first: int = 0, queries: int | None = None, window: int | None = None) -> Tensor:
    """bool [B, 1, q, k], True where a query may look: not ahead, not into another document, not out of the window.

    Of the queries at the places `first` ... of their sequences, and the keys up to the last of these. All of them if not given."""
    queries = context.positions_BS.shape[1] if queries is None else queries
    end = first + queries
    mask = torch.ones(queries, end, dtype=torch.bool, device=context.positions_BS.device).tril(first)[None, None]
    if window is not None:
        mask = mask.triu(first - window + 1)
    if context.segments_BS is None:
        return mask
    return mask & (context.segments_BS[:, None, first:end, None] == context.segments_BS[:, None, None, :end])
