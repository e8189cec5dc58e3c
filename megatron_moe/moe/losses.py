"""Auxiliary losses of the router, as shares that add up whatever the split of the tokens.

A loss that is a mean over tokens is computed as a sum over the tokens here, times one factor (1 / tokens of the global
batch); so local shares, and their gradients, add up to the whole over microbatches and ranks. In the load-balancing loss
only the counts - which carry no gradient - must be known for the whole microbatch, so only they cross ranks.

Which choices are counted differs: the micro-batch loss of k = 2 counts first choices alone, as GShard and DeepSpeed do; the
sequence and global-batch losses count all k, as the papers that they are from.
"""
# T tokens, E experts, S sequences, K experts per token

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice
from megatron_moe.moe.routing import count_assignments
from megatron_moe.moe.tokens import Reducer, TokenInfo


@dataclass
class Losses:
    """Of the tokens here, as sums over them."""

    total: Tensor  # times their coefficients
    balance: Tensor  # of the micro-batch, unscaled
    z: Tensor
    batch_counts_E: Tensor | None  # of the step so far, for the next micro-batch; None without a global-batch loss


def auxiliary_losses(
    config: MoEConfig, logits_TE: Tensor, choice: Choice, tokens: TokenInfo, reducer: Reducer, batch_counts_E: Tensor | None
) -> Losses:
    """Everything that --moe-*-loss-coeff can ask for. `batch_counts_E`: of the micro-batches of the step before this one."""
    probs_TE, used_T, num_experts = choice.probs_TE, tokens.used_T, logits_TE.shape[1]
    balance = load_balancing_sum(probs_TE, reducer.over_microbatch(count_assignments(choice.balance_ids_TK, num_experts)))
    if used_T is not None:  # padding counts in both means of this one (DeepSpeed): it lowers the shares of the experts
        used = reducer.over_microbatch(torch.stack([used_T.sum(), torch.ones_like(used_T).sum()])).to(probs_TE.dtype)
        balance = balance * (used[0] / used[1].clamp_min(1))
        probs_TE = probs_TE * used_T[:, None]  # and in no other
    logsumexp_T = logits_TE.logsumexp(-1) if choice.logsumexp_T is None else choice.logsumexp_T
    z = router_z_sum(logsumexp_T if config.moe_router_z_loss_coeff else logsumexp_T.detach(), used_T)
    total = config.moe_loss_coeff * balance
    if config.moe_router_z_loss_coeff:
        total = total + config.moe_router_z_loss_coeff * z
    if config.moe_seq_loss_coeff:
        total = total + config.moe_seq_loss_coeff * sequence_balancing_sum(probs_TE, choice.ids_TK, tokens, reducer)
    if batch_counts_E is not None:
        batch_counts_E = batch_counts_E + reducer.over_batch(count_assignments(choice.ids_TK, num_experts))
        total = total + config.moe_global_loss_coeff * load_balancing_sum(probs_TE, batch_counts_E)
    return Losses(total, balance, z, batch_counts_E)


def load_balancing_sum(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Sum over the tokens here of E * sum_e f_e * p_te; f_e = share of the microbatch's assignments that chose e.

    Divided by the number of tokens it is the Switch / GShard loss E * sum_e f_e * mean_t(p_te): 1 when balanced, E at worst
    (arXiv 2101.03961, equation 4). The gradient flows through the probabilities only.
    """
    fraction_E = counts_E.to(probs_TE.dtype)
    fraction_E = fraction_E / fraction_E.sum().clamp_min(1)
    return probs_TE.shape[1] * (fraction_E * probs_TE.sum(0)).sum()


def sequence_balancing_sum(probs_TE: Tensor, ids_TK: Tensor, tokens: TokenInfo, reducer: Reducer) -> Tensor:
    """The same with f_e counted within each token's own sequence (DeepSeek-V3, arXiv 2412.19437, equation 17)."""
    experts, sequences, sequence_T = probs_TE.shape[1], tokens.num_sequences, tokens.sequence_of(ids_TK)
    slot_TK = torch.where(ids_TK < 0, -1, ids_TK + experts * sequence_T[:, None])
    counts_SE = reducer.over_microbatch(count_assignments(slot_TK, sequences * experts)).view(sequences, experts).to(probs_TE.dtype)
    fraction_SE = counts_SE / counts_SE.sum(1, keepdim=True).clamp_min(1)
    return experts * (fraction_SE.index_select(0, sequence_T) * probs_TE).sum()


def router_z_sum(logsumexp_T: Tensor, used_T: Tensor | None = None) -> Tensor:
    """Sum over the tokens here, padding left out, of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    square_T = logsumexp_T.square()
    return (square_T if used_T is None else square_T * used_T).sum()


class AttachLoss(torch.autograd.Function):
    """Identity on `carrier` whose backward gives `extra` the gradient 1: adds a scalar to the loss from inside the model.

    Block outputs stay plain tensors, so recomputation and pipeline stages need to know nothing of auxiliary losses. The factor
    of the main loss is not seen here: it must be in `extra` already.
    """

    @staticmethod
    def forward(ctx, carrier: Tensor, extra: Tensor) -> Tensor:
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=grad.dtype, device=grad.device)
