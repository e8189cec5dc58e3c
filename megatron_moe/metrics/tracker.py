"""The records of a run and the writers that take them. The keys of each record are an interface that tools rely on.

Only rank 0 has writers: on other ranks every call is cheap and does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.output import LoggingConfig
from megatron_moe.metrics.writers import ConsoleWriter, JsonlWriter, Record, TensorBoardWriter, Writer

EVENTS = ("start", "save", "load", "alert", "repeat", "stop")


class Tracker:
    """Turns what happened into records, for every writer alike."""

    def __init__(self, writers: Sequence[Writer] = ()):
        self.writers = list(writers)

    def set_length(self, train_iterations: int) -> None:
        """The iteration at which the run will end, where that is known better than at its start."""
        for writer in self.writers:
            if isinstance(writer, ConsoleWriter):
                writer.train_iterations = train_iterations

    def log_train(
        self,
        *,
        iteration: int,
        consumed_samples: int,
        consumed_tokens: int,
        lm_loss: float,
        grad_norm: float | None,
        learning_rate: float,
        iteration_time_ms: float,
        tokens_per_second: float,
        tflops_per_device: float,
        peak_memory_bytes: int,
        moe_aux_loss: float = 0.0,
        moe_z_loss: float = 0.0,
        kd_loss: float | None = None,
        mtp_losses: Sequence[float] = (),
        weight_decay: float | None = None,
        global_batch_size: int | None = None,
        seq_length: int | None = None,
        loss_scale: float = 1.0,
        skipped_iterations: int = 0,
        moe: Sequence[Record] = (),
    ) -> None:
        """One logged step; `kd_loss` is KL(teacher || student) in nats, None without a teacher; `mtp_losses` those of the further
        tokens of multi-token prediction, `mtp_1_loss` and so on in the record; `grad_norm` None in a step that was
        skipped; `skipped_iterations` counts those since the run began; `moe` holds a `moe_layer_record` per MoE layer."""
        self._write({
            "event": "train", "iteration": iteration, "consumed_samples": consumed_samples, "consumed_tokens": consumed_tokens,
            "lm_loss": lm_loss, **{f"mtp_{n}_loss": loss for n, loss in enumerate(mtp_losses, start=1)}, "kd_loss": kd_loss, "moe_aux_loss": moe_aux_loss, "moe_z_loss": moe_z_loss, "grad_norm": grad_norm,
            "learning_rate": learning_rate, "weight_decay": weight_decay, "global_batch_size": global_batch_size,
            "seq_length": seq_length, "loss_scale": loss_scale, "skipped_iterations": skipped_iterations,
            "iteration_time_ms": iteration_time_ms, "tokens_per_second": tokens_per_second,
            "tflops_per_device": tflops_per_device, "peak_memory_bytes": peak_memory_bytes, "moe": list(moe),
        })  # fmt: skip

    def log_eval(self, *, iteration: int, split: str, lm_loss: float, tokens: int) -> None:
        self._write({
            "event": "eval", "iteration": iteration, "split": split, "lm_loss": lm_loss, "perplexity": perplexity(lm_loss),
            "tokens": tokens,
        })  # fmt: skip

    def event(self, name: str, **values: Any) -> None:
        """start, save, load, alert, repeat (of a step) or stop (with reason=...). An alert about experts also has condition, layer, layers, value and flag."""
        assert name in EVENTS, f"{name} is not one of {EVENTS}"
        assert name != "stop" or "reason" in values, f"stop wants a reason, not only {values}"
        self._write({"event": name, **values})

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, record: Record) -> None:
        if not self.writers:
            return
        # A NaN is null in metrics.jsonl; the alert after it keeps what it was.
        bad = dict(_non_finite(record))
        alert = {"event": "alert", "iteration": record.get("iteration"), "reason": "not finite", "values": bad}
        for writer in self.writers:
            writer.write(record)
            if bad:
                writer.write(alert)


def build_tracker(config: LoggingConfig, run_dir: str | None, rank: int, train_iterations: int, global_batch_size: int) -> Tracker:
    """Terminal always, metrics.jsonl with a run directory or --metrics-path, TensorBoard when asked for; nothing off rank 0."""
    if rank != 0:
        return Tracker()
    writers: list[Writer] = [ConsoleWriter(train_iterations, global_batch_size, panel_rows=config.panel_rows)]
    path = config.metrics_path or (Path(run_dir) / "metrics.jsonl" if run_dir else None)
    if path:
        writers.append(JsonlWriter(path, () if config.log_expert_load else ("expert_load",)))
    if config.tensorboard_dir:
        writers.append(TensorBoardWriter(config.tensorboard_dir, config.tensorboard_queue_size))
    return Tracker(writers)


def moe_layer_record(
    layer: int,
    tokens_per_expert: Sequence[float],
    dropped_fraction: float,
    router_entropy: float,
    router_logit_rms: float = 0.0,
    bias_range: tuple[float, float] | None = None,
    sent_bytes: float = 0.0,
    far_bytes: float | None = None,
) -> Record:
    """The entry of one MoE layer from its counts over the global batch, before anything is dropped.

    Counts (6, 2, 0, 0) have mean 2: load_max_over_mean 3, load_p50_over_mean 0.5, load_min_over_mean 0, dead_experts 2,
    expert_load (.75, .25, 0, 0). router_entropy is 1 for a uniform and 0 for a decided router; router_logit_rms the root mean square
    of logsumexp(logits); bias_min and bias_max are null without expert biases; sent_bytes is what a rank sent to other ranks in
    the step for rows and their gradients (mean over ranks), sent_bytes_near and sent_bytes_far what of it stayed within its node and
    crossed to another: null where it is not known which ranks share a node.
    """
    counts = [float(n) for n in tokens_per_expert]
    total, num_experts = sum(counts), len(counts)
    shares = [n / total if total else 0.0 for n in counts]
    bias_min, bias_max = bias_range or (None, None)
    return {
        "layer": layer,
        "load_max_over_mean": max(shares) * num_experts,
        "load_min_over_mean": min(shares) * num_experts,
        "dead_experts": sum(n == 0 for n in counts),
        "dropped_fraction": float(dropped_fraction),
        "router_entropy": float(router_entropy),
        **{f"load_p{p}_over_mean": percentile(shares, p) * num_experts for p in (5, 50, 95)},
        "router_logit_rms": float(router_logit_rms),
        "bias_min": bias_min,
        "bias_max": bias_max,
        "sent_bytes": float(sent_bytes),
        "sent_bytes_near": None if far_bytes is None else float(sent_bytes - far_bytes),
        "sent_bytes_far": None if far_bytes is None else float(far_bytes),
        "expert_load": shares,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values: of (0, 0, 2, 6), 50 -> 1."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if not loss > 700 else math.inf


def _non_finite(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """("lm_loss", "nan"), ("moe[1].router_entropy", "inf"), ... of a record."""
    if isinstance(value, dict):
        for key, v in value.items():
            yield from _non_finite(v, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from _non_finite(v, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
