"""What a run leaves behind: checkpoints and logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, fields_of, flag

_OF_SAVE = ("save_interval", "save_interval_minutes", "async_save", "keep_every", "save_best")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    save: str | None = flag(None, "run directory: configuration, metrics and checkpoints", metavar="DIR")
    save_interval: int | None = flag(None, "steps between checkpoints; the last step is always saved", minimum=1)
    save_interval_minutes: float | None = flag(
        None, "minutes between checkpoints, by the clock of rank 0; with --save-interval both count", above=0
    )
    async_save: bool = flag(
        False, "write checkpoints while training goes on: a step waits for one copy of the tensors to the host's memory, which needs room "
        "for a rank's part of the checkpoint")  # fmt: skip
    save_failure: Literal["stop", "continue"] = flag(
        "stop", "what follows a save that fails, for a full disk say; continue: an alert, and training goes on to the next save"
    )
    keep_last: int | None = flag(None, "delete older checkpoints and keep this many", minimum=1)
    keep_every: int | None = flag(None, "with --keep-last: never delete a checkpoint whose iteration is a multiple of this", minimum=1)
    save_best: bool = flag(
        False, "save after an evaluation with the lowest validation loss so far, and keep that checkpoint; DIR/best is short for it",
        names=("keep-best",))  # fmt: skip
    load: str | None = flag(None, "run directory to go on from; may be the one of --save, which is then allowed to be empty", metavar="DIR")
    load_hf: str | None = flag(
        None, "folder of Hugging Face transformers to start from: its config.json says what the model is, its weights and tokenizer are taken, "
        "in any layout; with --load too, it is for the first start, without a checkpoint; with --moe-use-upcycling it is the dense model",
        metavar="DIR")  # fmt: skip
    ckpt_step: int | None = flag(None, "load this iteration and no other; the newest that verifies when not given",
                                 names=("load-iteration",), minimum=0)  # fmt: skip
    ckpt_verify: Literal["crc", "size", "off"] = flag("crc", "how a checkpoint is checked before it is loaded")
    exit_on_missing_checkpoint: bool = flag(
        False, "refuse to start when --load holds no checkpoint, also where it is the directory of --save"
    )
    finetune: bool = flag(False, "take the weights only: iteration, data position and optimizer start fresh")
    reset_iteration: bool = flag(
        False, "go on from --load with its optimizer and its place in the data, and count iterations from 0 again; needs another --save"
    )
    no_load_optim: bool = flag(False, "leave the optimizer state of the checkpoint alone")
    no_save_optim: bool = flag(False, "save weights only")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.ckpt_step is not None and not self.load:
            yield f"--ckpt-step ({self.ckpt_step}) needs --load DIR"
        if self.reset_iteration and not self.load:
            yield "--reset-iteration needs --load DIR: it is about the iteration of what is loaded"
        if self.reset_iteration and self.finetune:
            yield "--reset-iteration keeps optimizer and place in the data, --finetune starts both anew; drop one"
        if self.exit_on_missing_checkpoint and not self.load:
            yield "--exit-on-missing-checkpoint needs --load DIR"

    def warnings(self) -> Iterator[str]:
        """Flags that were given and do nothing."""
        for s in fields_of(type(self)):
            if s.name in _OF_SAVE and getattr(self, s.name) != s.default and not self.save:
                shown = "" if s.kind is bool else f" ({getattr(self, s.name):g})"
                yield f"{s.option}{shown} has no effect without --save DIR"
        if self.keep_every and self.save and not self.keep_last:
            yield f"--keep-every ({self.keep_every}) has no effect without --keep-last: every checkpoint is kept"


@dataclass(frozen=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = flag(100, "steps between log lines and metrics", minimum=1)
    metrics_path: str | None = flag(None, "metrics.jsonl; in the run directory when not given", metavar="FILE")
    tensorboard_dir: str | None = flag(None, "write TensorBoard events here (needs the tensorboard package)", metavar="DIR")
    tensorboard_queue_size: int = flag(1000, "events kept before they are written", minimum=1)
    moe_panel: Literal["auto", "all", "off"] = flag(
        "auto", "the table of the MoE layers below each log line: all of them, or those with the busiest experts (auto: at most 8)"
    )
    log_expert_load: bool = flag(
        True, "the load of every expert in metrics.jsonl, which the heat maps of tools/plot_run.py are drawn from; 10 bytes per expert "
        "and logged step")  # fmt: skip
    moe_alerts: bool = flag(
        True, "a warning with advice when the experts of a layer drop tokens, die or collapse, or its router's logits or biases grow"
    )
    moe_alert_dropped_fraction: float = flag(0.1, "dropped share of a layer's assignments above which it warns", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        return iter(())

    @property
    def panel_rows(self) -> int | None:
        """Layers in the table at most; None: all."""
        return {"auto": 8, "all": None, "off": 0}[self.moe_panel]
