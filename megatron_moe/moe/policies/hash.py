"""Hash routing: the word decides (Roller et al., arXiv 2106.04426, random balanced hashes).

Every word of the vocabulary has k fixed, different experts; each expert has as many words as any other. There is nothing to learn
for the router: weights are 1/k, the gradient of its matrix is exactly zero (not None: ranks sum it), weight decay shrinks it.
"""
# T tokens, E experts, K experts per token

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, assignment_key, dealt
from megatron_moe.moe.tokens import TokenInfo


class Hash:
    """The same assignment in training and evaluation, another one in every layer."""

    keeps_capacity = False

    def __init__(self, config: MoEConfig):
        self.k, self.seed = config.topk, config.moe_router_hash_seed

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        if tokens.ids_T is None:
            raise ValueError("--moe-router-policy hash routes by token ids, and this layer was given none; hand it TokenInfo(ids_T=...)")
        ids_TK = dealt(tokens.ids_T, assignment_key(tokens, self.seed, logits_TE.device), logits_TE.shape[1], self.k)
        nothing = logits_TE.nan_to_num(0.0, 0.0, 0.0) * 0  # ties the router to the loss, with the gradient zero
        scores_TE = nothing.scatter_add(1, ids_TK, torch.full_like(ids_TK, 1 / self.k, dtype=nothing.dtype))
        return Choice(ids_TK, scores_TE, scores_TE)
