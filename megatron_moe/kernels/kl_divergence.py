"""KL(teacher || student) of wide logits, a token at a time: no softmax is ever held as a whole.

    m = max z/T     l = log sum exp(z/T - m)     log p = z/T - m - l          for teacher t and student s
    KL = sum p_t (log p_t - log p_s)             dKL/dz_s = (p_s - p_t) / T

The columns may be spread over ranks: the maxima and the sums are then completed by `Ranks`, two small reductions and one more.
"""
# T tokens, V padded vocabulary (the columns here)

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_moe.kernels.blocks import row_blocks


class Ranks:
    """How what was found in the columns here becomes that of all columns, in place. This one is for one process: it is that already."""

    def maximum(self, x: Tensor) -> None:
        pass

    def sum(self, x: Tensor) -> None:
        pass


ALONE = Ranks()


def kl_divergence(student_TV: Tensor, teacher_TV: Tensor, columns: int, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """KL of the softmaxes of logits / temperature over the first `columns` columns here, [T], float32 or wider.

    The teacher gets no gradient.
    """
    return _KLDivergence.apply(student_TV, teacher_TV, columns, temperature, ranks)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_TV: Tensor, teacher_TV: Tensor, columns: int, temperature: float, ranks: Ranks) -> Tensor:
        wide = torch.promote_types(student_TV.dtype, torch.float32)
        models, scale = (student_TV[:, :columns], teacher_TV[:, :columns]), 1 / temperature
        rows, device = len(student_TV), student_TV.device
        largest_2T = student_TV.new_full((2, rows), float("-inf"), dtype=wide)  # of a rank whose columns are all padding
        sums_2T = student_TV.new_zeros(2, rows, dtype=wide)
        for b in row_blocks(rows, columns, device) if columns else ():
            for largest_T, logits in zip(largest_2T, models):
                largest_T[b] = logits[b].amax(1).to(wide) * scale
        ranks.maximum(largest_2T)
        for b in row_blocks(rows, columns, device):
            for sum_T, largest_T, logits in zip(sums_2T, largest_2T, models):
                sum_T[b] = (logits[b].to(wide) * scale).sub_(largest_T[b, None]).exp_().sum(1)
        ranks.sum(sums_2T)
        norms = torch.stack([largest_2T, sums_2T.log_()], 1)
        divergence_T = torch.zeros_like(sums_2T[0])
        for b in row_blocks(rows, columns, device):
            log_s, log_t = (_log_probs(logits[b], norm[:, b], scale) for logits, norm in zip(models, norms))
            divergence_T[b] = (log_t.exp() * (log_t - log_s)).sum(1)
        ranks.sum(divergence_T)
        ctx.save_for_backward(student_TV, teacher_TV, norms)
        ctx.columns, ctx.scale = columns, scale
        return divergence_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor):
        student_TV, teacher_TV, (norm_s, norm_t) = ctx.saved_tensors
        columns, scale = ctx.columns, ctx.scale
        grad_TV = torch.empty_like(student_TV)
        grad_TV[:, columns:] = 0  # padding columns have probability zero
        for b in row_blocks(len(student_TV), columns, student_TV.device):
            probs_s = _log_probs(student_TV[b, :columns], norm_s[:, b], scale).exp_()
            probs_t = _log_probs(teacher_TV[b, :columns], norm_t[:, b], scale).exp_()
            torch.mul(probs_s.sub_(probs_t), (grad_T[b] * scale)[:, None], out=grad_TV[b, :columns])
        return grad_TV, None, None, None, None


def _log_probs(logits_TV: Tensor, norm_2T: Tensor, scale: float) -> Tensor:
    """norm_2T: the largest scaled logit, which is taken off first - two large numbers would lose digits - and the log of the sum."""
    return (logits_TV.to(norm_2T.dtype) * scale).sub_(norm_2T[0, :, None]).sub_(norm_2T[1, :, None])
