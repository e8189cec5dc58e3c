"""Logits -> next token. Pure functions; a filter sets the logits of what may not be drawn to -inf."""
# B batch, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_moe.config.sampling import SamplingConfig

Sampling = SamplingConfig | Sequence[SamplingConfig]  # of all rows, or of each
Generators = torch.Generator | Sequence[torch.Generator] | None


def sample(logits_BV: Tensor, config: Sampling, generator: Generators = None) -> Tensor:
    """Next tokens [B]. Columns of tokens that do not exist are -inf already (model.loss.mask_padding).

    One config and one generator per row: what a row draws does not depend on the rows beside it.
    """
    if not isinstance(config, SamplingConfig):
        rows = zip(logits_BV.split(1), config, generator, strict=True)
        return torch.cat([sample(logits_1V, own, draws) for logits_1V, own, draws in rows])
    if config.greedy:
        return logits_BV.argmax(-1)
    return torch.multinomial(filtered(logits_BV, config).softmax(-1), 1, generator=generator).squeeze(1)


def filtered(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """Temperature, then top-k, then top-p of what top-k has left; float32 or wider."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    # largest 0: no overflow, however cold; but what float32 rounds to 0 would make it 0 / 0
    temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if 0 < config.top_k < logits_BV.shape[-1]:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    return logits_BV


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Exactly the k largest of each row, also when some are equal."""
    values_BK, ids_BK = logits_BV.topk(k, dim=-1)
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, ids_BK, values_BK)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """The shortest head of the tokens, likeliest first, whose probabilities sum to p or more.

    Example: probabilities 0.5 0.3 0.2 and p = 0.6 keep the first two: 0.5 does not reach p, 0.8 does.
    """
    sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    is_out_BV = before_BV >= p
    is_out_BV[:, 0] = False  # the likeliest token always stays, also when p is a 0 in float32
    kept_BV = sorted_BV.masked_fill(is_out_BV, float("-inf"))
    return torch.empty_like(logits_BV).scatter(-1, ids_BV, kept_BV)
