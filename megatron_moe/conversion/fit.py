"""Does a checkpoint hold the model that its own configuration describes? And which of its tensors are taken, in which types."""

from __future__ import annotations

import torch

from megatron_moe.checkpoint.load import SHOWN, describe, differences
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.source import Source, Tensors
from megatron_moe.model.plain import build_plain
from megatron_moe.optimizer.groups import build_optimizer

NEEDED = ("config", "architecture", "vocab_size", "eod", "tokenizer", "progress")  # what training and generation read of the meta


def run_of(source: Source) -> RunConfig:
    """The run that wrote it; ConfigError when its configuration cannot be read."""
    if missing := [key for key in NEEDED if key not in source.meta]:
        raise ConfigError([f"{source.path}: the configuration lacks {', '.join(missing)}; it was not written by a training run"])
    try:
        return RunConfig.from_dict(source.meta["config"])
    except (ConfigError, AttributeError, TypeError) as error:
        raise ConfigError([f"{source.path}: its configuration cannot be used: {error}"]) from None


def expected_tensors(source: Source) -> tuple[Tensors, Tensors]:
    """(parameters, optimizer state) that the configuration asks for: built without memory."""
    run = run_of(source)
    model = build_plain(run, source.meta["vocab_size"])
    return describe(model_state(model)), describe(optimizer_state(model, build_optimizer(model, run.optimizer)))


def tensors_to_write(source: Source, with_optimizer: bool, dtype: str | dict[str, str] | None = None) -> Tensors:
    """Names, shapes and types of what a conversion writes: everything the configuration asks for, neither more nor less.

    Weights get `dtype` (of all, or of each by name), or the type the model is trained in; stored in a narrower one they are widened, which is exact.
    ConfigError names the tensors that do not fit.
    """
    model, optimizer = expected_tensors(source)
    wanted = model | (optimizer if with_optimizer else {})
    has_optimizer = any(name.startswith("optimizer.") for name in source.tensors)
    if with_optimizer and optimizer and not has_optimizer:
        raise ConfigError([f"--include-optimizer: {source.path} holds no optimizer state; leave the flag out"])
    stored = {name: entry for name, entry in source.tensors.items() if with_optimizer or not name.startswith("optimizer.")}
    if problems := misfits(stored, wanted):
        raise ConfigError([f"{source.path}: {problem}" for problem in problems])
    if dtype is not None:
        of = dtype if isinstance(dtype, dict) else dict.fromkeys(model, dtype)
        wanted |= {name: entry | {"dtype": of.get(name, entry["dtype"])} for name, entry in model.items()}
    return wanted


def misfits(stored: Tensors, wanted: Tensors) -> list[str]:
    """Missing, misshapen and extra tensors, types that would lose something; the first ten of each kind."""
    widened = {
        name: entry | {"dtype": wanted[name]["dtype"]} if name in wanted and is_exact(entry["dtype"], wanted[name]["dtype"]) else entry
        for name, entry in stored.items()
    }
    lines = differences(widened, wanted)
    lines += [f"extra    {name}: in the checkpoint, not in this model" for name in stored if name not in wanted]
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(line.split()[0], []).append(line)
    return [
        line for kind, some in kinds.items() for line in [*some[:SHOWN], *([f"{kind}: {len(some) - SHOWN} more"] * (len(some) > SHOWN))]
    ]


def is_exact(narrow: str, wide: str) -> bool:
    """Whether every number of the one type is a number of the other."""
    a, b = getattr(torch, narrow), getattr(torch, wide)
    return a.is_floating_point and b.is_floating_point and torch.promote_types(a, b) == b
