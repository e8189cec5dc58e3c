"""What was found, for people and for machines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.training.planning.machines import Assumptions, Machine
from megatron_moe.training.planning.search import Found, Planned, pinned
from megatron_moe.training.planning.states import states

COMPONENTS = ("parameters", "gathered", "gradients", "optimizer", "activations", "dispatch", "loss", "backward")
TERMS = ("compute", "elementwise", "host", "tp", "ep", "cp", "dp", "bubble", "p2p", "optimizer")


def as_json(found: Found, run: RunConfig, vocab_size: int, machine: Machine, devices: int, assumed: Assumptions) -> dict[str, Any]:
    """Bytes and seconds. Keys: machine, devices, assumptions, global_batch_size, layouts (layout, flags, memory, seconds, bound_by,
    tokens_per_second_per_device, tflops_per_device), counts, left_out (reason -> combinations), nearest and remedies (where none fits)."""
    fits = bool(found.best)
    return {
        "machine": asdict(machine), "devices": devices, "assumptions": asdict(assumed),
        "global_batch_size": pinned(run, devices).training.global_batch_size,
        "layouts": [_one(p, run, vocab_size, devices) for p in found.best],
        "counts": {"tried": found.tried, "valid": found.valid, "fitting": found.fitting},
        "left_out": dict(found.left_out.most_common()),
        "nearest": _one(found.nearest, run, vocab_size, devices) if found.nearest and not fits else None,
        "remedies": [] if fits else list(remedies(found, run, vocab_size, machine, assumed)),
    }  # fmt: skip


def _one(p: Planned, run: RunConfig, vocab_size: int, devices: int) -> dict[str, Any]:
    return {
        "layout": asdict(p.layout), "flags": command_flags(p, run, devices),
        "memory": {name: round(getattr(p.memory, name)) for name in COMPONENTS} | {"total": round(p.memory.total)},
        "seconds": {name: getattr(p.time, name) for name in TERMS} | {"total": p.time.total, "hidden": p.time.hidden},
        "bound_by": p.time.bound, "tokens_per_second_per_device": tokens_per_second(p, run, devices),
        "tflops_per_device": tflops(p, run, vocab_size, devices),
    }  # fmt: skip


def command_flags(p: Planned, run: RunConfig, devices: int) -> list[str]:
    batch = pinned(run, devices).training.global_batch_size
    laid = replace(run, training=replace(run.training, global_batch_size=batch))
    return [*p.layout.flags(laid), "--global-batch-size", str(batch)]


def tokens_per_second(p: Planned, run: RunConfig, devices: int) -> float:
    return pinned(run, devices).training.global_batch_size * run.training.seq_length / p.time.total / devices


def tflops(p: Planned, run: RunConfig, vocab_size: int, devices: int) -> float:
    """As model/flops.py counts them: without recomputation."""
    return tokens_per_second(p, run, devices) * flops_per_token(run.model, run.moe, run.training.seq_length, vocab_size) / 1e12


# ---------------------------------------------------------------- for people


def as_text(found: Found, run: RunConfig, vocab_size: int, machine: Machine, devices: int, assumed: Assumptions) -> str:
    return "\n".join(_lines(found, run, vocab_size, machine, devices, assumed))


def _lines(found: Found, run: RunConfig, vocab_size: int, machine: Machine, devices: int, assumed: Assumptions) -> Iterator[str]:
    counts, room = parameter_counts(run.model, run.moe, vocab_size), machine.memory_gb * (1 - assumed.memory_reserve)
    yield (f"{counts.total / 1e9:.3g} billion parameters, {counts.active / 1e9:.3g} active; global batch "
           f"{pinned(run, devices).training.global_batch_size} x {run.training.seq_length} tokens")  # fmt: skip
    yield (f"{devices} x {machine.name}: {room:.3g} GB of {machine.memory_gb:g} for tensors, {machine.peak_tflops:g} TFLOP/s, "
           f"{machine.devices_per_node} per node, {machine.intra_node_bandwidth:g} and {machine.inter_node_bandwidth:g} GB/s within and between")  # fmt: skip
    yield f"{found.tried} combinations, {found.valid} valid layouts, {found.fitting} fit\n"
    if found.best:
        yield from _table([_row(i, p, run, vocab_size, devices) for i, p in enumerate(found.best, start=1)])
        yield "\nGB on the fullest rank, and seconds of a step, by part:"
        for i, p in enumerate(found.best, start=1):
            parts = [f"{name} {getattr(p.memory, name) / 1e9:.2f}" for name in COMPONENTS if getattr(p.memory, name) > 5e6]
            times = [f"{name} {getattr(p.time, name):.3g}" for name in TERMS if getattr(p.time, name) > 0.005 * p.time.total]
            yield f"{i:3}  {', '.join(parts)} | {', '.join(times)}"
        yield "\nFlags, to be put behind the command:"
        yield from (f"{i:3}  {shlex.join(command_flags(p, run, devices))}" for i, p in enumerate(found.best, start=1))
    else:
        yield "no layout fits. What would have to change:"
        yield from (f"  - {remedy}" for remedy in remedies(found, run, vocab_size, machine, assumed))
    if found.left_out:
        yield "\nLeft out, combinations by reason:"
        yield from (f"{count:8}  {why}" for why, count in found.left_out.most_common())


def _row(i: int, p: Planned, run: RunConfig, vocab_size: int, devices: int) -> tuple[str, ...]:
    return (
        str(i), str(p.layout), f"{p.memory.total / 1e9:.1f}", f"{p.time.total:.3g}", f"{tokens_per_second(p, run, devices):.0f}",
        f"{tflops(p, run, vocab_size, devices):.3g}", p.time.bound,
    )  # fmt: skip


HEAD = ("#", "layout", "GB", "s/step", "tokens/s/device", "TFLOP/s", "bound by")


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (HEAD, *rows)) for i in range(len(HEAD))]
    for row in (HEAD, *rows):
        yield "  ".join(
            cell.ljust(width) if i in (1, 6) else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()


# ---------------------------------------------------------------- what would have to change


def remedies(found: Found, run: RunConfig, vocab_size: int, machine: Machine, assumed: Assumptions) -> Iterator[str]:
    """One sentence each, from the valid layout that needs least."""
    if found.nearest is None:
        yield "no combination is valid on this number of devices; the reasons are below, and --fixed keeps some out"
        return
    p, layout = found.nearest, found.nearest.layout
    room = machine.memory_gb * 1e9 * (1 - assumed.memory_reserve)
    over, need = p.memory.total - room, p.memory.total
    yield f"the leanest valid layout ({layout}) needs {need / 1e9:.1f} GB, {over / 1e9:.1f} GB more than the {room / 1e9:.1f} GB that tensors get"
    yield f"--device-memory-gb {need / (1 - assumed.memory_reserve) / 1e9:.0f} or more would hold it"
    held = states(run, layout, vocab_size, p.memory.pipeline_rank)
    of_states = p.memory.parameters + p.memory.gathered + p.memory.gradients + p.memory.optimizer
    per_element = of_states / max(held.elements, 1)
    if of_states > over:
        fewer = over / per_element
        yield f"{fewer / 1e6:.0f} million fewer parameters on a rank, of {held.elements / 1e6:.0f} million: fewer or narrower layers or experts"
        more = of_states / (of_states - over)
        yield f"about {_next_multiple(layout.devices * more, layout.devices)} devices instead of {layout.devices}, over which ZeRO 3 spreads them"
    tokens = p.memory.activations + p.memory.dispatch + p.memory.loss + p.memory.backward
    if tokens > over:
        shorter = int(run.training.seq_length * (1 - over / tokens)) // 64 * 64
        if shorter:
            yield f"--seq-length {shorter} or less: {tokens / 1e9:.1f} GB grow with the tokens of a micro-batch"
    if assumed.load_skew > 1:
        yield f"a smaller --load-skew than {assumed.load_skew:g}, if the experts are better balanced than that"


def _next_multiple(x: float, of: int) -> int:
    return -(-int(x + 0.999) // of) * of
