"""Normalisation layers by name."""

from __future__ import annotations

from torch import nn

from megatron_moe.config.model import ModelConfig


def build_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """LayerNorm (weight and bias) or RMSNorm (weight) over the last dim, the hidden one if no other width is given."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(width or config.hidden_size, eps=config.layernorm_epsilon)
