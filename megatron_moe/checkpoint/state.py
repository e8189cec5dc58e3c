"""A model and its optimizer as one flat dict of tensors, by parameter name.

    model.layers.3.moe.experts.w1                    parameter (or persistent buffer) of the model
    optimizer.exp_avg.layers.3.moe.experts.w1        first moment of that parameter
    optimizer.step.layers.3.moe.experts.w1           number of updates, a scalar tensor

The tensors are the live ones, not copies: loading fills them in place. Names carry global layer numbers, so the dicts of
pipeline stages are parts of one whole; `model` may be a list of such parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from megatron_moe.optimizer import apex_adam, half_adam
from megatron_moe.optimizer.apex_adam import ApexAdamW
from megatron_moe.optimizer.half_adam import HalfAdamW
from megatron_moe.optimizer.muon import Muon

MTP = "model.mtp."  # multi-token prediction: of training alone, so that other uses of a checkpoint pass it by
Model = nn.Module | Sequence[nn.Module]
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile and activation checkpointing


def model_state(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers, as `model.<name>`."""
    return {f"model.{name}": tensor for part in _parts(model) for name, tensor in [*_parameters(part), *_persistent_buffers(part)]}


def optimizer_state(model: Model, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every state tensor of the optimizer, as `optimizer.<slot>.<parameter name>`.

    Missing state is created first, so a parameter that never had a gradient is saved like all others. Learning rates
    and other hyper-parameters are not state: they belong into `meta`.
    """
    materialise_optimizer_state(model, optimizer)
    tensors = {}
    for name, parameter in _optimized(model, optimizer):
        for slot, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the optimizer's {slot} of {name} is a {type(value).__name__}; only tensors are saved")
            tensors[f"optimizer.{slot}.{name}"] = value
    return tensors


def materialise_optimizer_state(model: Model, optimizer: Optimizer) -> None:
    """Create the zero state that the first step would create, for every parameter that requires a gradient.

    Loading fills existing tensors; a new optimizer has none. State that is already there stays.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for _, parameter in _optimized(model, optimizer):
        if parameter.requires_grad and not any(isinstance(v, Tensor) for v in optimizer.state[parameter].values()):
            optimizer.state[parameter].update(_zero_state(optimizer, groups[parameter], parameter))


def _zero_state(optimizer: Optimizer, group: dict, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Slot -> zeros, with the sharding of the parameter."""
    for kind, zero_state in ((HalfAdamW, half_adam.zero_state), (ApexAdamW, apex_adam.zero_state)):
        if isinstance(optimizer, kind):
            return zero_state(parameter)
    if isinstance(optimizer, Muon) and group["is_muon"]:
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    if isinstance(optimizer, Adam | Muon):  # AdamW is a subclass; Muon leaves what is no matrix to one
        slots = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
        return {"step": _zero_step(group, parameter)} | {slot: torch.zeros_like(parameter, requires_grad=False) for slot in slots}
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)} if group["momentum"] else {}
    raise TypeError(f"the state of {type(optimizer).__name__} is not known; supported are Adam, AdamW and SGD of torch.optim, and Muon")


def _zero_step(group: dict, parameter: nn.Parameter) -> Tensor:
    """A plain scalar, never a DTensor; on the device only where the kernel reads it there."""
    on_device = group["capturable"] or group["fused"]
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not group["fused"] else torch.float32
    return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")


# ---------------------------------------------------------------- names


def _parts(model: Model) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def _parameters(part: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in part.named_parameters():
        yield _plain(name), parameter


def _persistent_buffers(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in part.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _plain(f"{prefix}.{name}" if prefix else name), buffer


def _plain(name: str) -> str:
    """The name without the wrappers around its modules: a run without them reads the same checkpoint."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _optimized(model: Model, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of all that the optimizer updates."""
    names = {parameter: name for part in _parts(model) for name, parameter in _parameters(part)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(f"the optimizer has a parameter of shape {list(parameter.shape)} that the model does not have")
            yield names[parameter], parameter
