"""Attention that remembers: keys and values of the tokens so far, for a batch of texts of different lengths.

The slot of a token in the cache is its position. Prompts are padded on the right; a query at position p sees the slots
0 to p of its row, so padding is out of sight until a token of the text takes its slot.

Worked example, prompts `a b c` and `d`, then two steps:

             tokens    positions    cache afterwards
  prefill    a b c     0 1 2        a b c
             d . .     0 1 2        d . .
  step       x         3            a b c x
             e         1            d e .
  step       y         4            a b c x y
             f         2            d e f
"""
# B batch, S tokens of this call, L slots in use, H query heads, G key/value heads, h head width of q and k, w of v

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.core import CausalCore, Context, repeat_heads
from megatron_moe.model.gpt import GPT
from megatron_moe.model.rope import Rotary


class CachedCore(CausalCore):
    """The same for one layer of a text that arrives in pieces.

    The first call fixes the batch. Keys and values are kept once per key/value head, not per query head.
    """

    def __init__(self, max_length: int, scale: float | None = None, window: int | None = None):
        super().__init__(0.0, scale, window)
        self.max_length = max_length
        self.length = 0  # tokens of the longest row
        self.k_BLGh: Tensor | None = None
        self.v_BLGw: Tensor | None = None

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, context: Context, sinks_H: Tensor | None = None) -> Tensor:
        assert context.segments_BS is None and context.keys_BS is None, "a cache has no documents and no dropout"
        self._store(k_BGSh, v_BGSw, context.positions_BS)
        seen_B1SL = self._seen(context.positions_BS, sinks_H is not None)
        k_BGLh, v_BGLw = (t[:, : self.length].transpose(1, 2) for t in (self.k_BLGh, self.v_BLGw))
        heads = q_BHSh.shape[1]
        if sinks_H is not None:
            return self.masked(q_BHSh, repeat_heads(k_BGLh, heads), repeat_heads(v_BGLw, heads), seen_B1SL, None, self.length, sinks_H)
        is_grouped = k_BGLh.shape[1] < heads
        return F.scaled_dot_product_attention(q_BHSh, k_BGLh, v_BGLw, attn_mask=seen_B1SL, enable_gqa=is_grouped, scale=self.scale)

    def _seen(self, positions_BS: Tensor, has_sinks: bool) -> Tensor | None:
        """bool [B, 1, S, L]: slots that a token may look at; None where it is all of them: one token, the newest of the only text."""
        if positions_BS.numel() == 1 and self.window is None and not has_sinks:
            return None
        slot_L, position_B1S1 = torch.arange(self.length, device=positions_BS.device), positions_BS[:, None, :, None]
        seen_B1SL = slot_L <= position_B1S1
        return seen_B1SL if self.window is None else seen_B1SL & (slot_L > position_B1S1 - self.window)

    def _store(self, k_BGSh: Tensor, v_BGSw: Tensor, positions_BS: Tensor) -> None:
        k_BSGh, v_BSGw = k_BGSh.transpose(1, 2), v_BGSw.transpose(1, 2)
        B, S = positions_BS.shape
        if self.k_BLGh is None:
            # zeros: a slot that no token has taken yet is multiplied by probability 0, and 0 x NaN would be NaN
            self.k_BLGh, self.v_BLGw = (t.new_zeros(B, self.max_length, *t.shape[2:]) for t in (k_BSGh, v_BSGw))
        self.length += S
        assert self.length <= self.max_length, f"{self.length} tokens in a cache of {self.max_length}"
        row_B1 = torch.arange(B, device=positions_BS.device)[:, None]
        self.k_BLGh[row_B1, positions_BS] = k_BSGh
        self.v_BLGw[row_B1, positions_BS] = v_BSGw


class SharedRotary:
    """The same turns for all layers, and for queries and keys: they are of the same positions."""

    def __init__(self, rotary: Rotary):
        self.rotary = rotary
        self.known: tuple[Tensor, torch.dtype, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x_BHSh: Tensor, positions_BS: Tensor) -> Tensor:
        wide = torch.promote_types(x_BHSh.dtype, torch.float32)
        if self.known is None or self.known[0] is not positions_BS or self.known[1] is not wide:
            self.known = positions_BS, wide, self.rotary.turns(positions_BS, wide)
        return self.rotary.turned(x_BHSh, *self.known[2])


@contextmanager
def cached_attention(model: GPT, max_length: int) -> Iterator[None]:
    """Inside, each call of `model` gives it the next tokens only; an empty cache at the start, the plain cores back at the end.

    `max_length` counts prompt (the longest, as padded) and new tokens.
    """
    attentions = [block.attn for block in model.layers.values()]
    plain = [(attention.core, attention.rotary) for attention in attentions]
    shared = {rotary: SharedRotary(rotary) for _, rotary in plain if rotary is not None}  # equal ones are one
    try:
        for attention, (core, rotary) in zip(attentions, plain):
            attention.core = CachedCore(max_length, core.scale, core.window)
            attention.rotary = shared.get(rotary)
        yield
    finally:
        for attention, (core, rotary) in zip(attentions, plain):
            attention.core, attention.rotary = core, rotary
