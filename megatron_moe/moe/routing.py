"""What follows a choice of experts, whoever made it: who is left out when an expert is full, and with what weight the others count.

DeepSpeed-MoE's rules (reference: deepspeed.moe.sharded_moe, arXiv 2201.05596 section 4.1): capacity is per source rank and
micro-batch, and gate weights are shares of what survived.

Worked example, k = 1, capacity 2: ids [0, 0, 1, 0] by position -> [0, 0, 1, -1]; -1 is a dropped assignment, and the
token passes the layer by its residual connection alone.
"""
# T tokens, E experts, K experts per token, A assignments (T*K)

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

DropOrder = Literal["random", "position", "probs"]


@dataclass
class Routing:
    """What the gate decided for the tokens here."""

    ids_TK: Tensor  # int64; -1: dropped
    weights_TK: Tensor  # float; 0 where dropped
    counts_E: Tensor  # int64, before dropping
    measured: Tensor | None  # for the statistics: moe.metrics.measure; None where nobody asks for them
    batch_counts_E: Tensor | None = None  # for the global-batch loss: moe.losses
    # sum over the tokens here of the balance loss of the micro-batch, with its gradient, where it was not attached to the scores
    balance: Tensor | None = None


def expert_capacity(num_tokens: int, num_experts: int, factor: float, k: int, min_capacity: int) -> int:
    """max(ceil(tokens / experts * factor * k), min_capacity), exact: no float rounds an integer up.

    Example: 1024 tokens, 16 experts, factor 1.25, k 1 -> 80. (DeepSpeed computes in float32 and may be one higher.)
    """
    exact = Fraction(num_tokens, num_experts) * Fraction(str(factor)) * k
    return max(-(-exact.numerator // exact.denominator), min_capacity)


def drop_over_capacity(ids_TK: Tensor, capacity: int, order: DropOrder, priority_TK: Tensor | None = None) -> Tensor:
    """ids_TK with -1 where the expert was already full.

    position: tokens in order; with k = 2 every second choice queues behind all first choices (as DeepSpeed).
    random, probs: the highest `priority_TK` of each expert survive (uniform draws, or gate probabilities).
    """
    num_tokens, k = ids_TK.shape
    choice_major = k == 2 and order == "position"
    ids_A = (ids_TK.t() if choice_major else ids_TK).reshape(-1)
    if order == "position":
        by_priority_A = torch.arange(ids_A.numel(), device=ids_A.device)
    else:
        assert priority_TK is not None, f"order {order} needs priorities"
        by_priority_A = priority_TK.detach().reshape(-1).argsort(descending=True, stable=True)
    queue_A = by_priority_A[ids_A[by_priority_A].argsort(stable=True)]  # expert after expert, each in order of priority
    sorted_ids_A = ids_A[queue_A]
    first_A = torch.searchsorted(sorted_ids_A, sorted_ids_A)  # where this expert's queue begins
    place_A = torch.arange(ids_A.numel(), device=ids_A.device) - first_A
    kept_A = ids_A.clone()
    kept_A[queue_A] = torch.where(place_A < capacity, sorted_ids_A, -1)
    return kept_A.reshape(k, num_tokens).t() if choice_major else kept_A.reshape(num_tokens, k)


def combine_weights(scores_TE: Tensor, chosen_TK: Tensor, kept_TK: Tensor, normalize: str = "none", scale: float = 1.0) -> Tensor:
    """Gate weights [T, K], 0 where dropped. `kept_TK` is `chosen_TK` with -1 for what was dropped.

    none: the raw scores; chosen: over their sum before dropping; survivors: over their sum after it.
    """
    all_TK = scores_TE.gather(1, chosen_TK.clamp_min(0)) * (chosen_TK >= 0)
    weights_TK = all_TK if kept_TK is chosen_TK else all_TK * (kept_TK >= 0)
    if normalize != "none":
        total_T1 = (all_TK if normalize == "chosen" else weights_TK).sum(-1, keepdim=True)
        weights_TK = weights_TK / total_T1.clamp_min(torch.finfo(weights_TK.dtype).eps)
    return weights_TK if scale == 1.0 else weights_TK * scale


def count_assignments(ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: assignments per expert; dropped ones (-1) are not counted."""
    ids_A = ids_TK.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_A.device)
    return counts.scatter_add_(0, ids_A + 1, torch.ones_like(ids_A))[1:]
