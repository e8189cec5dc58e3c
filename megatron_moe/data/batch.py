"""Samples -> one micro-batch of tensors."""

# B samples, S tokens each

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch. A tuple, so that pinning memory and worker processes know how to carry it."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, the token that follows
    loss_mask: Tensor  # [B, S] float32, 0 where the prediction is not counted
    position_ids: Tensor  # [B, S] int64
    segment_ids: Tensor | None  # [B, S] int64, document number within the sample: attention stays inside one; None: no limit
    sample_ids: Tensor  # [B] int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(t if t is None else t.to(device, non_blocking=non_blocking) for t in self))

    def shortened(self, length: int) -> Batch:
        """The first `length` tokens of each sequence: the rest is not trained on."""
        if length == self.tokens.shape[1]:
            return self
        return Batch(*(t if t is None or t.ndim == 1 else t[:, :length].contiguous() for t in self))


def make_batch(
    items: Sequence[dict],
    eod: int,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
) -> Batch:
    """Stack items {"text": int64[S + 1], "sample_id": int} and mark documents by their end-of-document token.

    The EOD itself belongs to the document it ends; a new document begins with the token after it:

        tokens        7 8 E 9 E 6
        positions     0 1 2 0 1 0     with reset_position_ids
        segments      0 0 0 1 1 2     with reset_attention_mask
        loss mask     1 1 0 1 0 1     with eod_mask_loss: what follows an EOD is not predictable
    """
    text = torch.from_numpy(np.stack([item["text"] for item in items]))
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    is_eod = tokens == eod
    begins = torch.zeros_like(is_eod)
    begins[:, 1:] = is_eod[:, :-1]
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=(~is_eod).float() if eod_mask_loss else torch.ones(tokens.shape),
        position_ids=_positions(begins if reset_position_ids else torch.zeros_like(begins)),
        segment_ids=begins.long().cumsum(1) if reset_attention_mask else None,
        sample_ids=torch.tensor([item["sample_id"] for item in items], dtype=torch.int64),
    )


def _positions(begins: Tensor) -> Tensor:
    """Distance to the last place where a document begins. [B, S] bool -> [B, S] int64."""
    places = torch.arange(begins.shape[1]).expand(begins.shape)
    last_begin = torch.where(begins, places, 0).cummax(dim=1).values
    return places - last_begin
