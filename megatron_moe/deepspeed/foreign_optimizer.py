"""DeepSpeed's optimizer files -> moments by name, and back for the kind of file that has parameters one by one.

Three kinds of files, and what says which number belongs to which parameter:
    fp32, no ZeRO             an entry per parameter               the order of the groups
    fp16, no ZeRO             a flat tensor per group              the order of the groups
    bf16, or ZeRO 1 and 2     a data rank's part of a flat tensor  param_shapes in the model's file, which has names; else the order
Where an order is all there is, shapes are compared, and in the flat kinds the fp32 weights that lie beside the moments: rounded they
must be the weights of the model's file, bit for bit. What does not fit is an error, and nothing is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_moe.checkpoint.deepspeed_files import Files, Inert, read_file
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.deepspeed.foreign_names import (
    Member,
    MoEModule,
    expert_of,
    members,
    moe_modules,
    optimizer_groups,
    places,
    tensors_of,
)

Slots = dict[str, Tensor]  # exp_avg, exp_avg_sq, step, momentum_buffer


@dataclass
class Moments:
    """What optimizer files say, by DeepSpeed's names with global numbers of experts."""

    slots: dict[str, Slots] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # in fp32, where the files have them
    group_of: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> options of its group: lr, betas, ...
    loss_scale: float | None = None


@dataclass
class Group:
    """One group of one file, or of the parts of one joined: its tensors and what it says of itself."""

    options: dict[str, Any]
    entries: list[Slots]  # per parameter, or one of flat tensors
    weights: list[Tensor] | None  # as entries
    is_flat: bool

    def size(self) -> int:
        """Elements of a flat group, else parameters."""
        return self.weights[0].numel() if self.is_flat else len(self.entries)


def read_moments(files: Files, content: dict[str, Any], model: nn.Module, optimizer: Optimizer, ignored: Sequence[str] = ()) -> Moments:
    """`content`: of the model's file."""
    moments = Moments()
    if files.zero:
        parts = [_optimizer_dict(read_file(files.zero[rank], ignored)) for rank in _all_ranks(files.zero, content, files)]
        if content.get("param_shapes"):
            _by_names(moments, parts, content, model)
        else:
            _by_order(moments, {rank: _joined(parts, rank, content, model) for rank in range(_degree(model))}, model, optimizer, None)
        moments.loss_scale = _loss_scale(parts[0])
        return moments
    ranks = sorted(files.optimizer)
    if ranks != list(range(len(ranks))):
        raise CheckpointError(f"{files.path}: optimizer files of expert-parallel ranks {ranks}, some are missing")
    contents = {rank: read_file(files.optimizer[rank], ignored)["optimizer"] for rank in ranks}
    if not contents:  # a model without MoE modules: the model's file has the optimizer
        contents = {0: content["optimizer"]}
    if any(c is None for c in contents.values()):
        raise CheckpointError(f"{files.path}: was saved without an optimizer; give load_optimizer_states=False")
    _by_order(moments, {rank: _groups_of(c) for rank, c in contents.items()}, model, optimizer, len(contents) if files.optimizer else None)
    moments.loss_scale = _loss_scale(contents[0])
    return moments


def _all_ranks(zero: Mapping[int, Any], content: dict[str, Any], files: Files) -> range:
    world = content["dp_world_size"]
    if missing := sorted(set(range(world)) - zero.keys()):
        raise CheckpointError(f"{files.path}: saved by {world} data ranks, no optimizer file of rank {', '.join(map(str, missing))}")
    return range(world)


def _optimizer_dict(content: dict[str, Any]) -> dict[str, Any]:
    inner = content.get("optimizer_state_dict")
    if not isinstance(inner, dict) or "single_partition_of_fp32_groups" not in inner:
        raise CheckpointError("an optimizer file has no single_partition_of_fp32_groups: it is not of ZeRO stage 1 or 2, nor of bf16")
    return inner


def _loss_scale(optimizer: dict[str, Any]) -> float | None:
    """Of fp16; ZeRO keeps it in an object."""
    scaler = optimizer.get("loss_scaler")
    state = scaler.state if isinstance(scaler, Inert) else optimizer
    scale = state.get("cur_scale") if isinstance(state, dict) else None
    return float(scale) if isinstance(scale, (int, float)) else None


# ---------------------------------------------------------------- ZeRO: names are known


def _by_names(moments: Moments, parts: list[dict[str, Any]], content: dict[str, Any], model: nn.Module) -> None:
    """`param_shapes` are those of data rank 0, whose experts are the first; the other ranks' lie in the same order."""
    modules = {module.inside("deepspeed_moe"): module for module in moe_modules(model)}
    all_names = [name for shapes in content["param_shapes"] for name in shapes]
    each = {prefix: len({expert_of(n)[0] for n in all_names if expert_of(n) and _module_of(n) == prefix}) for prefix in modules}
    for number, shapes in enumerate(content["param_shapes"]):
        degree = _degree_of_group(shapes, modules, each)
        pads = (parts[0].get("param_alignment_paddings") or {number: None})[number]
        for rank in range(degree):
            group = _join([parts[r] for r in _holders(rank, degree, len(parts), content)], number)
            own = [Member(_shifted(name, rank, each), "", None, tuple(shape)) for name, shape in shapes.items()]
            _take(moments, group, own, pads)


def _module_of(name: str) -> str:
    return name.partition(".experts.deepspeed_experts.")[0]


def _degree_of_group(shapes: Mapping[str, Any], modules: dict[str, MoEModule], each: dict[str, int]) -> int:
    """Expert parallelism of a group of experts; 1 for all others."""
    prefixes = {_module_of(name) for name in shapes if expert_of(name)}
    if unknown := sorted(prefixes - modules.keys()):
        raise CheckpointError(f"the optimizer has experts of {unknown[0]}, the model has none there")
    degrees = {modules[prefix].num_experts // each[prefix] for prefix in prefixes} or {1}
    if len(degrees) > 1 or (prefixes and not all(map(expert_of, shapes))):
        raise CheckpointError(f"a group of the optimizer mixes parameters of different ranks: {', '.join(list(shapes)[:3])}, ...")
    return degrees.pop()


def _holders(rank: int, degree: int, world: int, content: dict[str, Any]) -> range:
    """Data ranks that hold the experts of expert-parallel rank `rank`, one part each; for a dense group (degree 1) all of them."""
    config = content.get("ds_config")
    if isinstance(config, dict) and config.get("use_data_before_expert_parallelism"):
        return range(rank * (world // degree), (rank + 1) * (world // degree))
    return range(rank, world, degree)


def _shifted(name: str, rank: int, each: dict[str, int]) -> str:
    """The name at rank 0 -> that of the tensor in the same place at another expert-parallel rank."""
    found = expert_of(name)
    if found is None:
        return name
    prefix = _module_of(name)
    return f"{prefix}.experts.deepspeed_experts.{found[0] + rank * each[prefix]}.{found[1]}"


def _join(parts: list[dict[str, Any]], number: int) -> Group:
    """Group `number` of all its parts, one behind the other."""
    weights = torch.cat([part["single_partition_of_fp32_groups"][number].flatten() for part in parts])
    if "zero_stage" not in parts[-1]:  # bf16 alone: what fills up the last part is still there
        weights = weights[: weights.numel() - parts[-1]["group_paddings"][number]]
    states = [_state_of(part, number) for part in parts]
    slots = {s: t if not t.ndim else torch.cat([state[s].flatten() for state in states])[: weights.numel()] for s, t in states[0].items()}
    return Group(_options_of(parts[0], number), [slots], [weights], is_flat=True)


def _state_of(part: dict[str, Any], number: int) -> Slots:
    base = part["base_optimizer_state"]
    state = base[number] if isinstance(base, list) else base["state"].get(number, {})
    return _with_step(state, _options_of(part, number), part.get("base_optimizer_state_step"))


def _options_of(part: dict[str, Any], number: int) -> dict[str, Any]:
    base = part["base_optimizer_state"]
    return base["param_groups"][number] if isinstance(base, dict) else {}


def _with_step(state: dict[str, Any], options: dict[str, Any], default: Any = None) -> Slots:
    """Tensors of one entry. Some optimizers count their steps in the group."""
    slots = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    step = next((s for s in (state.get("step"), options.get("step"), default) if s is not None), None)
    if slots and step is not None:
        slots["step"] = torch.as_tensor(step, dtype=torch.float32).reshape(())
    return slots


# ---------------------------------------------------------------- order alone


def _joined(parts: list[dict[str, Any]], rank: int, content: dict[str, Any], model: nn.Module) -> list[Group]:
    """bf16 without ZeRO: in parts like ZeRO's, and no names."""
    groups = []
    for number in range(len(parts[0]["single_partition_of_fp32_groups"])):
        degree = _degree(model) if _options_of(parts[0], number).get("moe") else 1
        groups.append(_join([parts[r] for r in _holders(rank % degree, degree, len(parts), content)], number))
    return groups


def _degree(model: nn.Module) -> int:
    return max((module.expert_parallel_size for module in moe_modules(model)), default=1)


def _groups_of(optimizer: dict[str, Any]) -> list[Group]:
    """Of a file without ZeRO: torch's own form, or that of fp16 around it."""
    base = optimizer.get("optimizer_state_dict", optimizer)
    flat, listed = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    groups = []
    for number, options in enumerate(base["param_groups"]):
        entries = [_with_step(base["state"].get(index, {}), options) for index in options["params"]]
        weights = [flat[number]] if flat is not None else listed[number] if listed is not None else None
        groups.append(Group(options, entries, weights, is_flat=flat is not None))
    return groups


def _by_order(moments: Moments, found: dict[int, list[Group]], model: nn.Module, optimizer: Optimizer, degree: int | None) -> None:
    """`degree`: expert-parallel ranks that have saved, where that is known."""
    degrees = {module.expert_parallel_size for module in moe_modules(model)}
    if degree is not None and len(degrees) > 1 and degree != max(degrees):
        raise CheckpointError(
            f"the optimizer was saved by {degree} expert-parallel ranks, and the modules here have degrees {sorted(degrees)}: which module "
            f"had which is not in the files; use the degrees it was saved with, or load_optimizer_states=False"
        )
    for module in moe_modules(model):
        if degree is not None and len(degrees) == 1 and module.num_experts % degree:
            raise CheckpointError(f"{module.name}: {module.num_experts} experts, saved by {degree} expert-parallel ranks, do not divide")
    known = places(model, degree if len(degrees) == 1 else None)
    shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    is_split = any("moe" in group.options for groups in found.values() for group in groups)
    expected = optimizer_groups(model, optimizer, known, is_split)
    expected = _in_their_order(expected, next(iter(found.values())))
    for rank, groups in found.items():
        own = [list(members(names, known, shapes, rank)) for _, names in expected]
        for tensors, theirs in zip(own, _matched(own, groups)):
            _take_all(moments, theirs, tensors)


def _in_their_order(expected: list[tuple[dict, list[str]]], theirs: list[Group]) -> list[tuple[dict, list[str]]]:
    """Experts of several degrees: DeepSpeed lines these groups up in the order of a set, and names them."""
    order = list(dict.fromkeys(group.options.get("name") for group in theirs if group.options.get("moe")))
    degrees = {group.get("name") for group, _ in expected if group.get("moe")}
    if len(degrees) < 2 or degrees != set(order):
        return expected
    dense = [entry for entry in expected if not entry[0].get("moe")]
    return dense + sorted((entry for entry in expected if entry[0].get("moe")), key=lambda entry: order.index(entry[0]["name"]))


def _matched(own: list[list[Member]], groups: list[Group]) -> Iterator[list[Group]]:
    """Their groups that make up each of ours: DeepSpeed cuts large ones into several."""
    waiting = [group for group in groups if group.size()]
    is_flat = any(group.is_flat for group in groups)
    for tensors in own:
        wanted = sum(math.prod(t.shape) for t in tensors) if is_flat else len(tensors)
        taken: list[Group] = []
        while waiting and sum(group.size() for group in taken) < wanted:
            taken.append(waiting.pop(0))
        if sum(group.size() for group in taken) != wanted:
            raise CheckpointError(_other_groups(own, groups, is_flat))
        yield taken
    if waiting:
        raise CheckpointError(_other_groups(own, groups, is_flat))


def _other_groups(own: list[list[Member]], groups: list[Group], is_flat: bool) -> str:
    here = [sum(math.prod(t.shape) for t in tensors) if is_flat else len(tensors) for tensors in own]
    return (
        f"the optimizer's groups are others than in the files: here {here} {'elements' if is_flat else 'parameters'}, there "
        f"{[group.size() for group in groups]}; make the groups as they were when the files were saved, or give load_optimizer_states=False"
    )


# ---------------------------------------------------------------- into tensors by name


def _take_all(moments: Moments, groups: list[Group], tensors: list[Member]) -> None:
    """Groups that together are `tensors`, in this order."""
    if groups and groups[0].is_flat:
        slots = {s: t if not t.ndim else torch.cat([g.entries[0][s] for g in groups]) for s, t in groups[0].entries[0].items()}
        weights = [torch.cat([g.weights[0] for g in groups])]
        _take(moments, Group(groups[0].options, [slots], weights, is_flat=True), tensors, None)
        return
    entries = [(group, i) for group in groups for i in range(len(group.entries))]
    for member, (group, i) in zip(tensors, entries):
        slots = group.entries[i]
        if other := next((s for s, t in slots.items() if t.ndim and tuple(t.shape) != member.shape), None):
            raise CheckpointError(
                f"{member.name}: is {list(member.shape)} here, and {other} in its place in the optimizer's file {list(slots[other].shape)}; "
                f"the file's parameters are in another order, or of another model"
            )
        _put(moments, member, slots, group.options)
        if group.weights is not None:
            moments.weights[member.name] = group.weights[i]


def _take(moments: Moments, group: Group, tensors: Sequence[Member], pads: Sequence[int] | None) -> None:
    """Cut a flat group. `pads`: elements without meaning behind each tensor."""
    (flat_slots,), (flat,), at = group.entries, group.weights, 0
    for number, member in enumerate(tensors):
        part = slice(at, at + math.prod(member.shape))
        if part.stop > flat.numel():
            raise CheckpointError(f"{member.name}: the optimizer's flat tensor ends at {flat.numel()}, before element {part.stop} of it")
        moments.weights[member.name] = flat[part].view(member.shape)
        _put(moments, member, {s: t[part].view(member.shape) if t.ndim else t for s, t in flat_slots.items()}, group.options)
        at = part.stop + (pads[number] if pads else 0)


def _put(moments: Moments, member: Member, slots: Slots, options: dict[str, Any]) -> None:
    if slots:
        moments.slots[member.name] = slots
    moments.group_of[member.name] = options
