"""Which experts each token goes to, with what weight, and who is left out when an expert is full.

Pure functions over logits; DeepSpeed-MoE's gating (reference: deepspeed.moe.sharded_moe, arXiv 2201.05596 section 4.1),
written as one k-general path:

  k = 1   expert = argmax; weight = its raw probability (renormalised it would be 1 and the router would learn nothing)
  k = 2   first = argmax, second = next best (in training drawn with Gumbel noise); weights renormalised over survivors
  k >= 3  the k best; weights renormalised over survivors

Worked example, k = 1, capacity 2: ids [0, 0, 1, 0] by position -> [0, 0, 1, -1]; -1 is a dropped assignment, and the
token passes the layer by its residual connection alone.
"""
# T tokens, E experts, K experts per token, A assignments (T*K)

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DropOrder = Literal["random", "position", "probs"]


@dataclass
class Routing:
    """What the gate decided for the tokens here."""

    ids_TK: Tensor  # int64; -1: dropped
    weights_TK: Tensor  # float; 0 where dropped
    counts_E: Tensor  # int64, before dropping
    measured: Tensor  # for the statistics: moe.metrics.measure


def expert_capacity(num_tokens: int, num_experts: int, factor: float, k: int, min_capacity: int) -> int:
    """max(ceil(tokens / experts * factor * k), min_capacity), exact: no float rounds an integer up.

    Example: 1024 tokens, 16 experts, factor 1.25, k 1 -> 80. (DeepSpeed computes in float32 and may be one higher.)
    """
    exact = Fraction(num_tokens, num_experts) * Fraction(str(factor)) * k
    return max(-(-exact.numerator // exact.denominator), min_capacity)


def choose_experts(logits_TE: Tensor, k: int, noise_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """probs_TE and ids_TK, best first. `noise_TE` (Gumbel) samples the expert of k=1 (RSample) or the second of k=2."""
    probs_TE = F.softmax(logits_TE, dim=-1)
    if noise_TE is None:
        return probs_TE, _best(probs_TE.detach(), k)
    noisy_TE = logits_TE.detach() + noise_TE
    if k == 1:
        return probs_TE, noisy_TE.argmax(-1, keepdim=True)
    assert k == 2, f"Gumbel sampling is defined for k = 1 and k = 2, not {k}"
    first_T1 = probs_TE.argmax(-1, keepdim=True)
    second_T1 = noisy_TE.scatter(1, first_T1, float("-inf")).argmax(-1, keepdim=True)
    return probs_TE, torch.cat([first_T1, second_T1], dim=1)


def _best(probs_TE: Tensor, k: int) -> Tensor:
    """ids_TK of the k largest, best first, the lower expert first at ties. (topk leaves the order of ties open.)"""
    columns = []
    for _ in range(k):
        columns.append(probs_TE.argmax(-1, keepdim=True))
        probs_TE = probs_TE.scatter(1, columns[-1], -1.0)
    return torch.cat(columns, dim=1)


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


def combine_weights(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Gate weights [T, K]: raw probability for k = 1, else renormalised over the surviving choices; 0 where dropped."""
    kept_TK = ids_TK >= 0
    weights_TK = probs_TE.gather(1, ids_TK.clamp_min(0)) * kept_TK
    if ids_TK.shape[1] == 1:
        return weights_TK
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).eps)


def count_assignments(ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: assignments per expert; dropped ones (-1) are not counted."""
    ids_A = ids_TK.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_A.device)
    return counts.scatter_add_(0, ids_A + 1, torch.ones_like(ids_A))[1:]
