"""Balanced token choice: top-k of scores that a few rounds of Sinkhorn have balanced (S-BASE, arXiv 2202.01169, section 3.2).

The tokens' choice is a transport plan from tokens to experts: rows and columns of exp(logits) are scaled in turn, so that every
token gives, and every expert takes, equal shares. Then each token takes its k largest entries. Gate weights come from the logits
alone: sigmoid for k = 1, softmax above. The plan sees all tokens at hand, so evaluation takes the plain top-k.
"""
# T tokens, E experts, K experts per token

from __future__ import annotations

from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, best, scored
from megatron_moe.moe.tokens import TokenInfo

# The plan of a single token has equal entries: without this share of the logits, rounding would choose, and layouts differ in it.
TIE_BREAK = 1e-4


class Sinkhorn:
    """Over the tokens of one rank in one micro-batch, as capacity is: under tensor parallelism the rank's slice of them."""

    keeps_capacity = False

    def __init__(self, config: MoEConfig):
        self.k, self.iterations = config.topk, config.moe_router_sinkhorn_iterations

    def __call__(self, logits_TE: Tensor, tokens: TokenInfo, bias_E: Tensor | None, capacity: int | None, training: bool) -> Choice:
        scores = scored(logits_TE, "sigmoid" if self.k == 1 else "softmax")
        ranks_TE = logits_TE.detach()
        if training:
            ranks_TE = (1 + TIE_BREAK) * ranks_TE + column_scale(ranks_TE, tokens.used_T, self.iterations)
        return Choice(best(ranks_TE, self.k), *scores)


def column_scale(logits_TE: Tensor, used_T: Tensor | None, iterations: int) -> Tensor:
    """log of the factor of each expert. That of a token does not change its order of experts, so it is not needed in the end.

    A fixed number of rounds: to stop when nothing moves any more, the host would have to wait for every round.
    """
    scale_E = logits_TE.new_zeros(logits_TE.shape[1])
    for _ in range(iterations):
        shares_TE = (logits_TE + scale_E).log_softmax(1) - scale_E  # logits + log of the factor of each token
        if used_T is not None:
            shares_TE = shares_TE.masked_fill(~used_T[:, None], float("-inf"))
        scale_E = -shares_TE.logsumexp(0)
    return scale_E
