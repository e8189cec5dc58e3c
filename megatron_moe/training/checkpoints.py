"""What a training checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import megatron_moe
from megatron_moe.checkpoint.files import iterations_in, run_directory
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.state import MTP, model_state, optimizer_state
from megatron_moe.config.data import split_shares
from megatron_moe.config.pace import Consumed
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.hf.start import fill, open_start
from megatron_moe.model.gpt import GPT
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.training.distributed import World
from megatron_moe.training.preflight import Prepared


@dataclass
class Progress:
    """Where a run is. Data order, schedule and randomness are functions of it, so nothing else needs to be kept."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    # Megatron's data order alone: training, validation and test samples it was drawn for, by the first run, for good
    ordered_samples: list[int] | None = None

    @property
    def consumed(self) -> Consumed:
        return Consumed(self.iteration, self.consumed_samples, self.consumed_tokens)

    def advance(self, samples: int, tokens: int) -> None:
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens


def contents(
    prepared: Prepared, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress, loss_scale: LossScale | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state of the run: the tensors, which are the live ones, and the JSON beside them."""
    tensors = model_state(model)
    if not prepared.run.checkpoint.no_save_optim:
        tensors |= optimizer_state(model, optimizer)
    scale = {} if loss_scale is None else {"loss_scale": loss_scale.state()}
    return tensors, describe(prepared, progress) | scale


def describe(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """The JSON beside the tensors."""
    return {
        "versions": {"megatron_moe": megatron_moe.__version__, "torch": torch.__version__},
        "progress": dataclasses.asdict(progress),
        "architecture": prepared.architecture,
        "vocab_size": prepared.vocab_size,
        "eod": prepared.eod,
        "tokenizer": prepared.tokenizer,
        "config": prepared.run.to_dict(),
    }


def resume(
    prepared: Prepared, model: GPT, optimizer: torch.optim.Optimizer, world: World, loss_scale: LossScale | None = None
) -> tuple[Progress, str, list[str]] | None:
    """Load --load into model and optimizer, whatever layout wrote it. None for a fresh start. Collective.

    Returns the progress, the directory, and notes on checkpoints that were passed over. The loss scale goes on too, where the run
    before had one.
    """
    c = prepared.run.checkpoint
    if not c.load or not has_checkpoints(c.load):
        return None
    found = find_checkpoint(*run_directory(c.load, c.ckpt_step), c.ckpt_verify, world.cpu_group)
    tensors = model_state(model)
    complete = ["model."]
    if not (c.finetune or c.no_load_optim):
        tensors |= optimizer_state(model, optimizer)
        complete.append("optimizer.")
    load_tensors(found.path, tensors, complete, world.cpu_group, optional=[MTP] if c.finetune else ())
    if loss_scale is not None and "loss_scale" in found.meta and not c.finetune:
        loss_scale.load_state(found.meta["loss_scale"])
    progress = Progress() if c.finetune else Progress(**found.meta["progress"])
    if c.reset_iteration:
        progress.iteration = 0
    notes = _mtp_notes(prepared.run, found.meta) if c.finetune else _data_notes(prepared, found.meta, world)
    return progress, str(found.path), [*found.notes, *notes]


def _mtp_notes(run: RunConfig, meta: dict[str, Any]) -> Iterator[str]:
    """Modules of multi-token prediction that a run does not share with the checkpoint that it starts from."""
    then, now = meta["config"]["model"].get("mtp_num_layers", 0), run.model.mtp_num_layers
    if then != now:
        what = f"{now - then} of them start from initial weights" if now > then else f"{then - now} of the checkpoint's are left out"
        yield f"--mtp-num-layers is {now} and was {then} when the checkpoint was saved: {what}"


def start_from_folder(prepared: Prepared, model: GPT, world: World) -> list[str]:
    """Fill the model from the folder of --load-hf, in any layout; each rank reads what it holds. Collective. Returns notes."""
    source, ranks = open_start(prepared.run), Ranks(world.cpu_group)
    ranks.all(f"reading {source.path}", lambda: fill(model, source))
    modules = prepared.run.model.mtp_num_layers
    return [
        *source.notes,
        *([f"--mtp-num-layers {modules}: the folder has no such modules, they start from initial weights"] if modules else []),
    ]


def _data_notes(prepared: Prepared, meta: dict[str, Any], world: World) -> Iterator[str]:
    """What a person should know about the samples that follow: that they are other ones, or where they come from."""
    now, then = prepared.run.to_dict(), meta["config"]
    for group, name, meaning in (("training", "seed", int), ("training", "seq_length", int), ("data", "split", split_shares)):
        if meaning(now[group][name]) != meaning(then[group][name]):
            yield (
                f"--{name.replace('_', '-')} is {now[group][name]} and was {then[group][name]} when the checkpoint was saved: the data are "
                f"ordered anew, so that samples consumed before can come again and others be left out"
            )
    ordered = meta["progress"].get("ordered_samples")
    if ordered and ordered[0] < prepared.run.wanted_samples(world.size)[0]:
        yield (
            f"the data order was drawn for {ordered[0]} samples by the first run and is kept; this run wants "
            f"{prepared.run.wanted_samples(world.size)[0]}: after the last epoch of that order a further one begins"
        )


def has_checkpoints(directory: str) -> bool:
    return bool(iterations_in(run_directory(directory, None)[0]))
