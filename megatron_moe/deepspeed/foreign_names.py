"""A model's tensors in DeepSpeed's words, and the order in which DeepSpeed's optimizers have them.

    ours                                  there
    fc1.weight                            fc1.weight
    moe.core.gate.weight                  moe.deepspeed_moe.gate.wg.weight
    moe.core.experts.stack.w   [8, ...]   moe.deepspeed_moe.experts.deepspeed_experts.0.w ... .7.w

Their optimizer files have no names, only an order: that of the groups, each in the order of the model, and of the experts those of
one rank, one after the other with all its parameters. Worked example, 4 experts of w and b, two expert-parallel ranks, a group
[gate, w, b]: rank 1 has gate, 2.w, 2.b, 3.w, 3.b.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_moe.checkpoint.state import model_state
from megatron_moe.deepspeed.moe.layer import MoE

_EXPERT = re.compile(r"(?:^|.*\.)deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class MoEModule:
    """One MoE module of the model; `number` counts them in the order of the model, as the names of expert files do."""

    number: int
    name: str
    num_experts: int
    expert_parallel_size: int

    def inside(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours is there. A stack is in many places: `name` is what they have in common."""

    name: str
    module: MoEModule | None = None  # of a stack
    suffix: str = ""  # of a stack: the name within one expert

    def of(self, expert: int) -> str:
        return f"{self.name}.{expert}.{self.suffix}"


@dataclass(frozen=True)
class Member:
    """A tensor there, and what it is here: a parameter, or one expert's part of a stack."""

    name: str
    ours: str
    expert: int | None
    shape: tuple[int, ...]


def moe_modules(model: nn.Module, degree: int | None = None) -> list[MoEModule]:
    """`degree`: the expert parallelism of the files, where it is not that of the model."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    return [MoEModule(number, _plain(name), m.num_experts, degree or m.ep_size) for number, (name, m) in enumerate(found)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, live, by our names."""
    return {name.removeprefix("model."): tensor for name, tensor in model_state(model).items()}


def places(model: nn.Module, degree: int | None = None) -> dict[str, Place]:
    """Our name -> place, of all parameters and persistent buffers."""
    found = {}
    modules = moe_modules(model, degree)
    for name in tensors_of(model):
        owner = next((m for m in modules if name.startswith(m.inside("core."))), None)
        found[name] = Place(name) if owner is None else _place_in(owner, name)
    return found


def _place_in(owner: MoEModule, name: str) -> Place:
    own = name.removeprefix(owner.inside("core."))
    if own == "gate.weight":
        return Place(owner.inside("deepspeed_moe.gate.wg.weight"))
    suffix = own.removeprefix("experts.stack.")
    assert suffix != own, f"{name}: DeepSpeed's MoE has nothing like it"
    return Place(owner.inside("deepspeed_moe.experts.deepspeed_experts"), owner, suffix)


def expert_of(name: str) -> tuple[int, str] | None:
    """`a.deepspeed_moe.experts.deepspeed_experts.3.fc.weight` -> (3, "fc.weight"); None for what is no expert's."""
    match = _EXPERT.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


# ---------------------------------------------------------------- order


def optimizer_groups(model: nn.Module, optimizer: Optimizer, known: dict[str, Place], is_split: bool) -> list[tuple[dict, list[str]]]:
    """(group, our names) as DeepSpeed has them: `is_split` says that it has cut the experts out of groups that have both.

    It does so when it makes the optimizer itself and no group says "moe": first the groups without their experts, then the experts
    of each, by expert-parallel degree.
    """
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    groups = [(group, [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups]
    if not is_split or any("moe" in group for group, _ in groups):
        return groups
    degree_of = {name: place.module and place.module.expert_parallel_size for name, place in known.items()}
    split = [(group, [name for name in members if not degree_of[name]]) for group, members in groups]
    for group, members in groups:
        for degree in dict.fromkeys(degree_of[name] for name in members if degree_of[name]):
            own = [name for name in members if degree_of[name] == degree]
            split.append((group | {"name": f"ep_size_{degree}", "moe": True}, own))
    return split


def members(names: Sequence[str], known: dict[str, Place], shapes: dict[str, tuple[int, ...]], rank: int) -> Iterator[Member]:
    """The tensors of a group that expert-parallel rank `rank` has, in DeepSpeed's order."""
    for module, run in groupby(names, key=lambda name: known[name].module):
        run = list(run)
        if module is None:
            yield from (Member(known[name].name, name, None, shapes[name]) for name in run)
            continue
        for expert in experts_of_rank(module, rank):
            yield from (Member(known[name].of(expert), name, expert, shapes[name][1:]) for name in run)


def experts_of_rank(module: MoEModule, rank: int) -> range:
    """Consecutive ones. `rank` is that in the largest expert-parallel group, whose ranks a smaller degree repeats."""
    each = module.num_experts // module.expert_parallel_size
    first = rank % module.expert_parallel_size * each
    return range(first, first + each)


def _plain(name: str) -> str:
    """Without the wrappers of torch.compile and activation checkpointing."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").removesuffix("._orig_mod")
