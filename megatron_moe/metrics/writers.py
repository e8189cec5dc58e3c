"""Where records go: a file of JSON lines, the terminal, TensorBoard.

A record is a flat dict with an "event" key (train, eval, start, save, load, alert, stop); only `moe` is a list of dicts, one
per MoE layer. A writer takes what it can show and leaves the rest.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_moe.metrics.panel import Record, expert_panel
from megatron_moe.metrics.throughput import format_duration


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------- JSON lines


class JsonlWriter:
    """Appends one JSON object per line; every line is on its way to disk when `write` returns.

    The file only ever holds whole lines: the half line of a run that was killed is cut off when the next run opens the file.
    Strict JSON has no NaN and no infinity: they become null, and the tracker adds an `alert` that names them.
    `left_out`: keys of the MoE layers that are not written.
    """

    def __init__(self, path: str | Path, left_out: Sequence[str] = ()):
        self._left_out = left_out
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open for the whole run
        _cut_half_line(self._file)

    def write(self, record: Record) -> None:
        if "moe" in record:
            record = record | {"moe": [self._layer(layer) for layer in record["moe"]]}
        line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:  # disk full: leave no half line behind
            self._file.truncate(start)
            raise OSError(error.errno, f"{error.strerror}: the metrics of this step cannot be written", self._file.name) from error

    def close(self) -> None:
        self._file.close()

    def _layer(self, layer: Record) -> Record:
        kept = {key: value for key, value in layer.items() if key not in self._left_out}
        if "expert_load" in kept:  # five digits tell experts apart, and keep the lines of a thousand experts short
            kept["expert_load"] = [float(f"{share:.5g}") for share in kept["expert_load"]]
        return kept


def _cut_half_line(file: Any, block: int = 1 << 16) -> None:
    """Truncate behind the last newline, reading backwards."""
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        start = max(position - block, 0)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        file.truncate(position)


def finite(value: Any) -> Any:
    """A copy with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- terminal


class ConsoleWriter:
    """One line per record, in the words of Megatron's log; below a training step a table of its MoE layers."""

    def __init__(
        self,
        train_iterations: int,
        global_batch_size: int,
        show: Callable[[str], None] | None = None,
        panel_rows: int | None = 0,
    ):
        self.train_iterations, self.global_batch_size, self.panel_rows = train_iterations, global_batch_size, panel_rows
        self._show = show or _print

    def write(self, record: Record) -> None:
        parts = {"train": self._train_parts, "eval": _eval_parts, "alert": _alert_parts}.get(record["event"], _event_parts)(record)
        self._show(" " + " | ".join(parts))
        if record.get("moe") and self.panel_rows != 0:
            for line in expert_panel(record["moe"], self.panel_rows):
                self._show(" " + line)

    def close(self) -> None:
        pass

    def _train_parts(self, r: Record) -> Iterator[str]:
        total = self.train_iterations
        yield f"iteration {r['iteration']:8d}/{total:8d}"
        yield f"consumed samples: {r['consumed_samples']:12d}"
        yield f"elapsed time per iteration (ms): {r['iteration_time_ms']:.1f}"
        yield f"learning rate: {r['learning_rate']:.3E}"
        yield f"global batch size: {r['global_batch_size'] or self.global_batch_size:5d}"
        yield f"lm loss: {r['lm_loss']:.6E}"
        yield from (f"{key.replace('_', ' ')}: {value:.6E}" for key, value in r.items() if key.startswith("mtp_"))
        if r["kd_loss"] is not None:
            yield f"kd loss: {r['kd_loss']:.6E}"
        if r["moe"]:
            yield f"moe loss: {r['moe_aux_loss']:.6E}"
        if r["moe_z_loss"]:
            yield f"z loss: {r['moe_z_loss']:.6E}"
        if r["loss_scale"] != 1:
            yield f"loss scale: {r['loss_scale']:.1f}"
        yield "grad norm: not finite, step skipped" if r["grad_norm"] is None else f"grad norm: {r['grad_norm']:.3f}"
        yield f"tokens per second: {r['tokens_per_second']:.1f}"
        yield f"TFLOP/s: {r['tflops_per_device']:.3f}"
        if r["moe"]:
            worst = max(r["moe"], key=lambda layer: layer["load_max_over_mean"])
            yield f"expert load max/mean: {worst['load_max_over_mean']:.2f} (layer {worst['layer']})"
            yield f"dead experts: {sum(layer['dead_experts'] for layer in r['moe'])}"
            yield f"dropped: {100 * max(layer['dropped_fraction'] for layer in r['moe']):.1f}%"
        yield f"skipped iterations: {r['skipped_iterations']:3d}"
        yield f"time left: {format_duration((total - r['iteration']) * r['iteration_time_ms'] / 1000)}"


def _eval_parts(r: Record) -> Iterator[str]:
    yield f"{r['split']} loss at iteration {r['iteration']}"
    yield f"lm loss: {r['lm_loss']:.6E}"
    yield f"perplexity: {r['perplexity']:.6E}"
    yield f"tokens: {r['tokens']}"


def _alert_parts(r: Record) -> Iterator[str]:
    """The reason is the sentence that people read; of an alert about a layer the rest says it again for programs."""
    return _event_parts({key: value for key, value in r.items() if key not in ("condition", "layer", "layers", "value", "flag")})


def _event_parts(r: Record) -> Iterator[str]:
    yield r["event"]
    yield from (f"{key.replace('_', ' ')}: {value}" for key, value in r.items() if key != "event" and value is not None)


def _print(line: str) -> None:
    print(line, flush=True)


# ---------------------------------------------------------------- TensorBoard


class TensorBoardWriter:
    """Every number of a train or eval record as a scalar over the iteration, per MoE layer where there are layers."""

    def __init__(self, directory: str | Path, queue_size: int = 1000):
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                f"--tensorboard-dir ({directory}) needs the tensorboard package: pip install 'megatron_moe[track]', or leave it out"
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), max_queue=queue_size)

    def write(self, record: Record) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """("train/lm_loss", 2.3), ("eval/valid/perplexity", 9.9), ("moe/layer_1/dead_experts", 0), ...

    Shares of single experts stay in metrics.jsonl: a thousand curves help nobody.
    """
    if record["event"] not in ("train", "eval"):
        return
    prefix = "train" if record["event"] == "train" else f"eval/{record['split']}"
    for key, value in record.items():
        if _is_number(value) and key != "iteration":
            yield f"{prefix}/{key}", value
    for layer in record.get("moe") or ():
        for key, value in layer.items():
            if _is_number(value) and key != "layer":
                yield f"moe/layer_{layer['layer']}/{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
