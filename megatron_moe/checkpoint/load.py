"""Fill tensors in place from a checkpoint that was saved under any layout."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.safe_reader import SafePlanner, SafeReader

SHOWN = 10  # differences listed in an error


def load_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], complete: Sequence[str] = ("model.",), process_group=None, optional: Sequence[str] = ()
) -> int:
    """Read every tensor of `tensors` in place; returns how many this rank filled.

    Names, global shapes and dtypes must agree with the checkpoint. Under a prefix in `complete` the checkpoint may hold
    nothing else either (over all ranks: a pipeline stage asks only for its own). Otherwise nothing is read at all. What begins with
    one of `optional` may be in one of them alone: it stays as it is.
    """
    path, ranks = Path(path), Ranks(process_group)
    saved = ranks.first(f"reading {path.name}/.metadata", lambda: describe_metadata(path))
    tensors = {name: t for name, t in tensors.items() if name in saved or not name.startswith(tuple(optional))}
    wanted = describe(tensors)
    reports = ranks.all(f"comparing with {path.name}", lambda: (differences(saved, wanted), list(wanted)))
    problems = list(dict.fromkeys(problem for report, _ in reports for problem in report))
    asked = {name for _, names in reports for name in names}
    problems += [
        f"extra    {name}: in the checkpoint, not in this model"
        for name in sorted(saved.keys() - asked)
        if name.startswith(tuple(complete)) and not name.startswith(tuple(optional))
    ]
    if problems:
        raise CheckpointError(_listed(f"{path.name} does not fit, nothing was loaded", problems))
    planner = SafePlanner()
    ranks.all(f"loading {path.name}", lambda: _read(path, tensors, planner, ranks))
    ranks.all(f"loading {path.name}", lambda: _check_restored(tensors, planner.restored))
    return len(tensors)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """name -> global shape and dtype, the way manifest.json spells them."""
    return {name: {"shape": list(t.shape), "dtype": dtype_name(t.dtype)} for name, t in tensors.items()}


def describe_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The same of what is saved, from the file that the reading itself follows."""
    entries = SafeReader(path).read_metadata().state_dict_metadata
    return {
        name: {"shape": list(entry.size), "dtype": dtype_name(entry.properties.dtype)}
        if hasattr(entry, "size")
        else {"shape": None, "dtype": "pickled object"}
        for name, entry in entries.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differences(saved: dict[str, dict], wanted: dict[str, dict]) -> list[str]:
    """Missing names, other shapes, other dtypes. torch would cast a dtype without a word."""
    problems = []
    for name, now in wanted.items():
        then = saved.get(name)
        if then is None:
            problems.append(f"missing  {name}: not in the checkpoint")
        elif then["shape"] is None:
            problems.append(f"kind     {name}: a pickled object in the checkpoint, a tensor now")
        elif then["shape"] != now["shape"]:
            problems.append(f"shape    {name}: {then['shape']} in the checkpoint, {now['shape']} now")
        elif then["dtype"] != now["dtype"]:
            problems.append(f"dtype    {name}: {then['dtype']} in the checkpoint, {now['dtype']} now")
    return problems


def explain(error: CheckpointException) -> str:
    """One line per rank instead of torch's page of tracebacks; `weights_only` hints would only mislead."""
    lines = {}
    for rank, (cause, _) in error.failures.items():
        text = str(cause) if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: {cause}"
        if "weights_only" in text or "Weights only" in text:
            text = "a tensor's bytes are damaged, or are not a tensor; nothing was executed"
        lines[rank] = text.strip().splitlines()[0] if text.strip() else type(cause).__name__
    if len(set(lines.values())) == 1 and len(lines) != 1:
        return next(iter(lines.values()))
    return "; ".join(f"rank {rank}: {text}" for rank, text in lines.items())


def _read(path: Path, tensors: Mapping[str, Tensor], planner: SafePlanner, ranks: Ranks) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                dict(tensors), storage_reader=SafeReader(path), planner=planner, process_group=ranks.group, no_dist=not ranks.is_distributed
            )
        except CheckpointException as error:
            raise CheckpointError(explain(error)) from error


def _check_restored(tensors: Mapping[str, Tensor], restored: Mapping[str, int]) -> None:
    """Every element of every tensor came from the checkpoint."""
    sizes = {name: (t.to_local() if isinstance(t, DTensor) else t).numel() for name, t in tensors.items()}
    unread = [f"{name}: {restored[name]} of {size} elements" for name, size in sizes.items() if restored[name] != size]
    if unread:
        raise CheckpointError(_listed(f"restored {len(sizes) - len(unread)} of {len(sizes)} tensors", unread))


def _listed(head: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([f"{head}:", *lines[:SHOWN], *more])
