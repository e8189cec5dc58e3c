"""DeepSpeed's MoE checkpoints into an engine of ours, and an engine of ours into DeepSpeed's files.

    engine, *_ = deepspeed.initialize(model=model, config=config)
    found = import_checkpoint(engine, "runs/old")        # what its load_checkpoint would have read, under any layout here
    engine.save_checkpoint("runs/new")                   # from here on in our own format

    export_checkpoint(engine, "runs/back")               # what its load_checkpoint reads

Files and how they are read: checkpoint/deepspeed_files.py; names and orders: foreign_names.py; moments: foreign_optimizer.py. All ranks call these
functions. Everything is read and compared before the first tensor of the engine changes; what cannot be taken over is in `left`, a
sentence each, and in a warning.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_moe.checkpoint.deepspeed_files import LATEST, MODEL_FILE, Files, find_files, is_plain, read_file
from megatron_moe.checkpoint.files import CheckpointError, temporary_name
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.checkpoint.state import optimizer_state
from megatron_moe.deepspeed.foreign_names import Member, Place, expert_of, members, moe_modules, optimizer_groups, places, tensors_of
from megatron_moe.deepspeed.foreign_optimizer import Moments, read_moments
from megatron_moe.parallel.zero import reshard
from megatron_moe.utils.atomic import atomic_write
from megatron_moe.utils.compat import local_slices
from megatron_moe.utils.logging import logger

LAYOUT_VERSION = "0.19.8"  # of DeepSpeed, whose layout is written
SHOWN = 10  # problems listed in an error

# What the model's file has besides what the caller gave to save_checkpoint.
_OWN_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "lr_scheduler",
    "data_sampler", "random_ltd", "sparse_tensor_module_names", "csr_tensor_module_names", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts",
    "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info",
}  # fmt: skip


@dataclass
class Imported:
    """What an import has found."""

    path: Path
    client_state: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)  # what was not taken over, and why


def import_checkpoint(
    engine: Any,
    load_dir: str | Path,
    tag: str | None = None,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    ignore_classes: Sequence[str] = (),
) -> Imported:
    """Weights, moments, counters, schedule and loss scale of a checkpoint that DeepSpeed has saved. Collective.

    The layout it was saved under does not matter, except that model parallelism, pipelines and ZeRO stage 3 are refused. The groups of
    its optimizer must be those of the engine's.
    """
    ranks = Ranks(engine.cpu_group)
    reshard(engine.module)
    reading = _Reading(engine, ignore_classes)
    wants_optimizer = load_optimizer_states and not load_module_only and engine.optimizer is not None
    with torch.no_grad():
        ranks.all("reading DeepSpeed's files", lambda: reading.open(load_dir, tag))
        ranks.all("comparing with DeepSpeed's files", lambda: reading.compare(wants_optimizer))
        for fill in reading.fills:
            fill.target.copy_(fill.source)
    if wants_optimizer:
        reading.take_rates()
    if not load_module_only:
        reading.take_progress(load_lr_scheduler_states)
    found = Imported(reading.files.path, reading.client_state(), reading.left)
    for sentence in found.left if ranks.rank == 0 else []:
        logger.warning("%s: %s", found.path, sentence)
    return found


@dataclass
class Fill:
    """A copy to be made: into what lives here, from its part of a tensor of the files."""

    target: Tensor
    source: Tensor


class _Reading:
    """One import on one rank: open, compare, and only then take."""

    def __init__(self, engine: Any, ignored: Sequence[str]):
        self.engine, self.ignored = engine, ignored
        self.known = places(engine.module)
        self.files: Files
        self.content: dict[str, Any] = {}
        self.moments = Moments()
        self.experts: dict[Path, dict[str, Tensor]] = {}  # files that were opened
        self.fills: list[Fill] = []
        self.problems: list[str] = []
        self.left: list[str] = []

    # ------------------------------------------------------------ reading

    def open(self, load_dir: str | Path, tag: str | None) -> None:
        self.files = find_files(load_dir, tag)
        self.content = read_file(self.files.model, self.ignored)
        if not isinstance(self.content.get("module"), dict):
            raise CheckpointError(f"{self.files.model}: has no weights under the key module")
        if self.content.get("mp_world_size", 1) != 1:
            raise CheckpointError(f"{self.files.model}: was saved by {self.content['mp_world_size']} model-parallel ranks; one is read")
        self.problems += list(self._other_experts())

    def _other_experts(self) -> Iterator[str]:
        """MoE modules of the model against the files."""
        modules = moe_modules(self.engine.module)
        there: dict[int, set[int]] = {}
        for number, expert in self.files.experts:
            there.setdefault(number, set()).add(expert)
        if not there and self.files.old_experts:
            there = {module.number: set(self.files.old_experts) for module in modules}
        for module in modules:
            found = there.pop(module.number, set())
            if found != set(range(module.num_experts)):
                yield f"{module.name}: has {module.num_experts} experts, and there are files of {_listed_numbers(found)}"
        for number, found in sorted(there.items()):
            yield f"files of {_listed_numbers(found)} of MoE module number {number}, and the model has {len(modules)} such modules"

    def tensor(self, place: Place, expert: int | None) -> Tensor | None:
        """A weight, as the files have it."""
        if expert is None:
            return self.content["module"].get(place.name)
        path = self.files.experts.get((place.module.number, expert)) or self.files.old_experts.get(expert)
        if path is None:
            return None
        if path not in self.experts:
            # a model that is a MoE itself has no name, and DeepSpeed puts the dot behind it all the same
            self.experts[path] = {name.removeprefix("."): t for name, t in read_file(path, self.ignored).items()}
        return self.experts[path].get(place.of(expert))

    # ------------------------------------------------------------ comparing

    def compare(self, wants_optimizer: bool) -> None:
        """Fills `fills`, or raises with all that does not fit."""
        if wants_optimizer and not self.problems:
            self.moments = read_moments(self.files, self.content, self.engine.module, self.engine.optimizer, self.ignored)
        for name, live in tensors_of(self.engine.module).items():
            self._plan(name, live, self._weight)
        self._extra_names()
        if wants_optimizer and not self.problems:
            self._plan_optimizer()
        if self.problems:
            more = [f"... and {len(self.problems) - SHOWN} more"] if len(self.problems) > SHOWN else []
            raise CheckpointError("\n  ".join([f"{self.files.path} does not fit, nothing was loaded:", *self.problems[:SHOWN], *more]))

    def _plan(self, name: str, live: Tensor, source_of: Callable[[Place, int | None], Tensor | None]) -> None:
        """The copies that fill one tensor of ours; a stack takes one from each of its experts that live here."""
        place = self.known[name]
        is_split = isinstance(live, DTensor)
        slices = local_slices(live) if is_split else tuple(slice(0, n) for n in live.shape)
        local = live.to_local() if is_split else live
        if place.module is None or not live.ndim:
            self._add(place.name, local, source_of(place, None), live.shape, slices)
            return
        for row, expert in enumerate(range(slices[0].start, slices[0].start + local.shape[0])):
            self._add(place.of(expert), local[row], source_of(place, expert), live.shape[1:], slices[1:])

    def _add(self, name: str, target: Tensor, source: Tensor | None, shape: Sequence[int], slices: tuple[slice, ...]) -> None:
        if source is None:
            self.problems.append(f"{name}: missing")
        elif tuple(source.shape) != tuple(shape):
            self.problems.append(f"{name}: {list(source.shape)} in the files, {list(shape)} here")
        else:
            self.fills.append(Fill(target, source[slices]))

    def _weight(self, place: Place, expert: int | None) -> Tensor | None:
        """The optimizer's fp32 weights where there are some: those in half precision are these, rounded."""
        weight = self.tensor(place, expert)
        name = place.name if expert is None else place.of(expert)
        exact = self.moments.weights.get(name)
        if weight is None or exact is None or exact.shape != weight.shape:
            return weight
        if not torch.equal(exact.to(weight.dtype), weight):
            self.problems.append(
                f"{name}: the optimizer's own copy of the weights is not that of the model's file; its parameters are in another order "
                f"(give load_optimizer_states=False), or the files are of different steps"
            )
        return exact

    def _extra_names(self) -> None:
        """Weights of the files that the model does not have."""
        module = self.engine.module
        here = {place.name for place in self.known.values()}
        aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        aliases |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        extra = [name for name in self.content["module"] if name not in here | aliases]
        strays = [name for name in extra if expert_of(name)]
        if strays:  # DeepSpeed leaves some of one rank's experts there when the model's names are not those of its modules
            self.left.append(f"{len(strays)} tensors of experts in {MODEL_FILE}, the first {strays[0]}: the files of the experts count")
        self.problems += [f"{name}: in {MODEL_FILE}, and the model has no such tensor" for name in extra if name not in strays]

    # ------------------------------------------------------------ the optimizer

    def _plan_optimizer(self) -> None:
        module, optimizer = self.engine.module, self.engine.optimizer
        there = {slot for slots in self.moments.slots.values() for slot in slots}
        here: dict[str, list[tuple[str, Tensor]]] = {}
        for key, live in optimizer_state(module, optimizer).items():
            slot, _, name = key.removeprefix("optimizer.").partition(".")
            here.setdefault(slot, []).append((name, live))
        if missing := sorted(here.keys() - there):
            self.problems.append(
                f"{type(optimizer).__name__} keeps {', '.join(missing)}, the optimizer of the files {', '.join(sorted(there)) or 'nothing'}; "
                f"use the same optimizer, or give load_optimizer_states=False"
            )
            return
        if extra := sorted(there - here.keys()):
            self.left.append(f"{', '.join(extra)} of the optimizer: {type(optimizer).__name__} does not keep it")
        for slot, tensors in here.items():
            for name, live in tensors:
                self._plan_slot(slot, name, live)

    def _plan_slot(self, slot: str, name: str, live: Tensor) -> None:
        place = self.known[name]
        if not live.ndim and place.module is not None:  # steps are counted per stack here, per expert there
            self._add(name, live, self._steps(name, place, slot), live.shape, ())
            return
        shape = live.shape[1:] if place.module is not None else live.shape

        def source(place: Place, expert: int | None) -> Tensor:
            found = self.moments.slots.get(place.name if expert is None else place.of(expert), {}).get(slot)
            return torch.zeros(shape) if found is None else found  # it never had a gradient

        self._plan(name, live, source)

    def _steps(self, name: str, place: Place, slot: str) -> Tensor:
        found = [self.moments.slots.get(place.of(e), {}).get(slot, torch.zeros(())) for e in range(place.module.num_experts)]
        steps = sorted({int(step) for step in found})
        if len(steps) > 1:
            self.left.append(f"{name}: its experts had between {steps[0]} and {steps[-1]} steps; here they have one count, {steps[-1]}")
        return torch.tensor(float(steps[-1]))

    def take_rates(self) -> None:
        """Learning rates go on where they were; other options are the engine's."""
        names = {id(t): name for name, t in tensors_of(self.engine.module).items()}
        for group in filter(lambda g: g["params"], self.engine.optimizer.param_groups):
            first = names[id(group["params"][0])]
            place = self.known[first]
            theirs = self.moments.group_of.get(place.name if place.module is None else place.of(0), {})
            if "lr" in theirs:
                group["lr"] = float(theirs["lr"])
            for option in ("betas", "eps", "weight_decay", "momentum"):
                if option in group and option in theirs and _numbers(group[option]) != _numbers(theirs[option]):
                    self.left.append(f"{option} {theirs[option]} of the optimizer's group with {first}: this run has {group[option]}")

    # ------------------------------------------------------------ the rest

    def take_progress(self, wants_scheduler: bool) -> None:
        engine, content = self.engine, self.content
        engine.global_steps = int(content["global_steps"])
        engine.skipped_steps = int(content["skipped_steps"])
        engine.global_samples = int(content.get("global_samples", engine.global_steps * engine.train_batch_size()))
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        engine.after_load()
        if wants_scheduler:
            self._take_schedule(content.get("lr_scheduler"))
        if self.moments.loss_scale is not None:
            self._take_loss_scale(self.moments.loss_scale)
        for name, what in (("data_sampler", "the order of the samples"), ("random_ltd", "random layer-token dropping")):
            if content.get(name) is not None:
                self.left.append(f"{name}: {what} is not that of DeepSpeed here")

    def _take_schedule(self, theirs: Any) -> None:
        ours = self.engine.lr_scheduler
        if ours is None and theirs is not None:
            self.left.append("lr_scheduler: this run has no schedule")
        elif ours is not None and not isinstance(theirs, dict):
            self.left.append("lr_scheduler: there is none in the files; the one of this run starts anew")
        elif ours is not None and (theirs.keys() != ours.state_dict().keys() or not is_plain(theirs)):
            self.left.append(
                f"lr_scheduler: its state has {sorted(theirs)}, the one of this run {sorted(ours.state_dict())}; it starts anew"
            )
        elif ours is not None:
            ours.load_state_dict(theirs)

    def _take_loss_scale(self, scale: float) -> None:
        ours = self.engine.scaler
        if ours is None:
            self.left.append(f"loss scale {scale:g}: this run has none")
        else:
            ours.load_state(ours.state() | {"scale": scale, "skipped": self.engine.skipped_steps})

    def client_state(self) -> dict[str, Any]:
        """What the caller of save_checkpoint had given."""
        theirs = {key: value for key, value in self.content.items() if key not in _OWN_KEYS}
        for key in [key for key, value in theirs.items() if not is_plain(value)]:
            self.left.append(f"{key}: holds objects of classes that are not read")
            del theirs[key]
        return theirs


def _numbers(option: Any) -> Any:
    return [float(x) for x in option] if isinstance(option, (list, tuple)) else float(option)


def _listed_numbers(numbers: set[int]) -> str:
    """{0, 1, 3} -> `experts 0, 1, 3`."""
    text = ", ".join(map(str, sorted(numbers)[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
    return f"experts {text}" if numbers else "no experts"


# ---------------------------------------------------------------- export


def export_checkpoint(
    engine: Any,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    save_latest: bool = True,
    save_optimizer_states: bool = True,
) -> Imported:
    """SAVE_DIR/TAG as DeepSpeed's save_checkpoint writes it, for its load_checkpoint. Collective; the folder appears when it is whole.

    Weights fit any run of the same model there. Moments fit one in fp32 without ZeRO and of the same expert parallelism; of a run in
    fp16 or bf16 DeepSpeed keeps them in flat tensors of one layout, which are not written.
    """
    ranks, client_state = Ranks(engine.cpu_group), dict(client_state or {})
    reshard(engine.module)
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    final = Path(save_dir) / tag
    _check_export(final, tag, client_state)
    building = ranks.first(f"saving {final.name}", lambda: _begin(final))
    try:
        left = _write_all(engine, building, client_state, save_optimizer_states, ranks)
        ranks.first(f"saving {final.name}", lambda: _publish(building, final, save_latest))
    except CheckpointError:
        if ranks.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise
    for sentence in left if ranks.rank == 0 else []:
        logger.warning("%s: %s", final, sentence)
    return Imported(final, client_state, left)


def _check_export(final: Path, tag: str, client_state: dict[str, Any]) -> None:
    if not tag or Path(tag).name != tag:
        raise ValueError(f"tag {tag!r} must be the name of a folder in save_dir, without a path")
    if taken := sorted(_OWN_KEYS & client_state.keys()):
        raise ValueError(f"client_state must not have the keys {', '.join(taken)}: they are DeepSpeed's own; rename them")
    if other := [key for key, value in client_state.items() if not is_plain(value)]:
        raise ValueError(f"client_state may hold tensors, numbers, text and containers of them, and {other[0]!r} holds something else")
    if final.exists():
        raise ValueError(f"{final} exists and is not overwritten; give another tag or delete it")


def _begin(final: Path) -> Path:
    building = final.with_name(temporary_name(final.name))
    building.mkdir(parents=True)
    return building


def _write_all(engine: Any, building: Path, client_state: dict[str, Any], save_optimizer_states: bool, ranks: Ranks) -> list[str]:
    """Every rank gathers, rank 0 writes. Returns what was left out."""
    model, known = engine.module, places(engine.module)
    tensors = tensors_of(model)
    for module in moe_modules(model):
        stacks = {known[n]: _whole(t, ranks.rank) for n, t in tensors.items() if known[n].module == module}
        ranks.first(f"writing the experts of {module.name}", lambda stacks=stacks: _write_experts(building, stacks))
    dense = {known[n].name: _whole(t, ranks.rank) for n, t in tensors.items() if known[n].module is None}
    left: list[str] = []
    moments: dict[str, Tensor] | None = None
    if save_optimizer_states and engine.optimizer is not None:
        if _is_half(engine):
            left.append("moments of the optimizer: those of fp16 and bf16 are flat tensors of one layout there; weights alone were written")
        else:
            moments = {key: _whole(t, ranks.rank) for key, t in optimizer_state(model, engine.optimizer).items()}
    ranks.first("writing the model", lambda: _write_model(building, engine, known, dense, moments, left, client_state))
    return ranks.first("what was left out", lambda: left)


def _whole(tensor: Tensor, rank: int) -> Tensor:
    """Gathered by all ranks, kept on the host by the first."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone() if rank == 0 else torch.empty(0)


def _write(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _write_experts(building: Path, stacks: dict[Place, Tensor]) -> None:
    module = next(iter(stacks)).module
    dot = "" if module.name else "."  # DeepSpeed's own name of an expert in a model that is a MoE itself
    for expert in range(module.num_experts):
        content = {dot + place.of(expert): stack[expert].clone() for place, stack in stacks.items()}
        _write(building / f"layer_{module.number}_expert_{expert}_{MODEL_FILE}", content)


def _write_model(
    building: Path, engine: Any, known: dict[str, Place], dense: dict[str, Tensor], moments: dict[str, Tensor] | None,
    left: list[str], client_state: dict[str, Any],
) -> None:  # fmt: skip
    """What is not of an expert. The optimizer of a model with experts is in files of its own."""
    content = _model_content(engine, dense, left) | client_state
    contents = _optimizer_contents(engine, known, moments) if moments is not None else []
    if moe_modules(engine.module):
        for rank, optimizer in enumerate(contents):
            _write(building / f"expp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer": optimizer})
    elif contents:
        content["optimizer"] = contents[0]
    _write(building / MODEL_FILE, content)


def _model_content(engine: Any, dense: dict[str, Tensor], left: list[str]) -> dict[str, Any]:
    model = engine.module
    owners = {id(t): name for name, t in model.named_parameters()}
    aliases = {name: owners[id(t)] for name, t in model.named_parameters(remove_duplicate=False) if name != owners[id(t)]}
    experts = [module.num_experts for module in moe_modules(model)]
    return {
        "module": dense | {alias: dense[name] for alias, name in aliases.items() if name in dense},
        "buffer_names": [name for name, _ in model.named_buffers() if name in dense],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": _schedule_state(engine, left),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": engine.skipped_steps,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "dp_world_size": engine.dp_world_size,
        "mp_world_size": 1,
        "ds_config": None,
        "ds_version": LAYOUT_VERSION,
        **({"num_experts": experts, "ds_autoep_layers": None} if experts else {}),
    }


def _schedule_state(engine: Any, left: list[str]) -> dict[str, Any] | None:
    state = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
    if state is not None and not is_plain(state):
        left.append("lr_scheduler: its state holds objects that are not plain data")
        return None
    return state


_TORCH_OPTIONS = {  # of Adam, AdamW and SGD of torch.optim; what picks a kernel is the reader's business
    "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay",
    "momentum", "dampening", "nesterov", "name", "moe",
}  # fmt: skip


def _optimizer_contents(engine: Any, known: dict[str, Place], moments: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Of each expert-parallel rank: torch's form, of the parameters that the rank has."""
    model = engine.module
    shapes = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    groups = optimizer_groups(model, engine.optimizer, known, is_split=True)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        slot, _, name = key.removeprefix("optimizer.").partition(".")
        by_name.setdefault(name, {})[slot] = tensor
    contents = []
    for rank in range(max((m.expert_parallel_size for m in moe_modules(model)), default=1)):
        state: dict[int, dict[str, Tensor]] = {}
        options = []
        for group, names in groups:
            own = list(members(names, known, shapes, rank))
            indices = list(range(len(state), len(state) + len(own)))
            state |= {index: _part(by_name.get(member.ours, {}), member) for index, member in zip(indices, own)}
            kernels = {"foreach": None, "fused": None}
            options.append({k: copy.copy(v) for k, v in group.items() if k in _TORCH_OPTIONS} | kernels | {"params": indices})
        contents.append({"state": state, "param_groups": options})
    return contents


def _part(slots: dict[str, Tensor], member: Member) -> dict[str, Tensor]:
    return {s: t.clone() if member.expert is None or not t.ndim else t[member.expert].clone() for s, t in slots.items()}


def _publish(building: Path, final: Path, save_latest: bool) -> None:
    os.rename(building, final)
    if save_latest:
        with atomic_write(final.parent / LATEST, "w") as file:
            file.write(final.name)


def _is_half(engine: Any) -> bool:
    return engine.fp16_enabled() or engine.bfloat16_enabled()
