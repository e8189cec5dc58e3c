"""Cross-entropy of hidden states times a vocabulary's matrix, some columns at a time: the logits never exist as a whole.

    log_sum_t = log sum_v exp(h_t . w_v)        picked_t = h_t . w_label(t)        loss_t = log_sum_t - picked_t

The columns may be spread over ranks: each has a log_sum of its own columns, and what is picked there. The backward computes the
logits once more, a third of the projection's products on top, and saves two matrices of their size. (Gradients made in the forward,
from chunks of tokens, took 1.2 times as long as whole logits on a CPU, where this takes 0.9 times: they add up the gradient of the
large matrix for every chunk.) Columns in turn rather than tokens: then it is the gradient of the hidden states that is added up,
the smaller one, and every row of the matrix's is written once.

It is an operator of its own, opaque to torch.compile, which would unroll the loop.
"""
# T tokens, D hidden, V rows of the matrix, c columns at a time

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def linear_cross_entropy(h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, vocab_size: int, chunk: int) -> Tensor:
    """-log softmax(h W^T)[label] over the first `vocab_size` columns, [T], float32 or wider; NaN for a label outside of them."""
    log_sum_T, picked_T = log_sum_and_picked(h_TD, w_VD, labels_T, vocab_size, chunk)
    return torch.where((labels_T >= 0) & (labels_T < vocab_size), log_sum_T - picked_T, float("nan"))


def log_sum_and_picked(h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, columns: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Over the first `columns` columns, `chunk` of them at a time. [T] each, float32 or wider; a label that is not among them picks 0."""
    return _log_sum_and_picked(h_TD, w_VD, labels_T, columns, chunk)


def _chunks(w_VD: Tensor, columns: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, columns, chunk):
        yield first, w_VD[first : min(first + chunk, columns)]


def _place(labels_T: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(whether a label is among the columns from `first` on, its place there or any [T, 1])."""
    return (labels_T >= first) & (labels_T < first + width), (labels_T - first).clamp(0, width - 1)[:, None]


@torch.library.custom_op("megatron_moe::linear_log_sum_and_picked", mutates_args=())
def _log_sum_and_picked(h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, columns: int, chunk: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(h_TD.dtype, torch.float32)
    log_sum_T = h_TD.new_full((len(h_TD),), float("-inf"), dtype=wide)
    picked_T = torch.zeros_like(log_sum_T)
    for first, w_cD in _chunks(w_VD, columns, chunk):
        logits_Tc = (h_TD @ w_cD.t()).to(wide)
        is_here_T, place_T1 = _place(labels_T, first, len(w_cD))
        picked_T = torch.where(is_here_T, logits_Tc.gather(1, place_T1).squeeze(1), picked_T)
        log_sum_T = torch.logaddexp(log_sum_T, logits_Tc.logsumexp(1))
    return log_sum_T, picked_T


@torch.library.custom_op("megatron_moe::linear_log_sum_and_picked_backward", mutates_args=())
def _gradients(
    dlog_sum_T: Tensor, dpicked_T: Tensor, h_TD: Tensor, w_VD: Tensor, labels_T: Tensor, log_sum_T: Tensor, columns: int, chunk: int
) -> tuple[Tensor, Tensor]:
    wide = log_sum_T.dtype
    dh_TD, dw_VD = torch.zeros_like(h_TD, dtype=wide), torch.empty_like(w_VD)
    dw_VD[columns:] = 0
    for first, w_cD in _chunks(w_VD, columns, chunk):
        logits_Tc = (h_TD @ w_cD.t()).to(wide)
        dlogits_Tc = logits_Tc.sub_(log_sum_T[:, None]).exp_().mul_(dlog_sum_T[:, None])
        is_here_T, place_T1 = _place(labels_T, first, len(w_cD))
        dlogits_Tc.scatter_add_(1, place_T1, torch.where(is_here_T, dpicked_T, 0)[:, None])
        dlogits_Tc = dlogits_Tc.to(h_TD.dtype)
        torch.mm(dlogits_Tc.t(), h_TD, out=dw_VD[first : first + len(w_cD)])
        dh_TD += dlogits_Tc @ w_cD
    return dh_TD.to(h_TD.dtype), dw_VD


@_log_sum_and_picked.register_fake
def _(h_TD, w_VD, labels_T, columns, chunk):
    wide = torch.promote_types(h_TD.dtype, torch.float32)
    return h_TD.new_empty(h_TD.shape[0], dtype=wide), h_TD.new_empty(h_TD.shape[0], dtype=wide)


@_gradients.register_fake
def _(dlog_sum_T, dpicked_T, h_TD, w_VD, labels_T, log_sum_T, columns, chunk):
    return torch.empty_like(h_TD), torch.empty_like(w_VD)


def _remember(ctx, inputs, output) -> None:
    h_TD, w_VD, labels_T, ctx.columns, ctx.chunk = inputs
    ctx.save_for_backward(h_TD, w_VD, labels_T, output[0])


def _backward(ctx, dlog_sum_T: Tensor, dpicked_T: Tensor):
    return *_gradients(dlog_sum_T, dpicked_T, *ctx.saved_tensors, ctx.columns, ctx.chunk), None, None, None


_log_sum_and_picked.register_autograd(_backward, setup_context=_remember)
