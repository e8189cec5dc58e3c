"""Token choice: every token takes its k best experts (Switch for k = 1, GShard for k = 2, Mixtral, DeepSeek-V3).

k = 1   the best expert; RSample: argmax(logits + Gumbel), which draws from softmax(logits)
k = 2   the best, and the next best or (GShard, --moe-top2-2nd-expert-sampling) one drawn from the others
any k   with groups, experts of the best groups only; with a bias, scores are compared with it and weighed without
"""
# T tokens, E experts, K experts per token, N groups

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, best, scored
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.utils.random import Purpose, gumbel


class TopK:
    """DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) in full; its special cases are everything else."""

    keeps_capacity = False

    def __init__(self, config: MoEConfig):
        self.config = config

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        c = self.config
        scores = scored(logits_TE, c.moe_router_score_function)
        ranks_TE = scores.scores_TE.detach() if bias_E is None else scores.scores_TE.detach() + bias_E
        if c.moe_router_num_groups is not None:
            ranks_TE = of_best_groups(ranks_TE, c.moe_router_num_groups, c.moe_router_group_topk, c.group_best)
        if c.draws_choices and tokens.keys_T is not None:
            ids_TK = drawn(logits_TE.detach(), c.topk, gumbel(tokens.keys_T, Purpose.GATE_SAMPLING, logits_TE.shape[1]))
        else:
            ids_TK = best(ranks_TE, c.topk)
        # GShard and DeepSpeed balance the first of two choices
        return Choice(ids_TK, *scores, first_choices_only=c.topk == 2)


def drawn(logits_TE: Tensor, k: int, noise_TE: Tensor) -> Tensor:
    """ids_TK with Gumbel noise: the expert of k = 1, or the second of k = 2."""
    noisy_TE = logits_TE + noise_TE.to(logits_TE.dtype)
    if k == 1:
        return noisy_TE.argmax(-1, keepdim=True)
    assert k == 2, f"drawing is defined for k = 1 and k = 2, not {k}"
    first_T1 = logits_TE.argmax(-1, keepdim=True)
    return torch.cat([first_T1, noisy_TE.scatter(1, first_T1, float("-inf")).argmax(-1, keepdim=True)], dim=1)


def of_best_groups(ranks_TE: Tensor, groups: int, group_k: int, group_best: int) -> Tensor:
    """-inf outside of a token's best groups. A group counts as much as its `group_best` best experts together."""
    by_group_TNe = ranks_TE.unflatten(1, (groups, -1))
    group_TN = by_group_TNe.topk(group_best, dim=-1).values.sum(-1)  # values only: order of ties does not matter
    keep_TN = torch.zeros_like(group_TN, dtype=torch.bool).scatter(1, best(group_TN, group_k), True)
    return by_group_TNe.masked_fill(~keep_TN[..., None], float("-inf")).flatten(1)
