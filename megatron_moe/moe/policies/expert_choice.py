"""Expert choice: every expert takes its best tokens, as many as its capacity (Zhou et al., arXiv 2202.09368).

All experts are equally busy and nothing is dropped, but a token may have any number of experts, also none. Its own score is not
enough to know which: later tokens of its sequence, and the other sequences, compete with it. A model that writes one token after
another cannot be asked that way, so in evaluation every token takes its k best experts by the same scores, and none is dropped.
"""
# T tokens, E experts, K experts per token (E of them in training, most of them -1), C capacity

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, best, scored
from megatron_moe.moe.tokens import TokenInfo


class ExpertChoice:
    """Among the tokens of one rank in one micro-batch, as capacity is: under tensor parallelism the rank's slice of them."""

    keeps_capacity = True

    def __init__(self, config: MoEConfig):
        self.config = config

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        scores = scored(logits_TE, self.config.moe_router_score_function)
        if not training:
            return Choice(best(scores.scores_TE, self.config.topk), *scores)
        assert capacity is not None, "experts that choose have a capacity"
        ranks_TE = scores.scores_TE.detach()
        if tokens.used_T is not None:
            ranks_TE = torch.where(tokens.used_T[:, None], ranks_TE, -1.0)  # padding is taken last, and thrown out afterwards
        # stable: of equal scores the earlier token
        taken_CE = ranks_TE.argsort(dim=0, descending=True, stable=True)[:capacity]
        is_taken_TE = torch.zeros_like(ranks_TE, dtype=torch.bool).scatter(0, taken_CE, True)
        expert_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
        return Choice(torch.where(is_taken_TE, expert_E, -1), *scores)
