"""In what two checkpoints differ: names, shapes, types, values. And one expert of a layer beside the others.

Tensors are read one of each at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.flags import ConfigError
from megatron_moe.conversion.source import Source, Tensors


def differences(first: Source, second: Source, pattern: str = "") -> dict[str, Any]:
    """{"only_in_first": [name], "only_in_second": [name], "shapes": {name: [a, b]}, "dtypes": {name: [a, b]}, "values": {name: figures},
    "equal": number of tensors with the same shape and values}, ready for JSON.

    Figures: `max_abs` the largest difference of two elements, `relative` the norm of the difference over that of the first, `elements` how
    many differ. Values of two types are compared exactly, in float64. A NaN differs from a number and equals a NaN.
    """
    ours, theirs = ({name: entry for name, entry in source.tensors.items() if re.search(pattern, name)} for source in (first, second))
    both = [name for name in ours if name in theirs]
    comparable = [name for name in both if ours[name]["shape"] == theirs[name]["shape"]]
    values = {}
    for (name, a), (_, b) in zip(first.read(comparable), second.read(comparable)):
        if figures := value_figures(a, b):
            values[name] = figures
    return {
        "only_in_first": [name for name in ours if name not in theirs],
        "only_in_second": [name for name in theirs if name not in ours],
        "shapes": {name: [ours[name]["shape"], theirs[name]["shape"]] for name in both if name not in comparable},
        "dtypes": {name: [ours[name]["dtype"], theirs[name]["dtype"]] for name in both if ours[name]["dtype"] != theirs[name]["dtype"]},
        "values": values,
        "equal": len(comparable) - len(values),
    }


def value_figures(a: Tensor, b: Tensor) -> dict[str, float] | None:
    """None when all elements are equal."""
    a, b = a.double().flatten(), b.double().flatten()
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    if not unequal.any():
        return None
    apart = (a - b)[unequal].abs().nan_to_num(math.inf, math.inf)
    norm = float(torch.linalg.vector_norm(a.nan_to_num()))
    relative = float(torch.linalg.vector_norm(apart)) / norm if norm else math.inf
    return {"max_abs": float(apart.max()), "relative": relative, "elements": int(unequal.sum())}


def is_same(found: dict[str, Any]) -> bool:
    return not any(found[kind] for kind in ("only_in_first", "only_in_second", "shapes", "dtypes", "values"))


# ---------------------------------------------------------------- one expert


def expert_tensors(source: Source, layer: int, expert: int) -> Tensors:
    """Name -> shape and type of this expert's part of each tensor, its row of the router too. ConfigError when there is none."""
    of_layer = {name: entry for name, entry in source.tensors.items() if f".layers.{layer}." in name}
    stacks = {name: entry for name, entry in of_layer.items() if _is_of_experts(name) and entry["shape"]}
    if not of_layer or not stacks:
        layers = sorted({int(m[1]) for name in source.tensors if (m := re.match(r"model\.layers\.(\d+)\.moe\.experts\.", name))})
        what = "has no experts" if of_layer else "does not exist"
        raise ConfigError([f"--layer {layer} {what}; MoE layers are {', '.join(map(str, layers)) or 'none'}"])
    count = next(iter(stacks.values()))["shape"][0]
    if expert >= count:
        raise ConfigError([f"--expert {expert}: layer {layer} has experts 0 to {count - 1}"])
    return {name: {"shape": entry["shape"][1:], "dtype": entry["dtype"]} for name, entry in stacks.items()}


def _is_of_experts(name: str) -> bool:
    """Of what has a row for each expert."""
    return ".moe.experts." in name or name.endswith((".moe.gate.weight", ".moe.gate.expert_bias"))


def expert_figures(source: Source, layer: int, expert: int) -> dict[str, Any]:
    """{"tensors": {name: norm of this expert's part}, "cosine_to_mean": ..., "most_similar": other expert, "cosine_to_most_similar": ...}.

    Cosines are between the weights of experts as one vector each, without router and optimizer."""
    names, norms = list(expert_tensors(source, layer, expert)), {}
    dots_E = squares_E = with_mean = mean_square = torch.zeros((), dtype=torch.float64)
    for name, stack in source.read(names):
        norms[name] = float(torch.linalg.vector_norm(stack[expert].double()))
        if not name.startswith("model.") or ".experts." not in name:
            continue
        own, mean = stack[expert].double().flatten(), stack.double().mean(0).flatten()
        dots_E = dots_E + torch.stack([one.double().flatten() @ own for one in stack])
        squares_E = squares_E + torch.stack([one.double().square().sum() for one in stack])
        with_mean, mean_square = with_mean + own @ mean, mean_square + mean.square().sum()
    cosines_E = dots_E / (squares_E * squares_E[expert]).sqrt()
    cosines_E[expert] = -math.inf
    nearest = int(cosines_E.argmax())
    return {
        "tensors": norms,
        "cosine_to_mean": float(with_mean / (squares_E[expert] * mean_square).sqrt()),
        "most_similar": nearest,
        "cosine_to_most_similar": float(cosines_E[nearest]),
    }


def rows_of(found: dict[str, Any], shown: int) -> Iterator[str]:
    """The differences for a person: the first of each kind."""
    kinds = [
        ("only in the first", [(name, "") for name in found["only_in_first"]]),
        ("only in the second", [(name, "") for name in found["only_in_second"]]),
        ("shape", [(name, f"{a} and {b}") for name, (a, b) in found["shapes"].items()]),
        ("dtype", [(name, f"{a} and {b}") for name, (a, b) in found["dtypes"].items()]),
        ("values", [(name, f"up to {v['max_abs']:.3g} apart, {v['relative']:.3g} of the norm, {v['elements']:,} elements")
                    for name, v in sorted(found["values"].items(), key=lambda item: -item[1]["relative"])]),
    ]  # fmt: skip
    for kind, members in kinds:
        if members:
            yield f"{kind}: {len(members)} tensor(s)"
        width = max((len(name) for name, _ in members[:shown]), default=0)
        yield from (f"  {name:{width}}  {text}".rstrip() for name, text in members[:shown])
        if len(members) > shown:
            yield f"  ... and {len(members) - shown} more; --json lists all"
    yield f"{found['equal']} tensors have the same values"
