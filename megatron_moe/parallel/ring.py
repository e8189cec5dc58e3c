"""Context parallelism by a ring: keys and values travel past the queries, and no rank holds all of them (Liu et al., arXiv 2310.01889).

The loop over the ranks is torch's own. It wants the chunks r and 2P-1-r of a sequence on rank r, which is how `context.py` cuts them, and
merges partial softmaxes by their log-sums. Its kernels take a causal mask and nothing else: no documents, no dropout, no window, no sinks.
Heads of keys and values that several queries share travel once, and are repeated where they are looked at.
"""
# B batch, S tokens here, H query heads, G key/value heads, h head width of q and k, w of v

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.core import CausalCore, Context, repeat_heads
from megatron_moe.utils.compat import ring_attention, ring_attention_backward

aten = torch.ops.aten


class RingCore(CausalCore):
    """The queries here meet the keys of one rank after the other."""

    def __init__(self, group: dist.ProcessGroup, scale: float | None = None):
        super().__init__(0.0, scale)
        self.group = group

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, context: Context) -> Tensor:
        width, v_width = max(q_BHSh.shape[-1], v_BGSw.shape[-1]), v_BGSw.shape[-1]
        if self.scale is not None or v_width != q_BHSh.shape[-1]:  # the kernels below scale by 1/sqrt(width)
            scale = q_BHSh.shape[-1] ** -0.5 if self.scale is None else self.scale
            q_BHSh = q_BHSh * (scale * width**0.5)
        # zeros make widths equal (latent attention): they add nothing to a score, and their columns of the answer are left out
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q_BHSh, k_BGSh, v_BGSw))
        return _Ring.apply(q, k, v, self.group)[..., :v_width]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        out, log_sums, *draws = ring_attention(group, partial(_on_repeated_heads, kernels_for(q)[0]), q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sums, *draws)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        q, k, v, out, log_sums, *draws = ctx.saved_tensors
        backward = partial(_of_repeated_heads, partial(kernels_for(q)[1], *draws))
        return *ring_attention_backward(ctx.group, backward, grad_out, q, k, v, out, log_sums), None


# ---------------------------------------------------------------- one block of queries and one of keys


def _on_repeated_heads(kernel: Callable, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, **rest: Any) -> tuple[Tensor, ...]:
    heads = query.shape[1]
    return kernel(query, repeat_heads(key, heads), repeat_heads(value, heads), is_causal)


def _of_repeated_heads(kernel: Callable, *, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> tuple[Tensor, ...]:
    """The gradient of a head that was repeated is the sum over its copies."""
    heads, shared = query.shape[1], key.shape[1]
    grad_q, *grads = kernel(query=query, key=repeat_heads(key, heads), value=repeat_heads(value, heads), **rest)
    return grad_q, *(g.unflatten(1, (shared, -1)).sum(2) for g in grads)


def kernels_for(q: Tensor) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """Forward and backward. torch's fused ones for a GPU take 16 bits only."""
    if not q.is_cuda:
        return _flash_for_cpu, _flash_for_cpu_backward
    return (_flash, _flash_backward) if q.dtype.itemsize == 2 else (_plain, _plain_backward)


def _flash_for_cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)


def _flash_for_cpu_backward(
    *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """-> output, log-sums, and the state of the kernel's random numbers, of which it draws none."""
    out, log_sums, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False)
    return out, log_sums, seed, offset


def _flash_backward(
    *draws: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    lengths = (None, None, query.shape[2], key.shape[2])  # no sequences of several lengths in a row
    return aten._scaled_dot_product_flash_attention_backward(grad_out, query, key, value, out, logsumexp, *lengths, 0.0, is_causal, *draws)


def _plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    scores_BHqk = _scores(q, k, is_causal)
    log_sums_BHq = scores_BHqk.logsumexp(-1)
    return (scores_BHqk - log_sums_BHq[..., None]).exp() @ v, log_sums_BHq


def _plain_backward(*, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool):
    # `logsumexp` is of the keys of all ranks, so these are the probabilities of the whole row
    probs_BHqk = (_scores(query, key, is_causal) - logsumexp[..., None]).exp()
    of_probs = grad_out @ value.transpose(-1, -2)
    of_scores = probs_BHqk * (of_probs - (grad_out * out).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    return of_scores @ key, of_scores.transpose(-1, -2) @ query, probs_BHqk.transpose(-1, -2) @ grad_out


def _scores(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    scores_BHqk = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if not is_causal:
        return scores_BHqk
    ahead = torch.ones(scores_BHqk.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores_BHqk.masked_fill(ahead, float("-inf"))
