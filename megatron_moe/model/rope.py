"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in the half-split form of GPT-NeoX and Llama."""
# B batch, S sequence, H heads, h head width

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BHSh: Tensor, positions_BS: Tensor, base: float) -> Tensor:
    """Rotate the pairs (x[i], x[i + h/2]) by position * base^(-2i/h); angles in float32 at least, result in x's dtype."""
    half = x_BHSh.shape[-1] // 2
    wide = torch.promote_types(x_BHSh.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x_BHSh.device, dtype=wide) / half)
    angle = positions_BS[:, None, :, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BHSh.to(wide).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BHSh.dtype)
