"""Assignments that no router made, for benchmarks: experts are as busy as one wants, weights and gradients are those of the gate."""
# T tokens, E experts, K experts per token

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, assignment_key, best, dealt, scored
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import Purpose, gumbel, mix


class Balanced:
    """Tokens are dealt to experts by their place in the micro-batch: the same at every step, also in evaluation."""

    keeps_capacity = False

    def __init__(self, config: MoEConfig):
        self.config = config

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        scores = scored(logits_TE, self.config.moe_router_score_function)
        key = assignment_key(tokens, 0, logits_TE.device)
        return Choice(dealt(tokens.places(logits_TE), key, logits_TE.shape[1], self.config.topk), *scores)


class Zipf:
    """k different experts are drawn, the r-th most popular in proportion to 1 / r^exponent; who is popular, the layer decides."""

    keeps_capacity = False

    def __init__(self, config: MoEConfig):
        self.config = config

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        c, num_experts = self.config, logits_TE.shape[1]
        scores = scored(logits_TE, c.moe_router_score_function)
        key = assignment_key(tokens, 0, logits_TE.device)
        keys_T = tokens.keys_T if tokens.keys_T is not None else mix(tokens.places(logits_TE) ^ key)  # evaluation: by place
        popularity_E = dealt(torch.arange(num_experts, device=logits_TE.device), key, num_experts, 1)[:, 0]
        log_share_E = -c.moe_router_zipf_exponent * (popularity_E + 1).log()
        # the k largest of log share + Gumbel noise are k draws without putting back
        return Choice(best(log_share_E + gumbel(keys_T, Purpose.ASSIGNMENT, num_experts), c.topk), *scores)
