"""Are two checkpoints the same model? Every tensor bit by bit, then the logits of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.state import model_state
from megatron_moe.conversion.fit import run_of
from megatron_moe.conversion.source import Selection, Source, size_of
from megatron_moe.model.gpt import GPT
from megatron_moe.model.plain import build_plain


def tensor_differences(selection: Selection, target: Source, on_bytes: Callable[[int], Any] = lambda _: None) -> list[str]:
    """One line per tensor that is not the same in both: names, shapes, types, then every bit."""
    ours, theirs = selection.tensors, target.tensors
    lines = [f"missing  {name}: not in the target" for name in ours if name not in theirs]
    lines += [f"extra    {name}: in the target, not in the source" for name in theirs if name not in ours]
    both = [name for name in theirs if name in ours]
    lines += [
        f"shape    {n}: {ours[n]['shape']} in the source, {theirs[n]['shape']} in the target"
        for n in both
        if ours[n]["shape"] != theirs[n]["shape"]
    ]
    lines += [
        f"dtype    {n}: {ours[n]['dtype']} in the source, {theirs[n]['dtype']} in the target"
        for n in both
        if ours[n]["dtype"] != theirs[n]["dtype"]
    ]
    comparable = [name for name in both if ours[name] == theirs[name]]
    for (name, a), (_, b) in zip(selection.read(comparable), target.read(comparable)):
        on_bytes(size_of(ours[name]))
        if (line := _value_difference(a, b)) is not None:
            lines.append(f"values   {name}: {line}")
    return lines


def _value_difference(a: Tensor, b: Tensor) -> str | None:
    """Compares bits: 0.0 and -0.0 differ, a NaN equals itself."""
    a_bytes, b_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    if torch.equal(a_bytes, b_bytes):
        return None
    unequal = (a_bytes.view(a.numel(), -1) != b_bytes.view(a.numel(), -1)).any(1).nonzero().flatten()
    first = int(unequal[0])
    where = [int(i) for i in torch.unravel_index(torch.tensor(first), a.shape)]
    return f"{len(unequal)} of {a.numel()} elements differ, the first at {where}: {a.flatten()[first].item()} in the source, {b.flatten()[first].item()} in the target"


def logits_difference(selection: Selection, target: Source, tokens_BS: Tensor) -> float:
    """Largest difference of the logits; exactly 0 when both load as the same model. Needs memory for one model.

    Each side is built by its own configuration, with the kernels of the source's: a setting that was translated wrongly is seen too. Where
    something was left out (--allow-lossy), the difference is what it is worth.
    """
    source = selection.source
    run, vocab_size = run_of(source), source.meta["vocab_size"]
    there = dataclasses.replace(run_of(target), training=run.training)
    is_whole = all(name in selection.tensors for name in source.tensors if name.startswith("model."))
    first = logits(build_plain(run, vocab_size), selection if is_whole else source, tokens_BS)[..., :vocab_size]
    second = logits(build_plain(there, target.meta["vocab_size"]), target, tokens_BS)[..., :vocab_size]
    if first.shape != second.shape:
        return float("inf")
    return 0.0 if torch.equal(first, second) else float((first - second).abs().nan_to_num(float("inf")).max())


@torch.no_grad()
def logits(model: GPT, source: Source | Selection, tokens_BS: Tensor) -> Tensor:
    """Fill every parameter from the source, then a plain forward."""
    model.to_empty(device="cpu").eval()
    state = model_state(model)
    for tensor in state.values():
        tensor.fill_(float("nan"))  # nothing of an earlier source may remain
    for name, tensor in source.read(list(state)):
        state[name].copy_(tensor)
    return model(tokens_BS, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS))
