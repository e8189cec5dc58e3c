"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the ways to make them reach further than they were trained.

A pair of channels is rotated by position * frequency. Frequencies are base^(-2i/w) for i = 0 .. w/2 - 1, of the first w channels of a head;
scaling divides some of them, so that longer texts have angles that were seen in training:

- linear: all of them (Chen et al., arXiv 2306.15595);
- llama3: the slow ones, whose wavelength does not fit into the original length, blended into the fast ones (Llama 3.1);
- yarn: the same by a ramp over the channels, and a factor on the rotated vectors that sharpens the softmax (arXiv 2309.00071, section 3).
"""
# B batch, S sequence, H heads, h head width, w rotated channels, f = w/2 frequencies

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.model import ModelConfig


@dataclass(frozen=True)
class Scaling:
    """Fields of ModelConfig without their rope_."""

    kind: str
    factor: float
    original: int
    low: float  # llama3: turns within the original length, below which a frequency is divided
    high: float  # above which it stays
    beta_fast: float = 32.0  # yarn: the same, the other way around
    beta_slow: float = 1.0
    truncates: bool = True  # yarn: the ramp begins and ends at whole channels

    def __call__(self, frequency_f: Tensor, base: float) -> Tensor:
        if self.kind == "linear":
            return frequency_f / self.factor
        if self.kind == "llama3":
            turns_f = self.original * frequency_f / (2 * math.pi)
            keep_f = ((turns_f - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            keep_f = 1 - self._ramp(frequency_f, base)
        return frequency_f * (keep_f + (1 - keep_f) / self.factor)

    def _ramp(self, frequency_f: Tensor, base: float) -> Tensor:
        """0 for channels that turn more than beta_fast times within the original length, 1 below beta_slow."""
        count = frequency_f.shape[0]
        first, last = (
            count * math.log(self.original / (turns * 2 * math.pi)) / math.log(base) for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncates:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        index_f = torch.arange(count, device=frequency_f.device, dtype=frequency_f.dtype)
        return ((index_f - first) / (last - first or 0.001)).clamp(0, 1)


@dataclass(frozen=True)
class Rotary:
    """x [B, H, S, h], positions [B, S] -> x with its first `width` channels rotated.

    Pairs are (x[i], x[i + w/2]) as in GPT-NeoX and Llama, or (x[2i], x[2i + 1]) when interleaved, as in GPT-J and DeepSeek.
    """

    width: int
    base: float
    is_interleaved: bool = False
    scaling: Scaling | None = None
    factor: float = 1.0  # of the rotated vectors

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        half = self.width // 2
        frequency_f = self.base ** (-torch.arange(half, device=device, dtype=dtype) / half)
        return frequency_f if self.scaling is None else self.scaling(frequency_f, self.base)

    def __call__(self, x_BHSh: Tensor, positions_BS: Tensor) -> Tensor:
        """Angles in float32 at least, result in x's dtype."""
        return self.turned(x_BHSh, *self.turns(positions_BS, torch.promote_types(x_BHSh.dtype, torch.float32)))

    def turns(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, S, width / 2]."""
        angle = positions_BS[:, None, :, None] * self.frequencies(positions_BS.device, dtype)
        return angle.cos() * self.factor, angle.sin() * self.factor

    def turned(self, x_BHSh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x_BHSh[..., : self.width].to(cos.dtype), x_BHSh[..., self.width :]
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if self.is_interleaved else turned.chunk(2, dim=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.stack(pair, -1).flatten(-2) if self.is_interleaved else torch.cat(pair, -1)
        turned = turned.to(x_BHSh.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def build_rotary(config: ModelConfig, head_width: int) -> Rotary | None:
    """For heads, or parts of heads, of `head_width` channels."""
    if config.position_embedding_type != "rope":
        return None
    scaling, factor, kind = None, 1.0, config.rope_scaling_type
    if kind != "none":
        scaling = Scaling(
            kind, config.rope_scaling_factor, config.rope_original_length, config.rope_low_freq_factor, config.rope_high_freq_factor,
            config.rope_beta_fast, config.rope_beta_slow, config.rope_yarn_truncate,
        )  # fmt: skip
    if kind == "yarn":
        factor = yarn_mscale(config, config.rope_mscale) / yarn_mscale(config, config.rope_mscale_all_dim)
    return Rotary(config.rotary_width(head_width), config.rotary_base, config.rotary_interleaved, scaling, factor)


def softmax_scale(config: ModelConfig) -> float | None:
    """Of the scores; None: 1/sqrt(head width). What mscale_all_dim means: every channel of q and k is longer, not the rotated ones alone."""
    if config.rope_scaling_type != "yarn" or not config.rope_mscale_all_dim:
        return None
    return config.qk_width**-0.5 * yarn_mscale(config, config.rope_mscale_all_dim) ** 2


def yarn_mscale(config: ModelConfig, mscale: float) -> float:
    """0.1 m ln(factor) + 1: what the paper fits to the best temperature (section 3.4), with DeepSeek's m."""
    return 0.1 * mscale * math.log(config.rope_scaling_factor) + 1.0
