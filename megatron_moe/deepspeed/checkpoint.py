"""Checkpoints of an engine, through checkpoint/: they appear whole or not at all, execute nothing, and load under any number of ranks,
expert-parallel degree and ZeRO stage.

    DIR/latest                 the tag that was saved last
    DIR/global_step10/         a tag: a run directory of checkpoint/, which keeps the last save of the tag
        iter_0000001/          the how-manieth save under this tag
            manifest.json      counters, schedule, loss scale, options of the groups, client_state: JSON
            *.distcp           model.<name of the module's parameter>, optimizer.<slot>.<name>, rng.<device>.<rank>

Everything that a step depends on is in it, so a run goes on bit for bit at an equal number of ranks: torch's generators of every rank too,
and where the loader of training_data is. Buffers are those of one rank, as in DeepSpeed: running statistics of a batch norm differ
from rank to rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import megatron_moe
from megatron_moe.checkpoint.files import CheckpointError, iterations_in
from megatron_moe.checkpoint.find import Found, find_checkpoint
from megatron_moe.checkpoint.load import describe_metadata, load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.parallel.zero import reshard
from megatron_moe.utils.atomic import atomic_write
from megatron_moe.utils.logging import logger

if TYPE_CHECKING:
    from megatron_moe.deepspeed.engine import DeepSpeedEngine

LATEST = "latest"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

# ---------------------------------------------------------------- saving


def save(engine: DeepSpeedEngine, save_dir: str | Path, tag: str | None, client_state: dict[str, Any], save_latest: bool,
         exclude_frozen: bool) -> bool:  # fmt: skip
    """Collective: the whole state of the engine, or nothing."""
    ranks = Ranks(engine.cpu_group)
    tag = _agreed_tag(ranks, f"global_step{engine.global_steps}" if tag is None else tag)
    if engine.accumulated:
        logger.warning(
            "the gradients of %d micro-batches since the last update are not in a checkpoint: save behind an update", engine.accumulated
        )
    meta = describe(engine, client_state)
    reshard(engine.module)
    frozen = {f"model.{name}" for name, p in engine.module.named_parameters() if exclude_frozen and not p.requires_grad}
    tensors = {name: t for name, t in model_state(engine.module).items() if name not in frozen}
    meta["excluded"] = sorted(frozen)
    if engine.optimizer is not None:
        tensors |= optimizer_state(engine.module, engine.optimizer)
    directory = Path(save_dir) / tag
    manager = CheckpointManager(directory, engine.cpu_group, keep_last=1)
    number = ranks.first("counting the saves", lambda: max(iterations_in(directory), default=0) + 1)
    manager.save(number, tensors | _generators(engine.device), meta)
    if save_latest:
        ranks.first(f"writing {LATEST}", lambda: _write_latest(Path(save_dir), tag))
    return True


def describe(engine: DeepSpeedEngine, client_state: dict[str, Any]) -> dict[str, Any]:
    """The JSON beside the tensors."""
    return {
        "versions": {"megatron_moe": megatron_moe.__version__, "torch": torch.__version__},
        "kind": "engine",
        "ranks": dist.get_world_size(),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scale": None if engine.scaler is None else engine.scaler.state(),
        "lr_scheduler": _plain(engine.lr_scheduler.state_dict(), "the state of the lr_scheduler") if engine.lr_scheduler else None,
        "groups": [] if engine.optimizer is None else [_options(group) for group in engine.optimizer.param_groups],
        "data": engine.training_dataloader.state() if engine.training_dataloader is not None else None,
        "client_state": _exact(client_state),
    }


def _agreed_tag(ranks: Ranks, tag: str) -> str:
    tag = str(tag)
    if not tag or Path(tag).name != tag or tag == LATEST:
        raise ValueError(f"a tag names a directory inside save_dir: not {tag!r}; use letters, digits, dots and dashes")
    tags = ranks.all("comparing tags", lambda: tag)
    if len(set(tags)) > 1:
        raise ValueError(
            f"save_checkpoint is called by all ranks with one tag, and they have {', '.join(sorted(set(tags)))}; make it equal"
        )
    return tag


def _write_latest(directory: Path, tag: str) -> None:
    with atomic_write(directory / LATEST, "w") as file:
        file.write(tag)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """torch's generators of this rank."""
    rank, states = dist.get_rank(), {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rng.{kind}.{rank}": state.clone() for kind, state in states.items()}


_NOT_KEPT = ("params", "fused", "foreach", "capturable", "differentiable")  # the last four: how this machine computes it


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """What of a group is a number or a word: rates, decays, names."""
    options = {name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for name, value in group.items()}
    return {name: value for name, value in options.items() if name not in _NOT_KEPT and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _plain(value: Any, what: str) -> Any:
    if not _is_json(value):
        raise ValueError(
            f"{what} cannot be written as JSON ({value!r}); a checkpoint holds tensors and JSON, nothing that would be executed"
        )
    return value


def _exact(client_state: dict[str, Any]) -> dict[str, Any]:
    """ValueError for what would come back as something else, or not at all."""
    for name, value in client_state.items():
        if not isinstance(name, str) or not _is_json(value) or json.loads(json.dumps(value)) != value:
            raise ValueError(
                f"client_state[{name!r}] is {value!r}, which does not come back from JSON as it is; use numbers, text, lists and dicts with "
                f"text keys (a tensor: .tolist())"
            )
    return client_state


# ---------------------------------------------------------------- loading


def load(engine: DeepSpeedEngine, load_dir: str | Path, tag: str | None, is_strict: bool, has_optimizer: bool, has_scheduler: bool,
         is_module_only: bool) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
    """(path, client_state), or (None, None) where nothing was saved. Collective."""
    if engine.is_within_a_step:
        raise ValueError(
            "load_checkpoint in the middle of a step: gradients of before would be added to those of what is loaded; call it behind step()"
        )
    ranks = Ranks(engine.cpu_group)
    tag = ranks.first(f"reading {LATEST}", lambda: _read_latest(Path(load_dir))) if tag is None else str(tag)
    if tag is None:
        logger.warning(
            "%s has no file %s: nothing is loaded; give a tag, or the directory that save_checkpoint was given", load_dir, LATEST
        )
        return None, None
    ranks.first(f"looking for {tag}", lambda: _check_there(Path(load_dir), tag))
    found = find_checkpoint(Path(load_dir) / tag, process_group=engine.cpu_group)
    if found.meta.get("kind") != "engine":
        raise CheckpointError(f"{found.path} is a checkpoint of pretrain_gpt_moe.py, not of an engine; load it with --load there")
    for note in found.notes:
        logger.warning(note)
    has_optimizer = has_optimizer and not is_module_only and engine.optimizer is not None
    tensors, complete = _wanted(engine, found, is_strict, has_optimizer, ranks)
    mine = {} if is_module_only or found.meta["ranks"] != dist.get_world_size() else _generators(engine.device)
    saved = ranks.first("reading the names", lambda: list(describe_metadata(found.path)))
    mine = {name: state for name, state in mine.items() if name in saved}
    load_tensors(found.path, tensors | mine, complete, engine.cpu_group)
    if not is_module_only:
        _restore(engine, found.meta, mine, has_optimizer, has_scheduler)
    return str(found.path), found.meta["client_state"]


def _read_latest(directory: Path) -> str | None:
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _check_there(directory: Path, tag: str) -> None:
    path = directory / tag
    if any(path.glob("mp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{path} was written by DeepSpeed: megatron_moe.deepspeed.foreign_checkpoint.import_checkpoint reads it (docs/from_deepspeed.md)"
        )
    if not path.is_dir():
        tags = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
        raise CheckpointError(f"there is no tag {tag} in {directory}; there are {', '.join(tags) or 'none'}")


def _wanted(
    engine: DeepSpeedEngine, found: Found, is_strict: bool, has_optimizer: bool, ranks: Ranks
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors to fill, and the prefixes under which the checkpoint may hold nothing else."""
    reshard(engine.module)
    tensors = {name: t for name, t in model_state(engine.module).items() if name not in found.meta["excluded"]}
    if not is_strict:
        saved = ranks.first("reading the names", lambda: list(describe_metadata(found.path)))
        tensors = {name: t for name, t in tensors.items() if name in saved}
    complete = ["model."] if is_strict else []
    if has_optimizer:
        tensors |= optimizer_state(engine.module, engine.optimizer)
        complete.append("optimizer.")
    return tensors, complete


def _restore(
    engine: DeepSpeedEngine, meta: dict[str, Any], generators: dict[str, Tensor], has_optimizer: bool, has_scheduler: bool
) -> None:
    """What is no tensor of the model or the optimizer."""
    for name in COUNTERS:
        setattr(engine, name, meta["counters"][name])
    if engine.scaler is not None and meta["loss_scale"]:
        engine.scaler.load_state(meta["loss_scale"])
    if has_optimizer:
        _restore_groups(engine.optimizer.param_groups, meta["groups"])
    if has_scheduler and engine.lr_scheduler is not None and meta["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(meta["lr_scheduler"])
    if engine.training_dataloader is not None and meta["data"]:
        engine.training_dataloader.load_state(meta["data"])
    for name, state in generators.items():
        torch.cuda.set_rng_state(state, engine.device) if name.startswith("rng.cuda.") else torch.set_rng_state(state)
    if meta["ranks"] != dist.get_world_size():
        logger.warning("saved by %d ranks and loaded by %d: random numbers go on from other states", meta["ranks"], dist.get_world_size())
    engine.after_load()


def _restore_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(groups) != len(saved):
        raise CheckpointError(f"the optimizer has {len(groups)} groups, and had {len(saved)} when it was saved; build the same ones, or load "
                              f"with load_optimizer_states=False")  # fmt: skip
    for group, options in zip(groups, saved):
        for name, value in options.items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            else:
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value


# ---------------------------------------------------------------- weights alone


def save_16bit_model(engine: DeepSpeedEngine, save_dir: str | Path, filename: str, exclude_frozen: bool) -> bool:
    """Whole weights in 16 bits, under DeepSpeed's names, in one file by rank 0 that torch.load(weights_only=True) reads. Collective."""
    half = engine.compute_dtype or torch.bfloat16
    reshard(engine.module)
    frozen = {name for name, p in engine.module.named_parameters() if not p.requires_grad} if exclude_frozen else set()
    whole = {}
    for name, value in engine.module.state_dict().items():
        if name in frozen:
            continue
        value = value.full_tensor() if isinstance(value, DTensor) else value  # every rank takes part
        if dist.get_rank() == 0:
            whole[name] = value.detach().to("cpu", half if value.is_floating_point() else value.dtype).clone()
    Ranks(engine.cpu_group).first(f"writing {filename}", lambda: _write_weights(Path(save_dir), filename, whole))
    return True


def _write_weights(directory: Path, filename: str, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(directory / filename) as file:
        torch.save(tensors, file)
