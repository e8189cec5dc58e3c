"""The dense MLP and the norms written out."""

import math

import pytest
import torch

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.mlp import MLP
from megatron_moe.model.norm import build_norm


def affine(layer, x):
    return x @ layer.weight.t() + (0.0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "flags", [{}, {"swiglu": True}, {"squared_relu": True}, {"activation_func": "relu"}, {"activation_func": "gelu_tanh"}], ids=str
)
def test_mlp_equals_its_formula(flags, bias):
    torch.manual_seed(0)
    mlp = MLP(ModelConfig(hidden_size=8, num_attention_heads=2, ffn_hidden_size=12, add_bias_linear=bias, **flags)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    value = affine(mlp.fc1, x)
    if "swiglu" in flags:
        gate = affine(mlp.fc_gate, x)
        inner = gate / (1 + torch.exp(-gate)) * value  # silu of the gate, not of the value
    elif "gelu_tanh" in flags.values():
        inner = value * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
    elif flags:
        inner = torch.where(value > 0, value, 0.0) ** (2 if "squared_relu" in flags else 1)
    else:
        inner = value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))  # exact GELU
    torch.testing.assert_close(mlp(x), affine(mlp.fc2, inner), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_take_the_epsilon_of_the_configuration(kind):
    norm = build_norm(ModelConfig(hidden_size=8, num_attention_heads=2, normalization=kind, layernorm_epsilon=0.5)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    torch.testing.assert_close(norm(x), centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt(), rtol=0, atol=1e-12)
