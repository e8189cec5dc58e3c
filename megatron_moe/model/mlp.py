"""The dense MLP: of dense layers, and of the residual branch or the shared expert beside the experts."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.activation import activate
from megatron_moe.kernels.linear import Linear


class MLP(nn.Module):
    """fc2(activation(fc1(x))), or with SwiGLU fc2(silu(fc_gate(x)) * fc1(x)) (arXiv 2002.05202). `width`: the config's if not given."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        D, width, bias = config.hidden_size, width or config.ffn_size, config.add_bias_linear
        self.activation = config.activation
        self.fc1 = Linear(D, width, bias=bias)
        # two matrices, not one of twice the width: a column split over ranks must not mix gate and value
        self.fc_gate = Linear(D, width, bias=bias) if config.activation == "swiglu" else None
        self.fc2 = Linear(width, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.activation, self.fc1(x), None if self.fc_gate is None else self.fc_gate(x)))
