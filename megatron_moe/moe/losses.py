"""Auxiliary losses of the router, as shares that add up whatever the split of the tokens.

A loss that is a mean over tokens is computed as a sum over the tokens here, times one factor (1 / tokens of the global
batch); so local shares, and their gradients, add up to the whole over microbatches and ranks. In the load-balancing loss
only the counts - which carry no gradient - must be known for the whole microbatch, so only they cross ranks.
"""
# T tokens, E experts

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_sum(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Sum over the tokens here of E * sum_e f_e * p_te; f_e = share of the microbatch's assignments that chose e.

    Divided by the number of tokens it is the Switch / GShard loss E * sum_e f_e * mean_t(p_te): 1 when balanced, E at worst
    (arXiv 2101.03961, equation 4). The gradient flows through the probabilities only.
    """
    fraction_E = counts_E.to(probs_TE.dtype)
    fraction_E = fraction_E / fraction_E.sum().clamp_min(1)
    return probs_TE.shape[1] * (fraction_E * probs_TE.sum(0)).sum()


def router_z_sum(logits_TE: Tensor) -> Tensor:
    """Sum over the tokens here of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square().sum()


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
