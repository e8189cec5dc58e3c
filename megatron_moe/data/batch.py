"""Samples -> one micro-batch of tensors."""

# B samples, S tokens each, M predictions from each of them

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch. A tuple, so that pinning memory and worker processes know how to carry it."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, the token that follows; from `look_ahead` [B, M, S]
    loss_mask: Tensor  # float32, as the labels, 0 where the prediction is not counted
    position_ids: Tensor  # [B, S] int64; not to be written to
    segment_ids: Tensor | None  # [B, S] int64, document number within the sample: attention stays inside one; None: no limit
    sample_ids: Tensor  # [B] int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(t if t is None else t.to(device, non_blocking=non_blocking) for t in self))

    def shortened(self, length: int) -> Batch:
        """The first `length` tokens of each sequence: the rest is not trained on."""
        if length == self.tokens.shape[1]:
            return self
        return Batch(*(t if t is None or t.ndim == 1 else t[:, :length].contiguous() for t in self))


class Samples(NamedTuple):
    """Several samples as they were read."""

    text: np.ndarray  # [B, S + 1], any integers
    sample_ids: Sequence[int]  # B of them


def make_batch(
    items: Sequence[dict] | Samples,
    eod: int,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
) -> Batch:
    """Stack samples, or items {"text": int64[S + 1], "sample_id": int}, and mark documents by their end-of-document token.

    The EOD itself belongs to the document it ends; a new document begins with the token after it:

        tokens        7 8 E 9 E 6
        positions     0 1 2 0 1 0     with reset_position_ids
        segments      0 0 0 1 1 2     with reset_attention_mask
        loss mask     1 1 0 1 0 1     with eod_mask_loss: what follows an EOD is not predictable
    """
    if not isinstance(items, Samples):
        items = Samples(np.stack([item["text"] for item in items]), [item["sample_id"] for item in items])
    # Each is one pass from the dtype of the data; contiguous, since slices of one array would not be.
    tokens, labels = (torch.from_numpy(_int64(part)) for part in (items.text[:, :-1], items.text[:, 1:]))
    begins = None
    if reset_position_ids or reset_attention_mask:
        begins = torch.zeros(tokens.shape, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == eod
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=(tokens != eod).float() if eod_mask_loss else torch.ones(tokens.shape, dtype=torch.float32),
        position_ids=_positions(begins) if reset_position_ids else _plain_positions(*tokens.shape),
        segment_ids=begins.long().cumsum(1) if reset_attention_mask else None,
        sample_ids=torch.from_numpy(np.array(items.sample_ids, np.int64)),  # a third of the time of torch.tensor
    )


def _int64(part: np.ndarray) -> np.ndarray:
    """A contiguous copy. `astype` takes half as long again of a slice."""
    copy = np.empty(part.shape, np.int64)
    copy[...] = part
    return copy


@functools.lru_cache(maxsize=8)
def _plain_positions(samples: int, length: int) -> Tensor:
    """0, 1, 2, ... for each sample. Shared by the batches: making it anew took a third of a batch's time. Nobody writes into it."""
    return torch.arange(length).repeat(samples, 1)


def look_ahead(batch: Batch, depths: int) -> Batch:
    """With `depths` further labels and their masks, for multi-token prediction: both [B, M, S], M = 1 + depths. Of whole sequences,
    before anything cuts them: what lies ahead of a part of one is in another part.

    A further label counts where the prediction of that token does by itself, and where all tokens between are of the same document,
    as far as positions or segments tell documents apart:

        tokens           a b E c d     and e
        labels [0]       b E c d e     mask 1 1 1 1 1
        labels [1]       E c d e 0     mask 1 1 0 1 0     with documents, b ... c: the token read on the way, E, still is of b's
        labels [2]       c d e 0 0     mask 1 0 0 0 0     b would be read on to c
    """
    labels, masks = [batch.labels], [batch.loss_mask]
    for n in range(1, depths + 1):
        is_known = _moved(batch.position_ids, n) - batch.position_ids == n
        if batch.segment_ids is not None:
            is_known &= _moved(batch.segment_ids, n) == batch.segment_ids
        labels.append(_moved(batch.labels, n))
        masks.append(_moved(batch.loss_mask, n) * is_known)
    return batch._replace(labels=torch.stack(labels, dim=1), loss_mask=torch.stack(masks, dim=1))


def _moved(x_BS: Tensor, places: int) -> Tensor:
    """By so many places to the left; zeros come in."""
    return torch.nn.functional.pad(x_BS[:, places:], (0, min(places, x_BS.shape[1])))


def _positions(begins: Tensor) -> Tensor:
    """Distance to the last place where a document begins. [B, S] bool -> [B, S] int64."""
    places = torch.arange(begins.shape[1]).expand(begins.shape)
    last_begin = torch.where(begins, places, 0).cummax(dim=1).values
    return places - last_begin
