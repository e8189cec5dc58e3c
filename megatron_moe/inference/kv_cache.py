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
# B batch, S tokens of this call, L slots in use, H query heads, G key/value heads, h head width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.attention import Context
from megatron_moe.model.gpt import GPT


class CachedCore:
    """`CausalCore` for one layer of a text that arrives in pieces.

    The first call fixes the batch. Keys and values are kept once per key/value head, not per query head.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0  # tokens of the longest row
        self.k_BLGh: Tensor | None = None
        self.v_BLGh: Tensor | None = None

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSh: Tensor, context: Context) -> Tensor:
        assert context.segments_BS is None and context.keys_BS is None, "a cache has no documents and no dropout"
        self._store(k_BGSh, v_BGSh, context.positions_BS)
        slot_L = torch.arange(self.length, device=q_BHSh.device)
        seen_B1SL = slot_L <= context.positions_BS[:, None, :, None]
        k_BGLh, v_BGLh = (t[:, : self.length].transpose(1, 2) for t in (self.k_BLGh, self.v_BLGh))
        is_grouped = k_BGLh.shape[1] < q_BHSh.shape[1]
        return F.scaled_dot_product_attention(q_BHSh, k_BGLh, v_BGLh, attn_mask=seen_B1SL, enable_gqa=is_grouped)

    def _store(self, k_BGSh: Tensor, v_BGSh: Tensor, positions_BS: Tensor) -> None:
        k_BSGh, v_BSGh = k_BGSh.transpose(1, 2), v_BGSh.transpose(1, 2)
        B, S, G, h = k_BSGh.shape
        if self.k_BLGh is None:
            # zeros: a slot that no token has taken yet is multiplied by probability 0, and 0 x NaN would be NaN
            self.k_BLGh, self.v_BLGh = (t.new_zeros(B, self.max_length, G, h) for t in (k_BSGh, v_BSGh))
        self.length += S
        assert self.length <= self.max_length, f"{self.length} tokens in a cache of {self.max_length}"
        row_B1 = torch.arange(B, device=positions_BS.device)[:, None]
        self.k_BLGh[row_B1, positions_BS] = k_BSGh
        self.v_BLGh[row_B1, positions_BS] = v_BSGh


@contextmanager
def cached_attention(model: GPT, max_length: int) -> Iterator[None]:
    """Inside, each call of `model` gives it the next tokens only; an empty cache at the start, the plain cores back at the end.

    `max_length` counts prompt (the longest, as padded) and new tokens.
    """
    attentions = [block.attn for block in model.layers.values()]
    plain = [attention.core for attention in attentions]
    try:
        for attention in attentions:
            attention.core = CachedCore(max_length)
        yield
    finally:
        for attention, core in zip(attentions, plain):
            attention.core = core
