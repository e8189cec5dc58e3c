"""Normalisation layers by name."""

from __future__ import annotations

from torch import nn

from megatron_moe.config.model import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (weight and bias) or RMSNorm (weight) over the hidden dim."""
    if config.normalization == "RMSNorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
