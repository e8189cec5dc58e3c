"""The dense MLP: of dense layers, and of the residual branch beside the experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), or with SwiGLU fc2(silu(fc_gate(x)) * fc1(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width, bias = config.hidden_size, config.ffn_size, config.add_bias_linear
        self.fc1 = nn.Linear(D, width, bias=bias)
        # two matrices, not one of twice the width: a column split over ranks must not mix gate and value
        self.fc_gate = nn.Linear(D, width, bias=bias) if config.swiglu else None
        self.fc2 = nn.Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.gelu(h) if self.fc_gate is None else F.silu(self.fc_gate(x)) * h)
