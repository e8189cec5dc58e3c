"""What a routing policy is given, and what it answers."""
# T tokens, E experts, K experts per token

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.moe.tokens import TokenInfo


@dataclass
class Choice:
    """The answer. Only scores and probabilities carry a gradient."""

    ids_TK: Tensor  # int64, best first; -1: no expert
    scores_TE: Tensor  # gate weights are taken from here
    probs_TE: Tensor  # the same as shares of a token that add up to 1: what balance losses and entropy are about
    first_choices_only: bool = False  # whether the balance loss counts ids_TK[:, :1] alone

    @property
    def balance_ids_TK(self) -> Tensor:
        return self.ids_TK[:, :1] if self.first_choices_only else self.ids_TK


class Policy(Protocol):
    """Differentiable where it may be, without host syncs, and traceable by torch.compile."""

    # Whether no expert gets more rows than the capacity that was handed in, so that nothing has to be dropped afterwards.
    keeps_capacity: bool

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        """logits float32 or wider; `tokens.keys_T` are the layer's keys, None where nothing may be drawn (evaluation); `bias_E`
        is added to scores when they are compared (--moe-router-enable-expert-bias)."""
        ...


def scores_and_probs(logits_TE: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """softmax: both are the probabilities; sigmoid: each expert's own score, and the scores over their sum."""
    if function == "softmax":
        probs_TE = F.softmax(logits_TE, dim=-1)
        return probs_TE, probs_TE
    scores_TE = torch.sigmoid(logits_TE)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)


def best(ranks_TE: Tensor, k: int) -> Tensor:
    """ids_TK of the k largest of each row, best first, the lower expert first at ties. (topk leaves the order of ties open.)"""
    ranks_TE, columns = ranks_TE.detach(), []
    for _ in range(k):
        columns.append(ranks_TE.argmax(-1, keepdim=True))
        ranks_TE = ranks_TE.scatter(1, columns[-1], float("-inf"))
    return torch.cat(columns, dim=1)
