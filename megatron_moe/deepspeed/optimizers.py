"""The optimizer of an engine: the caller's own, moved to the sharded parameters, or one made from the JSON.

`fully_shard` replaces parameters: an optimizer made before it keeps the old ones and trains nothing, without an error. So names are
taken before and looked up after:

    names = names_of(module)          id -> name, before sharding
    parallelise(module, ...)
    move_optimizer(optimizer, names, module)      the same optimizer object, groups with all their options, states sharded alike

and `Watch` sees to it that the first step has written to every group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.deepspeed.parallelise import local
from megatron_moe.optimizer.half_adam import HalfAdamW
from megatron_moe.utils.compat import local_slices
from megatron_moe.utils.logging import logger

Group = dict[str, Any]

# ---------------------------------------------------------------- groups


def groups_of(parameters: Iterable[nn.Parameter] | Iterable[Group] | None, module: nn.Module) -> list[Group]:
    """What `model_parameters` or an optimizer may be given, as groups; None: all that require a gradient."""
    given = [p for p in module.parameters() if p.requires_grad] if parameters is None else parameters
    given = [given] if isinstance(given, dict | Tensor) else list(given)
    if not given:
        raise ValueError("model_parameters has nothing in it; give model.parameters(), groups of them, or None for all")
    if not isinstance(given[0], dict):
        given = [{"params": given}]
    if wrong := [type(g).__name__ for g in given if not isinstance(g, dict) or "params" not in g]:
        raise ValueError(f"model_parameters must be parameters, or dicts that have 'params', all of one kind; it has {', '.join(wrong)}")
    return [group | {"params": [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])} for group in given]


def check_groups(groups: list[Group], names: dict[int, str], whose: str) -> None:
    """ValueError for parameters that are not the model's, or in two groups. `whose`: 'the optimizer', 'model_parameters'."""
    seen: dict[int, int] = {}
    for number, group in enumerate(groups):
        for p in group["params"]:
            if id(p) not in names:
                shape = list(p.shape) if isinstance(p, Tensor) else type(p).__name__
                raise ValueError(
                    f"{whose}: group {number} ({_called(group)}) has a parameter of shape {shape} that is not the model's; make it from the "
                    f"parameters of the model that initialize() is given, after the last layer was replaced"
                )
            if seen.setdefault(id(p), number) != number or sum(q is p for q in group["params"]) > 1:
                raise ValueError(f"{whose}: {names[id(p)]} is in group {seen[id(p)]} and again in group {number}; name it once")


def _called(group: Group) -> str:
    return str(group.get("name", "without a name"))


def rebuilt(groups: list[Group], names: dict[int, str], module: nn.Module) -> list[Group]:
    """The same groups over what the parameters have become."""
    now = dict(module.named_parameters())
    return [group | {"params": [now[names[id(p)]] for p in group["params"]]} for group in groups]


# ---------------------------------------------------------------- the caller's optimizer


def move_optimizer(optimizer: Optimizer, names: dict[int, str], module: nn.Module, device: torch.device) -> None:
    """In place: schedulers that hold the optimizer go on holding it. Collective where it has a state already: that of rank 0 counts."""
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS calls the model by itself in a step and looks at all parameters as one; use an optimizer such as AdamW")
    now, state = dict(module.named_parameters()), dict(optimizer.state)
    groups = rebuilt(optimizer.param_groups, names, module)
    on_device = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    for group, new in zip(optimizer.param_groups, groups):
        group["params"] = new["params"]
    optimizer.state.clear()
    for p, slots in state.items():
        new = now[names[id(p)]]
        optimizer.state[new] = {slot: _moved(value, p, new, device, id(p) in on_device) for slot, value in slots.items()}


@torch.no_grad()
def _moved(value: Any, old: nn.Parameter, new: nn.Parameter, device: torch.device, is_counted_there: bool) -> Any:
    """A state of `old`, laid out like `new`: moments are sharded, step counters are not."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or value.shape != old.shape:
        return value.to(local(new).device) if is_counted_there else value
    value = value.to(device)
    if dist.get_world_size() > 1:
        dist.broadcast(value, 0)
    if not isinstance(new, DTensor):
        return value
    moved = torch.empty_like(new, dtype=torch.promote_types(value.dtype, new.dtype), requires_grad=False)
    moved.to_local().copy_(value[local_slices(new)])
    return moved


# ---------------------------------------------------------------- one from the JSON


def build_optimizer(section: Mapping[str, Any], groups: list[Group], is_stored_in_half: bool) -> Optimizer:
    """`section`: fields of OptimizerSection that were given. Options of a group win over it."""
    kind = section["optimizer_type"]
    own = {option: section[name] for name, option in _OPTIONS.items() if name in section}
    if "adam_beta1" in section:
        own["betas"] = (section["adam_beta1"], section["adam_beta2"])
    own.setdefault("lr", 1e-3)
    own.setdefault("weight_decay", 0.0)  # as in DeepSpeed, for AdamW too
    if kind == "SGD":
        return torch.optim.SGD(groups, **own)
    if is_stored_in_half:
        return _half_adam(groups, own)
    is_decoupled = kind == "AdamW" or section.get("adam_w_mode", True)
    return (torch.optim.AdamW if is_decoupled else torch.optim.Adam)(groups, fused=True, **own)


_OPTIONS = {
    "lr": "lr", "weight_decay": "weight_decay", "adam_eps": "eps", "amsgrad": "amsgrad", "sgd_momentum": "momentum", "dampening": "dampening",
    "nesterov": "nesterov",
}  # fmt: skip


def _half_adam(groups: list[Group], own: dict[str, Any]) -> HalfAdamW:
    if other := sorted({k for group in groups for k in ("betas", "eps", "amsgrad") if group.get(k, own.get(k)) != own.get(k)}):
        raise ValueError(f"with fp16_master_weights_and_grads all groups have the same {', '.join(other)}; give them in optimizer.params")
    (beta1, beta2), eps = own.get("betas", (0.9, 0.999)), own.get("eps", 1e-8)
    config = OptimizerConfig(lr=own["lr"] or 1e-3, adam_beta1=beta1, adam_beta2=beta2, adam_eps=eps)
    return HalfAdamW([{"lr": own["lr"], "weight_decay": own["weight_decay"]} | group for group in groups], config)


# ---------------------------------------------------------------- did it train what it should?


def _marks(p: nn.Parameter, state: Mapping[str, Any]) -> tuple:
    """Another tuple after each update: torch counts writes to the sharded tensor or to what of it is here, and fused kernels, whose writes to
    parameters are not counted, count their steps in the state."""
    slots = tuple((slot, v._version if isinstance(v, Tensor) else repr(v)) for slot, v in state.items())
    return p._version, local(p)._version, slots


class Watch:
    """Asks after the first step that was not skipped whether every group of the optimizer moved.

    No values are compared, so the smallest update counts, and a rate of zero is no fault.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module):
        self.optimizer, self.module = optimizer, module
        self.marks: list[list[tuple]] = []
        self.had_gradients: list[bool] = []

    def before(self) -> None:
        groups = [group["params"] for group in self.optimizer.param_groups]
        self.marks = [[self._marks_of(p) for p in params] for params in groups]
        self.had_gradients = [any(p.grad is not None for p in params) for params in groups]

    def after(self) -> None:
        mine = {id(p) for p in self.module.parameters()}
        for number, (group, then, had) in enumerate(zip(self.optimizer.param_groups, self.marks, self.had_gradients)):
            what = f"group {number} ({_called(group)}) of {type(self.optimizer).__name__}"
            strangers = [p for p in group["params"] if id(p) not in mine]
            assert not strangers, (
                f"{what} updates {len(strangers)} of {len(then)} parameters that are not the sharded model's: it trains nothing"
            )
            here = [(p, mark) for p, mark in zip(group["params"], then) if local(p).numel() and p.requires_grad]
            if not had and here:
                logger.warning("%s has had no gradient in the first step: its parameters had no part in the loss", what)
            elif here:
                assert any(self._marks_of(p) != mark for p, mark in here), f"{what} did not move in the first step"

    def _marks_of(self, p: nn.Parameter) -> tuple:
        return _marks(p, self.optimizer.state.get(p, {}))
