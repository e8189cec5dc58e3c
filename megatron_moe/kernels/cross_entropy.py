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

    Keeps the logits as they are; the backward makes their gradient in their dtype, and nothing else of that size.
    torch.compile fuses the reference itself.
    """
    if torch.compiler.is_compiling():
        return reference.cross_entropy(logits_TV, labels_T, vocab_size)
    return _CrossEntropy.apply(logits_TV, labels_T, vocab_size)


class _CrossEntropy(torch.autograd.Function):
    """Logits are always taken relative to the largest of their row: a difference of two large numbers would lose digits."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        largest_T, log_sum_T = logits_TV.new_empty(2, *labels_T.shape, dtype=wide)
        for b in row_blocks(*logits_TV.shape, logits_TV.device):
            logits = logits_TV[b, :vocab_size]
            largest_T[b] = logits.amax(1)
            log_sum_T[b] = torch.sub(logits, largest_T[b, None]).exp_().sum(1).log_()
        ctx.save_for_backward(logits_TV, labels_T, largest_T, log_sum_T)
        ctx.vocab_size = vocab_size
        return log_sum_T - (logits_TV[:, :vocab_size].gather(1, labels_T[:, None]).squeeze(1) - largest_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        logits_TV, labels_T, largest_T, log_sum_T = ctx.saved_tensors
        dlogits_TV = torch.empty_like(logits_TV)
        dlogits_TV[:, ctx.vocab_size :] = 0  # padding columns have probability zero
        for b in row_blocks(*logits_TV.shape, logits_TV.device):
            probs = torch.sub(logits_TV[b, : ctx.vocab_size], largest_T[b, None]).sub_(log_sum_T[b, None]).exp_()
            probs.scatter_add_(1, labels_T[b, None], probs.new_full((len(probs), 1), -1.0))
            torch.mul(probs, dloss_T[b, None], out=dlogits_TV[b, : ctx.vocab_size])
        return dlogits_TV, None, None
