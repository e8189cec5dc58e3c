"""Which parameters are decayed, and the optimizer over them. Call after sharding: FSDP replaces the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.apex_adam import ApexAdamW, find_fused_adam
from megatron_moe.optimizer.half_adam import HalfAdamW
from megatron_moe.optimizer.muon import Muon
from megatron_moe.utils.logging import logger


def weight_decay_groups(
    model: nn.Module, weight_decay: float, expert_lr_mult: float = 1.0, expert_wd_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters as the optimizer groups "decay" and "no_decay"; a group without parameters is left out.

    Experts have groups of their own where they have another rate or decay. `lr_mult` and `wd_mult` are a group's share of both.
    """
    has_own = (expert_lr_mult, expert_wd_mult) != (1.0, 1.0)
    groups = {}
    for prefix, lr_mult, wd_mult in (("", 1.0, 1.0), ("expert_", expert_lr_mult, expert_wd_mult)):
        groups[f"{prefix}decay"] = {"params": [], "lr_mult": lr_mult, "wd_mult": wd_mult, "weight_decay": weight_decay * wd_mult}
        groups[f"{prefix}no_decay"] = {"params": [], "lr_mult": lr_mult, "wd_mult": 0.0, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = "expert_" if has_own and is_expert(name) else ""
            is_vector = is_bias_or_norm(name, parameter, owner_of(model, name))
            groups[prefix + ("no_decay" if is_vector else "decay")]["params"].append(parameter)
    return [{"name": name} | group for name, group in groups.items() if group["params"]]


def split_matrices(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, each with `is_muon`; the matrices that Muon orthogonalises in groups of their own, `muon_` before the name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = {p for p, name in names.items() if is_orthogonalised(name, p, owner_of(model, name))}
    split = []
    for group in groups:
        for prefix, is_muon in (("muon_", True), ("", False)):
            if params := [p for p in group["params"] if (p in chosen) is is_muon]:
                split.append(group | {"name": prefix + group["name"], "params": params, "is_muon": is_muon})
    return split


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float | None = None) -> None:
    """For the next step; without a weight decay it stays what it was. Groups that were made elsewhere have no share of their own."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        if weight_decay is not None and "wd_mult" in group:
            group["weight_decay"] = weight_decay * group["wd_mult"]


def is_expert(name: str) -> bool:
    """A parameter of routed experts: `moe.experts.w1`. Not a residual MLP's, nor a shared expert's, which see every token."""
    return "experts" in name.split(".")


def is_bias_or_norm(name: str, parameter: torch.Tensor, module: nn.Module) -> bool:
    """True for a vector: a bias, the scale of a norm, any other parameter with at most one dim.

    Dims are those of the full shape (a DTensor's `ndim`, however it is sharded) and of one expert: parameters stacked over
    experts lose their first dim. So `experts.b1` [E, F] is a vector per expert and is not decayed, while `experts.w1`
    [E, D, F], `gate.weight` [E, D] and `coefficient.weight` [2, D] are matrices and are.
    """
    if isinstance(module, _NORMS) or name.endswith("bias"):
        return True
    return parameter.ndim - _is_stacked_over_experts(name) <= 1


# Not matrices between hidden states: their rows are words, experts or weights of a sum, each with a scale of its own.
_TABLES = {"embedding", "position_embedding", "head", "gate", "coefficient", "shared_expert_gate"}


def is_orthogonalised(name: str, parameter: torch.Tensor, module: nn.Module) -> bool:
    """True for a matrix that takes hidden states to hidden states, and for a stack of one per expert."""
    dims = parameter.ndim - _is_stacked_over_experts(name)
    outside_of_experts = f".{name}".partition(".experts.")[0]
    return dims == 2 and not is_bias_or_norm(name, parameter, module) and not _TABLES & set(outside_of_experts.split("."))


def _is_stacked_over_experts(name: str) -> bool:
    """`moe.experts.w1` and `moe.experts.stack.0.weight` (moe/module_experts.py) are one tensor for all experts;
    `moe.experts.3.fc1.weight` belongs to one expert of a ModuleList."""
    _, has_experts, own = f".{name}".partition(".experts.")
    return bool(has_experts) and (own.startswith("stack.") or not any(part.isdigit() for part in own.split(".")))


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as one fused kernel, which reads and writes each parameter and moment once, on the CPU as on CUDA; SGD; or Muon.

    torch has no fused SGD for sharded parameters (DTensor): that one is a call per operation. Weights stored in float16 have an
    AdamW of their own.
    """
    groups = weight_decay_groups(model, config.weight_decay, config.moe_expert_lr_mult, config.moe_expert_wd_mult)
    if not groups:
        raise ValueError("the model has no trainable parameters; check requires_grad")
    for group in groups:
        group["lr"] = config.lr * group["lr_mult"]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, foreach=True)
    if any(p.dtype == torch.float16 for group in groups for p in group["params"]):
        assert config.optimizer == "adam", f"float16 weights and {config.optimizer}"  # the configuration refuses it
        return HalfAdamW(groups, config)
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adam" and config.adam_kernel == "apex":
        fused_adam = find_fused_adam()
        assert fused_adam is not None, "apex is not installed"  # prepare() has looked
        logger.info("AdamW by %s.%s", fused_adam.__module__, fused_adam.__qualname__)
        return ApexAdamW(groups, config, fused_adam)
    adam = partial(torch.optim.AdamW, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
    if config.optimizer == "muon":
        return Muon(split_matrices(model, groups), config, adam)
    optimizer = adam(groups)
    if are_small_on_cpu([p for group in groups for p in group["params"]]):
        step_on_one_thread(optimizer)
    return optimizer


SMALL = 1 << 14  # elements of a tensor, below which threads take longer to start than to work


def are_small_on_cpu(parameters: Sequence[torch.Tensor]) -> bool:
    """Of the tensors here, on average."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return local[0].device.type == "cpu" and sum(p.numel() for p in local) < SMALL * len(local)


def step_on_one_thread(optimizer: torch.optim.Optimizer) -> None:
    """The kernel starts its threads anew for every tensor: a thousand small ones took ten times as long on two threads as on one."""
    before: list[int] = []

    def narrow(*_: Any) -> None:
        if not before:  # a step that ended in an error has left its number here
            before.append(torch.get_num_threads())
        torch.set_num_threads(1)

    optimizer.register_step_pre_hook(narrow)
    optimizer.register_step_post_hook(lambda *_: torch.set_num_threads(before.pop()))
