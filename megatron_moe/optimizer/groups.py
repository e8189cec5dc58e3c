"""Which parameters are decayed, and the optimizer over them. Call after sharding: FSDP replaces the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_moe.config.training import OptimizerConfig


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as the optimizer groups "decay" and "no_decay"; a group without parameters is left out."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = model.get_submodule(name.rpartition(".")[0])
            (no_decay if is_bias_or_norm(name, parameter, owner) else decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_bias_or_norm(name: str, parameter: torch.Tensor, module: nn.Module) -> bool:
    """True for a vector: a bias, the scale of a norm, any other parameter with at most one dim.

    Dims are those of the full shape (a DTensor's `ndim`, however it is sharded) and of one expert: parameters stacked over
    experts lose their first dim. So `experts.b1` [E, F] is a vector per expert and is not decayed, while `experts.w1`
    [E, D, F], `gate.weight` [E, D] and `coefficient.weight` [2, D] are matrices and are.
    """
    if isinstance(module, _NORMS) or name.endswith("bias"):
        return True
    return parameter.ndim - _is_stacked_over_experts(name) <= 1


def _is_stacked_over_experts(name: str) -> bool:
    """`moe.experts.w1` and `moe.experts.stack.0.weight` (moe/module_experts.py) are one tensor for all experts;
    `moe.experts.3.fc1.weight` belongs to one expert of a ModuleList."""
    _, has_experts, own = f".{name}".partition(".experts.")
    return bool(has_experts) and (own.startswith("stack.") or not any(part.isdigit() for part in own.split(".")))


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as one fused kernel, which reads and writes each parameter and moment once, on the CPU as on CUDA; or SGD.

    torch has no fused SGD for sharded parameters (DTensor): that one is a call per operation.
    """
    groups = weight_decay_groups(model, config.weight_decay)
    if not groups:
        raise ValueError("the model has no trainable parameters; check requires_grad")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, foreach=True)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
