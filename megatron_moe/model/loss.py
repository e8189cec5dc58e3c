"""Next-token and distillation losses over a padded vocabulary."""
# B batch, S sequence, V padded vocabulary, N modules of multi-token prediction, M = 1 + N tokens that are predicted from a place

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.cross_entropy import cross_entropy
from megatron_moe.kernels.kl_divergence import kl_divergence
from megatron_moe.kernels.linear_cross_entropy import linear_cross_entropy

MOST_LOGITS, LOGITS_AT_A_TIME = 1 << 25, 1 << 23  # of a micro-batch; 128 and 32 MiB in float32


def mask_padding(logits: Tensor, vocab_size: int, first_column: int = 0) -> Tensor:
    """-inf in the columns of tokens that do not exist; `first_column` is the token of column 0 (a shard of the vocabulary)."""
    real = max(min(vocab_size - first_column, logits.shape[-1]), 0)
    if real == logits.shape[-1]:
        return logits
    column_V = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(column_V >= real, float("-inf"))


def token_losses(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(logits)[label] in nats, [B, S], float32 or wider. Padding columns have probability zero."""
    losses_T = cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), vocab_size)
    return losses_T.view_as(labels_BS).clone()  # FSDP hooks the model's output, and warns about views


def columns_at_a_time(asked: int | None, tokens: int, columns: int) -> int:
    """How many columns of the vocabulary the loss takes at a time; 0: all, as logits.

    A logit in a chunk is computed twice; a whole matrix of them is read and written many times. On a CPU chunks took 1.1 times as long
    for 8 million logits, and 0.9 times for 51 million (where the peak fell from 395 to 125 MiB): by default they begin in between.
    """
    if asked is None:
        asked = max(LOGITS_AT_A_TIME // max(tokens, 1) // 64, 1) * 64 if tokens * columns > MOST_LOGITS else 0
    return asked if asked < columns else 0


def chunked_token_losses(h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocab_size: int, chunk: int) -> Tensor:
    """`token_losses` of h W^T, from `chunk` columns at a time."""
    losses_T = linear_cross_entropy(h_BSD.flatten(0, 1), weight_VD, labels_BS.flatten(), vocab_size, chunk)
    return losses_T.view_as(labels_BS).clone()


def token_divergences(student_BSV: Tensor, teacher_BSV: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """KL(teacher || student) of the next token in nats, [B, S], float32 or wider, both softened by `temperature`."""
    return kl_divergence(student_BSV.flatten(0, 1), teacher_BSV.flatten(0, 1), vocab_size, temperature).view(student_BSV.shape[:2])


# ---------------------------------------------------------------- of a step


def share_of_step(losses_BS: Tensor, mask_BS: Tensor, divisor: Tensor) -> Tensor:
    """One number; of losses [B, M, S] one for each of M predictions, [M]."""
    return of_predictions(losses_BS * mask_BS) / divisor.to(losses_BS.dtype)


def of_predictions(x: Tensor) -> Tensor:
    """Sum over all tokens: [B, S] -> [], [B, M, S] -> [M]."""
    return x.sum() if x.ndim == 2 else x.sum((0, 2))


def weighted_sum(config: ModelConfig, losses: Tensor) -> Tensor:
    """What is differentiated: the loss of the next token, plus the factor times the mean of those of the N further ones. [1 + N] -> [];
    a loss that is one number already stays it."""
    if losses.ndim == 0:
        return losses
    return losses[0] + config.mtp_loss_scaling_factor / config.mtp_num_layers * losses[1:].sum()
