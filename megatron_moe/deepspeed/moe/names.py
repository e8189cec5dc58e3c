"""DeepSpeed's names in the state dict of an MoE layer, with the global numbers of its experts, in every layout.

    here, and in named_parameters          in state_dict and load_state_dict
    core.gate.weight          [E, D]       deepspeed_moe.gate.wg.weight
    core.experts.stack.NAME   [E, ...]     deepspeed_moe.experts.deepspeed_experts.0.NAME ... E-1, each [...]
    mlp.NAME, coefficient.NAME             the same

Sharded, state_dict() is a collective call of all ranks: everyone gets every expert whole. The dense parameters stay what they are in
that layout, as those of the modules around. load_state_dict() sends nothing: each rank takes its part of what it is given. It
also takes the names here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_moe.utils.dtensor import local_part

GATE = ("core.gate.weight", "deepspeed_moe.gate.wg.weight")
STACK = "core.experts.stack."


def expert_key(expert: int, name: str) -> str:
    return f"deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"


def speak_deepspeed(moe: nn.Module) -> None:
    """`moe`: an MoE, with its `core`."""
    moe.register_state_dict_post_hook(_to_deepspeed)
    moe.register_load_state_dict_pre_hook(_from_deepspeed)
    moe.register_load_state_dict_post_hook(_tag_again)


def _to_deepspeed(moe: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    own = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    of_core = {name: own.pop(name) for name in list(own) if name.startswith("core.")}
    state_dict[prefix + GATE[1]] = of_core.pop(GATE[0])
    stacks = {name.removeprefix(STACK): _whole(of_core.pop(name)).unbind() for name in list(of_core) if name.startswith(STACK)}
    assert not of_core, f"{sorted(of_core)} have no name in DeepSpeed"
    for expert in range(moe.num_experts):
        for name, stack in stacks.items():
            state_dict[prefix + expert_key(expert, name)] = stack[expert]
    state_dict.update({prefix + name: t for name, t in own.items()})  # in DeepSpeed's order: the dense ones are behind the experts


@torch.no_grad()
def _from_deepspeed(
    moe: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, missing: list[str], _unexpected: list[str],
    errors: list[str],
) -> None:  # fmt: skip
    """Names and forms of `state_dict` become those of the parameters here. What is missing stays as it is, and is reported as
    DeepSpeed calls it."""
    for name, held in _held(moe):
        key = prefix + name
        if key in state_dict:  # dense, or called as here
            state_dict[key] = _in_form_of(held, state_dict[key])
        elif name == GATE[0]:
            given = state_dict.pop(prefix + GATE[1], None)
            if given is None:
                missing.append(prefix + GATE[1])
            state_dict[key] = held if given is None else _in_form_of(held, given)
        elif name.startswith(STACK):
            keys = [prefix + expert_key(e, name.removeprefix(STACK)) for e in range(moe.num_experts)]
            given_E = [state_dict.pop(k, None) for k in keys]
            missing += [k for k, given in zip(keys, given_E) if given is None]
            for e, given in enumerate(given_E):
                if given is not None and given.shape != held.shape[1:]:
                    errors.append(f"{keys[e]} is {list(given.shape)}, and an expert here has {list(held.shape[1:])}")
                    given_E[e] = None
            state_dict[key] = _stacked(held, given_E)


def _held(moe: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, sharded where they are: asking the children for their state reshards what FSDP has gathered."""
    for child_name, child in moe.named_children():
        yield from child.state_dict(prefix=f"{child_name}.").items()


def _stacked(held: Tensor, given_E: list[Tensor | None]) -> Tensor:
    """The experts that are given, in the form of `held`: of each the part that is here; the others' from `held` itself."""
    local, slices = local_part(held)
    first = next((given for given in given_E if given is not None), local)
    stack = torch.empty_like(local, dtype=first.dtype, device=first.device) if local.is_meta else local.clone()
    for number, expert in enumerate(range(slices[0].start, slices[0].stop)):
        if (given := given_E[expert]) is not None:
            stack[number].copy_(_whole(given)[slices[1:]])
    return _as_shard(held, stack)


def _in_form_of(held: Tensor, given: Tensor) -> Tensor:
    """A whole tensor as the shard that `held` is, if it is one. Another shape is left for torch to refuse."""
    if not isinstance(held, DTensor) or isinstance(given, DTensor) or given.shape != held.shape:
        return given
    return _as_shard(held, given[local_part(held)[1]])


def _as_shard(held: Tensor, local: Tensor) -> Tensor:
    if not isinstance(held, DTensor):
        return local
    return DTensor.from_local(local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride())


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _tag_again(moe: nn.Module, _incompatible: Any) -> None:
    moe.tag_experts()  # load_state_dict(assign=True) makes new parameters
