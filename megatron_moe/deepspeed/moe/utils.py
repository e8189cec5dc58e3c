"""Which parameters are experts', and optimizer groups that keep them apart, by DeepSpeed's names.

The engine needs no such groups: it knows its experts by itself. They are for code that scans parameters, and for experts that are to
have options of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_moe.deepspeed.moe.layer import MoE

Group = dict[str, Any]


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(whether there are any, experts of the first)."""
    first = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return (False, 0) if first is None else (True, first.num_experts)


def is_moe_param(param: Tensor) -> bool:
    """An expert's. Not the gate's, and not those of the MLP of use_residual: every rank has these."""
    return not getattr(param, "allreduce", True)


def split_params_into_shared_and_expert_params(params: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    shared: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for p in params:
        (experts if is_moe_param(p) else shared).append(p)
    return shared, experts


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Group | Sequence[Group], max_group_size: float | None = 178956971
) -> list[Group]:
    """The groups without their experts, and behind them the experts: for each group and expert-parallel degree copies of the group, with
    its options, called "ep_size_N" and marked `moe`, of at most `max_group_size` elements each (None: any number).

    All experts of a layer are one tensor here; a tensor that is larger than that is a group by itself. The groups that are passed
    in stay as they are.
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    elif not isinstance(param_groups, (list, tuple)):
        raise ValueError(f"param_groups must be a dict, or a list or tuple of dicts, not {type(param_groups).__name__}")
    dense: list[Group] = []
    experts: list[Group] = []
    for group in param_groups:
        if "name" not in group:
            raise ValueError(
                f"a parameter group must have a 'name'; one has only {', '.join(sorted(map(repr, group)))}: "
                f"add {{'name': 'dense'}}, or any other word"
            )
        own, of_experts = split_params_into_shared_and_expert_params(_listed(group["params"]))
        dense.append(group | {"params": own})
        for name in dict.fromkeys(p.group_name for p in of_experts):
            members = [p for p in of_experts if p.group_name == name]
            experts += [group | {"name": name, "moe": True, "params": part} for part in _parts(members, max_group_size)]
    return dense + experts


def _listed(params: Tensor | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [params] if isinstance(params, Tensor) else list(params)


def _parts(params: list[nn.Parameter], most: float | None) -> Iterator[list[nn.Parameter]]:
    """In order, each as long as it may be."""
    part: list[nn.Parameter] = []
    size = 0
    for p in params:
        if part and most is not None and size + p.numel() > most:
            yield part
            part, size = [], 0
        part.append(p)
        size += p.numel()
    if part:
        yield part


def is_moe_param_group(param_group: Group) -> bool:
    return param_group.get("moe", False)


def configure_moe_param_groups(model_parameters: list[nn.Parameter] | list[Group]) -> list[Group]:
    """Parameters, or groups of them -> groups in which experts are apart. Groups of which one says 'moe' already stay as they are."""
    if not isinstance(model_parameters, list):
        raise TypeError(f"model_parameters must be a list, not {type(model_parameters).__name__}; write list(...) around it")
    if not model_parameters:
        raise ValueError("model_parameters is empty; give the parameters that are to be trained")
    are_groups = isinstance(model_parameters[0], dict)
    kind = dict if are_groups else Tensor
    if wrong := [type(p).__name__ for p in model_parameters if not isinstance(p, kind)]:
        raise TypeError(
            f"model_parameters must be tensors, or dicts of them, all of one kind; it has {', '.join(sorted(set(wrong)))} in it"
        )
    if not are_groups:
        return split_params_into_different_moe_groups_for_optimizer({"params": model_parameters, "name": "dense-params"})
    if any("moe" in group for group in model_parameters):
        return model_parameters
    return split_params_into_different_moe_groups_for_optimizer(model_parameters)
