"""Causal attention on a CPU by plain matrix products, some rows of queries at a time, without the keys that come after them.

    s = scale q_i k^T (keys up to the end of block i)     p = softmax(s)     y_i = p v
    dv += p^T dy_i     dp = dy_i v^T     ds = p (dp - sum(p dp)) scale     dq_i = ds k     dk += ds^T q_i

The backward computes p once more, so neither keeps anything that grows with the square of the sequence. torch's fused kernel does
the same on a CPU in products of its own; those of the library are several times as fast in bf16. Scores are then rounded to bf16,
as they are wherever attention is written out; each softmax, and gradients that are added up, are float32. In float32 neither is faster.

Queries that share a key/value head are rows of one product, so these heads are never repeated.

It is an operator of its own, opaque to torch.compile, which would unroll the loops.
"""
# B batch, S sequence, H query heads, G key/value heads, r = H/G of the former for each of the latter, h head width of q and k, w of v
# N = B * G pairs of a sequence and a key/value head, n of them at a time, i rows of queries at a time, j = keys up to the last of these

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Scores at a time: they are gone through several times, and fit into the caches. Rows: fewer skip more, and make smaller products.
SCORES, ROWS = 1 << 19, 64
SHORTEST = 64


def is_faster(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor) -> bool:
    """Whether this operator is what to use for these."""
    is_bf16 = q_BHSh.dtype == k_BGSh.dtype == v_BGSw.dtype == torch.bfloat16
    return is_bf16 and q_BHSh.device.type == "cpu" and q_BHSh.shape[2] == k_BGSh.shape[2] >= SHORTEST


def causal_attention(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the tokens up to each, [B, H, S, w]. H is a multiple of G; `scale`: 1/sqrt(h) if not given. Any float dtype."""
    return _attend(q_BHSh, k_BGSh, v_BGSw, q_BHSh.shape[-1] ** -0.5 if scale is None else scale)


def _blocks(q_BHSh: Tensor, k_BGSh: Tensor) -> Iterator[tuple[slice, slice]]:
    """(pairs of N, rows of S) of each block; those of the same pairs follow each other."""
    B, H, S, _ = q_BHSh.shape
    G = k_BGSh.shape[1]
    N, pairs = B * G, max(SCORES * torch.get_num_threads() // (H // G * ROWS * S), 1)
    for n in range(0, N, pairs):
        for i in range(0, S, ROWS):
            yield slice(n, n + pairs), slice(i, min(i + ROWS, S))


def _by_pair(q_BHSh: Tensor, heads: int) -> Tensor:
    """[B, H, S, x] -> [N, r, S, x]"""
    B, H, S, x = q_BHSh.shape
    return q_BHSh.reshape(B * heads, H // heads, S, x)


def _probs(q_nrih: Tensor, k_njh: Tensor, scale: float, ahead_ii: Tensor) -> Tensor:
    """[n, r i, j]; the last i keys are the queries' own, among which those after a query are hidden."""
    n, r, i, h = q_nrih.shape
    q_nRh = q_nrih.reshape(n, r * i, h)
    scores_nRj = torch.baddbmm(q_nRh.new_empty(()), q_nRh, k_njh.transpose(1, 2), beta=0, alpha=scale)
    scores_nRj.view(n, r, i, -1)[..., -i:].masked_fill_(ahead_ii[:i, :i], float("-inf"))
    return torch.softmax(scores_nRj, -1)


def _ahead(like: Tensor) -> Tensor:
    return torch.ones(ROWS, ROWS, dtype=torch.bool, device=like.device).triu(1)


@torch.library.custom_op("megatron_moe::causal_attention", mutates_args=())
def _attend(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, scale: float) -> Tensor:
    heads, ahead_ii = k_BGSh.shape[1], _ahead(q_BHSh)
    q_NrSh, k_NSh, v_NSw = _by_pair(q_BHSh, heads), k_BGSh.flatten(0, 1), v_BGSw.flatten(0, 1)
    y_NrSw = q_BHSh.new_empty(*q_NrSh.shape[:3], v_BGSw.shape[3])
    for n, i in _blocks(q_BHSh, k_BGSh):
        p_nRj = _probs(q_NrSh[n, :, i], k_NSh[n, : i.stop], scale, ahead_ii)
        y_NrSw[n, :, i] = torch.bmm(p_nRj, v_NSw[n, : i.stop]).view(y_NrSw[n, :, i].shape)
    return y_NrSw.view(*q_BHSh.shape[:3], v_BGSw.shape[3])


@torch.library.custom_op("megatron_moe::causal_attention_backward", mutates_args=())
def _gradients(dy_BHSw: Tensor, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    heads, ahead_ii = k_BGSh.shape[1], _ahead(q_BHSh)
    dy_NrSw, q_NrSh, k_NSh, v_NSw = _by_pair(dy_BHSw, heads), _by_pair(q_BHSh, heads), k_BGSh.flatten(0, 1), v_BGSw.flatten(0, 1)
    wide = torch.promote_types(q_BHSh.dtype, torch.float32)
    dq_NrSh = torch.empty_like(q_NrSh, memory_format=torch.contiguous_format)
    dk_NSh, dv_NSw = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k_NSh, v_NSw))
    for n, i in _blocks(q_BHSh, k_BGSh):
        k_njh, v_njw = k_NSh[n, : i.stop], v_NSw[n, : i.stop]
        q_nRh, dy_nRw = q_NrSh[n, :, i].flatten(1, 2), dy_NrSw[n, :, i].flatten(1, 2)
        p_nRj = _probs(q_NrSh[n, :, i], k_njh, scale, ahead_ii)
        dv_NSw[n, : i.stop] += torch.bmm(p_nRj.transpose(1, 2), dy_nRw)
        dp_nRj = torch.bmm(dy_nRw, v_njw.transpose(1, 2))
        ds_nRj = torch.ops.aten._softmax_backward_data(dp_nRj, p_nRj, -1, p_nRj.dtype)
        dq_NrSh[n, :, i] = torch.bmm(ds_nRj, k_njh).mul_(scale).view(dq_NrSh[n, :, i].shape)
        dk_NSh[n, : i.stop] += torch.bmm(ds_nRj.transpose(1, 2), q_nRh)
    dk_NSh *= scale
    return dq_NrSh.view(q_BHSh.shape), *(d.to(t.dtype).view(t.shape) for d, t in ((dk_NSh, k_BGSh), (dv_NSw, v_BGSw)))


@_attend.register_fake
def _(q_BHSh, k_BGSh, v_BGSw, scale):
    return q_BHSh.new_empty(*q_BHSh.shape[:3], v_BGSw.shape[3])


@_gradients.register_fake
def _(dy_BHSw, q_BHSh, k_BGSh, v_BGSw, scale):
    return tuple(t.new_empty(t.shape) for t in (q_BHSh, k_BGSh, v_BGSw))


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy_BHSw: Tensor):
    return *_gradients(dy_BHSw, *ctx.saved_tensors, ctx.scale), None


_attend.register_autograd(_backward, setup_context=_remember)
