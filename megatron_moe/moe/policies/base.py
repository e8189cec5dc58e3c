"""What a routing policy is given, and what it answers."""
# T tokens, E experts, K experts per token

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_moe.kernels.softmax import softmax_with_logsumexp
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import Purpose, mix, uniform


@dataclass
class Choice:
    """The answer. Only scores and probabilities carry a gradient."""

    ids_TK: Tensor  # int64, best first; -1: no expert
    scores_TE: Tensor  # gate weights are taken from here
    probs_TE: Tensor  # the same as shares of a token that add up to 1: what balance losses and entropy are about
    logsumexp_T: Tensor | None = None  # of the logits, with its gradient, where it was at hand
    first_choices_only: bool = False  # whether the balance loss counts ids_TK[:, :1] alone

    @property
    def balance_ids_TK(self) -> Tensor:
        return self.ids_TK[:, :1] if self.first_choices_only else self.ids_TK


class Scored(NamedTuple):
    """What a policy passes on to its Choice, behind the ids."""

    scores_TE: Tensor
    probs_TE: Tensor
    logsumexp_T: Tensor | None


class Policy(Protocol):
    """Differentiable where it may be, without host syncs, and traceable by torch.compile."""

    # Whether experts choose, in training: none takes more rows than the capacity that is handed in, so there always is one and
    # nothing is dropped afterwards. In evaluation such a policy is dropless.
    keeps_capacity: bool

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        """logits float32 or wider; `tokens.keys_T` are the layer's keys, None where nothing may be drawn (evaluation); `bias_E`
        is added to scores when they are compared (--moe-router-enable-expert-bias)."""
        ...


def scored(logits_TE: Tensor, function: str) -> Scored:
    """softmax: both are the probabilities; sigmoid: each expert's own score, and the scores over their sum."""
    if function == "softmax":
        probs_TE, logsumexp_T = softmax_with_logsumexp(logits_TE)
        return Scored(probs_TE, probs_TE, logsumexp_T)
    scores_TE = torch.sigmoid(logits_TE)
    return Scored(scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny), None)


def best(ranks_TE: Tensor, k: int) -> Tensor:
    """ids_TK of the k largest of each row, best first, the lower expert first at ties. (topk leaves the order of ties open.)"""
    ranks_TE, columns = ranks_TE.detach(), [ranks_TE.argmax(-1, keepdim=True)]
    while len(columns) < k:
        ranks_TE = ranks_TE.scatter(1, columns[-1], float("-inf"))
        columns.append(ranks_TE.argmax(-1, keepdim=True))
    return torch.cat(columns, dim=1)


def assignment_key(tokens: TokenInfo, seed: int, device: torch.device) -> Tensor:
    """int64 scalar that differs between seeds and layers, for assignments that do not change from step to step."""
    layer_key = tokens.layer_key if tokens.layer_key is not None else torch.zeros((), dtype=torch.int64, device=device)
    return mix(layer_key ^ seed)


def dealt(number_N: Tensor, key: Tensor, num_experts: int, k: int) -> Tensor:
    """ids_NK: numbers 0, 1, 2, ... are dealt to experts as cards are. Each E numbers in a row take all experts, once per choice, in
    an order that is drawn for them: so of any N numbers from 0 on, no expert gets more than one above another."""
    draws_NE = uniform(mix(number_N // num_experts ^ key), Purpose.ASSIGNMENT, num_experts)
    order_NE = draws_NE.argsort(dim=1, stable=True)
    place_NK = number_N[:, None] + torch.arange(k, device=number_N.device)
    return order_NE.gather(1, place_NK % num_experts)
