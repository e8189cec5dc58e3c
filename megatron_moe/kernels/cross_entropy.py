"""Cross-entropy of wide logits: neither they nor their softmax are ever held in float32 as a whole."""
# T tokens, V padded vocabulary

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe.kernels import reference
from megatron_moe.kernels.blocks import row_blocks


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(logits)[label] over the first `vocab_size` columns, [T], float32 or wider.

    Leaves the logits as they are and keeps as much beside them, for a backward that makes their gradient in their dtype.
    torch.compile fuses the reference itself.
    """
    if torch.compiler.is_compiling():
        return reference.cross_entropy(logits_TV, labels_T, vocab_size)
    return _CrossEntropy.apply(logits_TV, labels_T, vocab_size)


class _CrossEntropy(torch.autograd.Function):
    """Logits are always taken relative to the largest of their row: a difference of two large numbers would lose digits.

    What is kept for the backward is exp(logit - largest), in place of the logits: exponentials are taken once. It is kept in the
    dtype of the logits, but for float16, whose least number is no small probability: a gradient that the loss scale lifts would be lost."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
        wide, V = torch.promote_types(logits_TV.dtype, torch.float32), vocab_size
        largest_T, sum_T = logits_TV.new_empty(2, *labels_T.shape, dtype=wide)
        keeps = ctx.needs_input_grad[0]
        kept_in = torch.bfloat16 if logits_TV.dtype == torch.float16 else logits_TV.dtype
        exps_TV = torch.empty_like(logits_TV if keeps else logits_TV[:0], dtype=kept_in)
        for b in row_blocks(*logits_TV.shape, logits_TV.device):
            largest_T[b] = logits_TV[b, :V].amax(1)
            exps_tV = torch.sub(logits_TV[b, :V], largest_T[b, None]).exp_()
            sum_T[b] = exps_tV.sum(1)
            if keeps:
                exps_TV[b, :V] = exps_tV
        ctx.save_for_backward(exps_TV, labels_T, sum_T)
        ctx.vocab_size, ctx.dtype = V, logits_TV.dtype
        return sum_T.log() - (logits_TV[:, :V].gather(1, labels_T[:, None]).squeeze(1) - largest_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        (exps_TV, labels_T, sum_T), V = ctx.saved_tensors, ctx.vocab_size
        dlogits_TV = torch.empty_like(exps_TV, dtype=ctx.dtype)
        dlogits_TV[:, V:] = 0  # padding columns have probability zero
        scale_T = dloss_T / sum_T
        for b in row_blocks(*exps_TV.shape, exps_TV.device):
            dlogits_tV = exps_TV[b, :V].to(scale_T.dtype).mul_(scale_T[b, None])
            dlogits_tV.scatter_add_(1, labels_T[b, None], -dloss_T[b, None])
            dlogits_TV[b, :V] = dlogits_tV
        return dlogits_TV, None, None
