"""Megatron-DeepSpeed's MoE checkpoints: a file for each expert, and one for the rest of each tensor-parallel rank.

DIR/latest                                                      global_step10
DIR/latest_checkpointed_iteration.txt                           10, Megatron's
DIR/global_step10/mp_rank_00_model_states.pt                    module (nested, without experts), counters, args, checkpoint_version
DIR/global_step10/layer_0_expert_3_mp_rank_00_model_states.pt   expert 3 of the first MoE layer

checkpoint/deepspeed_files.py opens them and executes nothing; names and cuts: megatron_names.py; the arguments: megatron_args.py.
What a file has besides tensors (counters, schedule, arguments, generators) is kept in the meta, so that it is written back as it was
as long as model and layout are those. Optimizer states are not converted: those files belong to one layout.
"""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.deepspeed_files import (
    LATEST,
    Files,
    expert_file,
    files_by_rank,
    model_file,
    read_file,
    tag_directory,
    why_without_model,
)
from megatron_moe.checkpoint.files import TRACKER, CheckpointError, describe_file, sync_directory, write_through
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion import plain_data
from megatron_moe.conversion.megatron_args import OWN_MULTIPLE, args_of_run, plain_items, run_of_args
from megatron_moe.conversion.megatron_losses import without_losses
from megatron_moe.conversion.megatron_names import EXPERTS, Entry, Heads, entries, fit_rows, mp_ranks_of, parts, whole
from megatron_moe.conversion.plain_data import Namespace
from megatron_moe.conversion.source import ITEM_SIZE, Selection, Source, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.journal import Journal

SOURCE_OPTIONS = ("true_vocab_size", "model_args")
TARGET_OPTIONS = ("target_tensor_parallel_size", "target_expert_parallel_size", "target_expert_tensor_parallel_size")
RESUMES = True
__all__ = ["RESUMES", "SOURCE_OPTIONS", "TARGET_OPTIONS", "kept", "looks_like", "losses", "open_source", "stored_dtypes", "write"]

CARRIED = "megatron_deepspeed"  # the key of the meta
EXPERT_PREFIX = "language_model.encoder."
LAYOUT_VERSION = "0.19.8"  # of DeepSpeed, whose layout is written
SHOWN = 10  # problems of a kind
_EXPERT_KEY = re.compile(rf"(.*\.|encoder)layers\.(\d+)\.{re.escape(EXPERTS)}\.(\d+)\.(.+)")
_RNG = {"random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states"}


def looks_like(directory: Path) -> bool:
    """A directory with tags, or that of one tag."""
    return any(directory.glob("mp_rank_*_model_states.pt")) or any(directory.glob("*/mp_rank_*_model_states.pt"))


# ---------------------------------------------------------------- reading


class MegatronSource:
    """One tag. Tensors are mapped from their files, so that only those that are read come into memory."""

    def __init__(self, path: Path, iteration: int, meta: dict[str, Any], tensors: Tensors, layout: Layout, notes: Sequence[str]):
        self.path, self.iteration, self.meta, self.tensors, self.notes = path, iteration, meta, tensors, tuple(notes)
        self._layout = layout
        self._entries = {name: entry for entry in layout.entries for name in entry.ours}
        self.has_checksums = all(zipfile.is_zipfile(path / name) for name in layout.used)

    def files(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in self._layout.used}

    def file_problems(self, verify: str) -> list[str]:
        """Each record of a file of torch.save has a CRC-32; that of the file is its end, without which it is not opened."""
        return [problem for name in self._layout.used if verify == "crc" for problem in _record_problems(self.path / name)]

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            entry = self._entries[name]
            index = entry.ours.index(name)
            yield name, self._layout.stack(entry, index) if entry.layer else self._layout.dense(entry)[index].clone()


@dataclass
class Layout:
    """How the tensors of a tag lie in its files. `models`: flat names -> tensor, of each tensor-parallel rank."""

    ranks: dict[int, Files]
    models: list[dict[str, Tensor]]
    entries: list[Entry]
    heads: Heads
    rows: int
    is_cut: bool  # experts are shared by tensor-parallel ranks
    used: list[str] = field(default_factory=list)  # names of files
    _opened: dict[Path, dict[tuple[int, int, str], Tensor]] = field(default_factory=dict)

    def dense(self, entry: Entry) -> list[Tensor]:
        """Of ours, whole."""
        found = [model[entry.theirs] for model in self.models]
        if entry.cut is None:
            _check_equal(entry.theirs, found)
            found = found[:1]
        ours = whole(entry, self.heads, found)
        return [fit_rows(t, self.rows) for t in ours] if entry.kind == "vocab" else ours

    def expert(self, entry: Entry, expert: int) -> list[Tensor]:
        """Of ours, of one expert."""
        found = [content[self.key(entry, expert)] for content in self.contents(entry, expert)]
        if entry.cut is None:
            _check_equal(entry.theirs.format(expert), found)
            found = found[:1]
        return whole(entry, self.heads, found)

    def stack(self, entry: Entry, index: int) -> Tensor:
        """[E, ...]"""
        import torch

        made = None
        for expert in range(entry.num_experts):
            one = self.expert(entry, expert)[index]
            made = torch.empty(entry.num_experts, *one.shape, dtype=one.dtype) if made is None else made
            made[expert] = one
        return made

    def contents(self, entry: Entry, expert: int) -> list[dict[tuple[int, int, str], Tensor]]:
        """Of each file that has this expert, by tensor-parallel rank."""
        return [self.content(path) for path in self.paths(entry.number, expert).values()]

    def paths(self, number: int, expert: int) -> dict[int, Path]:
        found = {rank: files.experts.get((number, expert)) or files.old_experts.get(expert) for rank, files in self.ranks.items()}
        return {rank: path for rank, path in found.items() if path}

    def content(self, path: Path) -> dict[tuple[int, int, str], Tensor]:
        """(layer from 0, expert, name within it) -> tensor. The last file stays open."""
        if path not in self._opened:
            self._opened.clear()
            self._opened[path] = _expert_content(path)
        return self._opened[path]

    def moe_layers(self) -> list[tuple[int, int]]:
        """(number, experts) of each."""
        return sorted({(entry.number, entry.num_experts) for entry in self.entries if entry.layer})

    def expert_prefix(self) -> str:
        """What stands before `layers.` in the names of experts' tensors: of the first one's."""
        path = next((path for number, _ in self.moe_layers() for path in self.paths(number, 0).values()), None)
        name = next(iter(read_file(path)), "") if path else ""
        return match[1] if (match := _EXPERT_KEY.fullmatch(str(name))) else EXPERT_PREFIX

    @staticmethod
    def key(entry: Entry, expert: int) -> tuple[int, int, str]:
        return entry.layer - 1, expert, entry.theirs.partition("{}.")[2]


def open_source(
    directory: Path, iteration: int | None = None, true_vocab_size: int | None = None, model_args: Mapping[str, Any] | None = None
) -> MegatronSource:
    """Names, shapes, arguments; no tensor is read. ConfigError with all that is wrong.

    true_vocab_size: before padding, where the files do not say it. model_args: arguments in place of those in the files.
    """
    try:
        return _opened(_tag(directory, iteration), true_vocab_size, model_args)
    except CheckpointError as error:
        raise ConfigError([str(error)]) from None


def _tag(directory: Path, iteration: int | None) -> Path:
    """That of `latest`, or of an iteration; `directory` may be one itself."""
    if any(directory.glob("mp_rank_*_model_states.pt")):
        if iteration is not None and directory.name != f"global_step{iteration}":
            raise ConfigError([f"{directory}: is one tag, not that of iteration {iteration}; leave --iteration out"])
        return directory
    return tag_directory(directory, None if iteration is None else f"global_step{iteration}")


def _opened(path: Path, true_vocab_size: int | None, model_args: Mapping[str, Any] | None) -> MegatronSource:
    ranks = files_by_rank(path)
    if 0 not in ranks or not ranks[0].has_model:
        raise CheckpointError(f"{path / model_file(0)}: missing; {why_without_model(path)}")
    first = read_file(ranks[0].model)
    notes: list[str] = []
    args = dict(model_args) if model_args is not None else _args_in(ranks[0].model, first)
    degree = _degree(path, ranks, first, args)
    contents = [first, *(read_file(ranks[rank].model) for rank in range(1, degree))]
    models = [_flat_model(ranks[rank].model, content, notes if rank == 0 else []) for rank, content in enumerate(contents)]
    if degree > 1 and "enable_expert_tensor_parallelism" not in args:
        args["enable_expert_tensor_parallelism"] = _has_cut_experts(ranks, degree, args)
    vocabulary = "embedding.word_embeddings.weight"
    if any(vocabulary not in model for model in models):
        raise CheckpointError(f"{ranks[0].model}: has no {vocabulary}: not a GPT of Megatron-DeepSpeed")
    rows = sum(model[vocabulary].shape[0] for model in models)
    vocab_size = _vocab_size(ranks[0].model, true_vocab_size, args, rows, notes)
    _check_counts(path, ranks, models[0], args)
    run = run_of_args(args, str(ranks[0].model), vocab_size, rows)
    version = float(first.get("checkpoint_version") or 0) if "checkpoint_version" in first else None
    if version is None:
        notes.append(f"{model_file(0)} names no checkpoint_version: heads are taken to be ordered as in version 3.0")
    heads = Heads(run.model.num_attention_heads, run.model.key_value_heads, run.model.head_dim, 3.0 if version is None else version)
    is_cut = run.parallel.enable_expert_tensor_parallelism and degree > 1
    layout = Layout(ranks, models, list(entries(run, is_cut)), heads, run.model.padded_vocab_size(vocab_size), is_cut)
    tensors = _tensors(path, layout)
    optimizer = [file for files in ranks.values() for file in (*files.optimizer.values(), *files.zero.values())]
    if optimizer:
        notes.append(f"{len(optimizer)} files of optimizer state, the first {optimizer[0].name}, are left out: they belong to one layout; "
                     f"train on with --no-load-optim or --finetune")  # fmt: skip
    progress = {
        "iteration": _number(first, "iteration", _number(first, "global_steps", 0)), "consumed_samples": _number(args, "consumed_train_samples", 0),
        "consumed_tokens": _number(args, "consumed_train_tokens", _number(first, "tokens", 0)), "ordered_samples": None,
    }  # fmt: skip
    tokenizer = {name: getattr(run.tokenizer, name) for name in run.tokenizer.__dataclass_fields__} | {"fingerprint": None}
    dtypes = {name: entry["dtype"] for name, entry in tensors.items()}
    meta = {
        "world_size": _number(first, "dp_world_size", 1) * degree, "progress": progress, "architecture": run.architecture(vocab_size),
        "vocab_size": vocab_size, "eod": -1, "tokenizer": tokenizer, "config": run.to_dict(),
        CARRIED: _carried(path, contents, layout, run, rows, dtypes, notes),
    }  # fmt: skip
    return MegatronSource(path, progress["iteration"], meta, tensors, layout, notes)


def _number(values: Mapping[str, Any], name: str, default: int) -> int:
    return values[name] if type(values.get(name)) is int else default


def _args_in(where: Path, content: dict[str, Any]) -> dict[str, Any]:
    found = content.get("args")
    found = found if isinstance(found, dict) else getattr(found, "state", None)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: holds no arguments of Megatron (args), so nothing says how many heads there are; give the flags of its "
                              f'training: --model-flags "--num-layers 24 --hidden-size 1024 ..."')  # fmt: skip
    return plain_items(found)


def _degree(path: Path, ranks: dict[int, Files], content: dict[str, Any], args: Mapping[str, Any]) -> int:
    """Tensor-parallel ranks; CheckpointError when the files are not those of so many."""
    if args.get("pipeline_model_parallel_size", 1) not in (1, None):
        raise CheckpointError(f"{path}: was trained on {args['pipeline_model_parallel_size']} pipeline stages; those of one are read")
    said = {"mp_world_size": content.get("mp_world_size"), "tensor_model_parallel_size": args.get("tensor_model_parallel_size")}
    said = {name: degree for name, degree in said.items() if type(degree) is int}
    present = [rank for rank, files in ranks.items() if files.has_model]
    degrees = set(said.values()) or {max(present) + 1}
    if len(degrees) > 1:
        raise CheckpointError(f"{path}: is of {' and '.join(f'{name} {degree}' for name, degree in said.items())}; these must be equal")
    (degree,) = degrees
    if not 1 <= degree <= 4096:
        raise CheckpointError(f"{path}: {degree} tensor-parallel ranks")
    problems = [f"{path / model_file(rank)}: missing ({degree} tensor-parallel ranks)" for rank in range(degree) if rank not in present]
    problems += [f"{files.model}: there are {degree} tensor-parallel ranks only" for rank, files in ranks.items() if rank >= degree]
    if problems:
        raise CheckpointError("\n".join(problems[:SHOWN]))
    return degree


def _check_counts(path: Path, ranks: dict[int, Files], model: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Layers and experts of the arguments against those of the files, before anything is made that is as long as the arguments say."""
    layers = {int(match[1]) for name in model if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    if args.get("num_layers") not in (None, len(layers)):
        raise CheckpointError(f"{path}: the arguments say {args['num_layers']} layers, {model_file(0)} has {len(layers)}")
    said = args.get("num_experts") or [1]
    most = max((n for n in (said if isinstance(said, (list, tuple)) else [said]) if type(n) is int), default=1)
    numbers = [e for files in ranks.values() for e in (*(e for _, e in files.experts), *files.old_experts)]
    if most > 1 and most != max(numbers, default=0) + 1:
        raise CheckpointError(f"{path}: the arguments say up to {most} experts in a layer, there are files of up to {max(numbers, default=-1) + 1}: "
                              f"files of experts are missing, or there are too many")  # fmt: skip


def _vocab_size(where: Path, given: int | None, args: Mapping[str, Any], rows: int, notes: list[str]) -> int:
    size = given or args.get("vocab_size")
    if type(size) is not int or size < 1:
        notes.append(f"{where.name} does not say the size of the vocabulary before padding: all {rows} rows count as words; "
                     f"--true-vocab-size says otherwise")  # fmt: skip
        return rows
    if size > rows:
        raise CheckpointError(f"{where}: {size} words do not fit into the {rows} rows of the embedding (--true-vocab-size)")
    return size


def _has_cut_experts(ranks: dict[int, Files], degree: int, args: Mapping[str, Any]) -> bool:
    """By the width of an expert, where the arguments do not say it."""
    path = next(iter(ranks[0].experts.values()), None)
    widths = [t.shape[1] for (_, _, name), t in _expert_content(path).items() if name == "dense_4h_to_h.weight"] if path else []
    return any(width * degree == args.get("ffn_hidden_size") for width in widths)


def _flat_model(where: Path, content: dict[str, Any], notes: list[str]) -> dict[str, Tensor]:
    """`encoder.layers.0...` -> tensor."""
    if not isinstance(content.get("module"), dict):
        raise CheckpointError(f"{where}: has no weights under the key module")
    flat = dict(_flattened("", content["module"]))
    strays = [name for name in flat if _EXPERT_KEY.fullmatch(name)]
    if strays:  # some versions of DeepSpeed leave one rank's experts there
        notes.append(f"{where.name} has {len(strays)} tensors of experts, the first {strays[0]}: the files of the experts count")
    flat = {name.removeprefix("language_model."): tensor for name, tensor in flat.items() if name not in strays}
    _check_tensors(where, flat)
    return flat


def _flattened(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flattened(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value


def _check_tensors(where: Path, flat: Mapping[Any, Any]) -> None:
    import torch

    for name, value in flat.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{where}: {name} is no plain tensor")
        if str(value.dtype).removeprefix("torch.") not in ITEM_SIZE:
            raise CheckpointError(f"{where}: {name} is of {value.dtype}; known are {', '.join(ITEM_SIZE)}")


def _expert_content(path: Path) -> dict[tuple[int, int, str], Tensor]:
    content = read_file(path)
    _check_tensors(path, content)
    matches = {name: _EXPERT_KEY.fullmatch(str(name)) for name in content}
    if foreign := [name for name, match in matches.items() if not match]:
        raise CheckpointError(f"{path}: {foreign[0]} is no name of an expert's tensor of Megatron-DeepSpeed")
    return {(int(match[2]), int(match[3]), match[4]): content[name] for name, match in matches.items()}


def _check_equal(name: str, copies: Sequence[Tensor]) -> None:
    import torch

    for rank, copy in enumerate(copies[1:], start=1):
        if not torch.equal(copies[0].contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8)):
            far = float((copies[0].double() - copy.double()).abs().max())
            raise CheckpointError(f"{name}: is not cut over tensor-parallel ranks, and its copies of ranks 0 and {rank} are up to {far:g} apart; "
                                  f"one model cannot be made of them")  # fmt: skip


def _record_problems(path: Path) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                yield f"{path.parent.name}/{path.name}: CRC-32 mismatch in its record {damaged}"
    except (OSError, zipfile.BadZipFile) as error:
        yield f"{path.parent.name}/{path.name}: cut off or damaged ({error})"


# ---------------------------------------------------------------- what is in the files, in our words


def _tensors(path: Path, layout: Layout) -> Tensors:
    """Our names, shapes and types. CheckpointError with what is missing, more than expected, or of another size."""
    problems = _name_problems(path, layout)
    found: Tensors = {}
    if not problems:
        for entry in layout.entries:
            try:
                found |= _described(entry, layout)
            except (ValueError, RuntimeError) as error:
                problems.append(f"{entry.theirs.format('*')}: {error}")
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise CheckpointError("\n".join(f"{path}: {problem}" for problem in problems[:SHOWN] + more))
    used = [files.model.name for rank, files in layout.ranks.items() if rank < len(layout.models)]
    experts = [p.name for n, count in layout.moe_layers() for e in range(count) for p in layout.paths(n, e).values()]
    layout.used = list(dict.fromkeys(used + experts))
    return found


def _name_problems(path: Path, layout: Layout) -> list[str]:
    dense = {entry.theirs for entry in layout.entries if not entry.layer}
    problems = []
    for rank, model in enumerate(layout.models):
        problems += [f"{model_file(rank)}: {name} is missing" for name in sorted(dense - model.keys())]
        problems += [
            f"{model_file(rank)}: has {name}, and the model that its arguments describe has not" for name in model if name not in dense
        ]
    by_number: dict[int, list[Entry]] = {}
    for entry in layout.entries:
        if entry.layer:
            by_number.setdefault(entry.number, []).append(entry)
    for number, members in by_number.items():
        for expert in range(members[0].num_experts):
            problems += _expert_problems(layout, members, number, expert)
    known = {(number, expert) for number, members in by_number.items() for expert in range(members[0].num_experts)}
    for files in layout.ranks.values():
        problems += [f"{file.name}: the arguments know of {len(by_number)} MoE layers, and of no such expert"
                     for place, file in files.experts.items() if place not in known]  # fmt: skip
    return problems


def _expert_problems(layout: Layout, members: list[Entry], number: int, expert: int) -> Iterator[str]:
    """Of the files of one expert."""
    paths = layout.paths(number, expert)
    ranks = range(len(layout.models)) if layout.is_cut else [min(paths, default=0)]
    if missing := [rank for rank in ranks if rank not in paths]:
        yield from (f"{expert_file(number, expert, rank)}: missing" for rank in missing)
        return
    wanted = {layout.key(entry, expert) for entry in members}
    for path in paths.values():
        is_old = not path.name.startswith("layer_")  # such a file has an expert of every layer
        there = {key for key in layout.content(path) if not is_old or key[0] == members[0].layer - 1}
        yield from (f"{path.name}: {_spelled(key)} is missing" for key in sorted(wanted - there))
        yield from (f"{path.name}: has {_spelled(key)}, which is not of this file's expert" for key in sorted(there - wanted))


def _spelled(key: tuple[int, int, str]) -> str:
    return f"encoder.layers.{key[0]}.{EXPERTS}.{key[1]}.{key[2]}"


def _described(entry: Entry, layout: Layout) -> Tensors:
    """Through the same code as the tensors themselves, with tensors that have a shape and nothing else."""
    if not entry.layer:
        parts_ = [model[entry.theirs] for model in layout.models]
        ours = whole(entry, layout.heads, _shapes_of(entry, parts_))
        if entry.kind == "vocab":
            ours = [fit_rows(t, layout.rows) for t in ours]
        return {name: _entry(t.shape, t.dtype) for name, t in zip(entry.ours, ours)}
    first: list[tuple[tuple[int, ...], Any]] = []
    for expert in range(entry.num_experts):
        found = [content[layout.key(entry, expert)] for content in layout.contents(entry, expert)]
        ours = [(tuple(t.shape), t.dtype) for t in whole(entry, layout.heads, _shapes_of(entry, found))]
        first = first or ours
        if ours != first:
            raise ValueError(f"expert {expert} has {_spelled_shape(ours[0])} here, expert 0 {_spelled_shape(first[0])}")
    return {name: _entry((entry.num_experts, *shape), dtype) for name, (shape, dtype) in zip(entry.ours, first)}


def _shapes_of(entry: Entry, parts_: Sequence[Tensor]) -> list[Tensor]:
    import torch

    if len({(tuple(t.shape), t.dtype) for t in parts_}) > 1:
        raise ValueError(f"tensor-parallel ranks have {' and '.join(sorted({_spelled_shape((tuple(t.shape), t.dtype)) for t in parts_}))}")
    return [torch.empty_like(t, device="meta") for t in (parts_ if entry.cut is not None else parts_[:1])]


def _spelled_shape(kind: tuple[tuple[int, ...], Any]) -> str:
    return f"{list(kind[0])} of {str(kind[1]).removeprefix('torch.')}"


def _entry(shape: Sequence[int], dtype: Any) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def _carried(path: Path, contents: list[dict], layout: Layout, run: RunConfig, rows: int, dtypes: Mapping[str, str],
             notes: list[str]) -> dict[str, Any]:  # fmt: skip
    """What is needed to write the same files again, as JSON."""
    left: list[str] = []
    state = [{key: value for key, value in content.items() if key != "module"} for content in contents]
    encoded = [plain_data.encode(values, model_file(rank), left) for rank, values in enumerate(state)]
    if left:
        notes.append(f"{len(left)} values beside the weights are no plain data and are left out, the first {left[0]}")
    experts = {str(number): [list(layout.paths(number, e)) for e in range(count)] for number, count in layout.moe_layers()}
    return {
        "config": run.to_dict(), "checkpoint_version": layout.heads.version, "rows": rows, "dtypes": dict(dtypes), "state": encoded,
        "tag": path.name, "keys": list(_ways((), contents[0]["module"])), "expert_ranks": experts, "expert_prefix": layout.expert_prefix(),
    }  # fmt: skip


def _ways(before: tuple[str, ...], value: Any) -> Iterator[list[str]]:
    """The keys from the top of a nested dict to each tensor, in its order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _ways((*before, str(name)), inner)
    elif not _EXPERT_KEY.fullmatch(".".join(before)):
        yield list(before)


def _still_valid(source: Source) -> dict[str, Any] | None:
    """What was carried along, if the model is still the one that it came with."""
    carried = source.meta.get(CARRIED)
    return carried if carried and RunConfig.from_dict(carried["config"]) == _run_of(source) else None


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Target:
    """The layout to write for: file names, cuts and the padding of the vocabulary depend on it."""

    tensor_parallel: int
    expert_parallel: int
    cuts_experts: bool


def target_of(
    run: RunConfig,
    target_tensor_parallel_size: int | None = None,
    target_expert_parallel_size: int | None = None,
    target_expert_tensor_parallel_size: int | None = None,
) -> Target:
    """What is not given is that of the run. ConfigError for what does not divide."""
    tp = target_tensor_parallel_size or run.parallel.tensor_model_parallel_size
    ep = target_expert_parallel_size or run.moe.moe_expert_parallel_size
    own_etp = tp if run.parallel.etp > 1 else 1
    etp = target_expert_tensor_parallel_size or own_etp
    m, flag = run.model, f"--target-tensor-parallel-size ({tp})"
    sizes = {"--num-attention-heads": m.num_attention_heads, "--num-key-value-heads": m.key_value_heads, "the MLP width": m.ffn_size}
    problems = [f"{what} ({size}) must be divisible by {flag}" for what, size in sizes.items() if size % tp]
    if etp not in (1, tp):
        problems.append(
            f"--target-expert-tensor-parallel-size ({etp}) must be 1 or {flag}: --enable-expert-tensor-parallelism knows no other"
        )
    for count in sorted({n for n in run.moe.experts_per_layer(m.num_layers) if n > 1}):
        if max(count, ep) % min(count, ep):
            problems.append(f"--target-expert-parallel-size ({ep}) and the experts of a layer ({count}) must divide each other")
    if problems:
        raise ConfigError(problems)
    return Target(tp, ep, etp > 1)


def padding_for(source: Source, target: Target) -> tuple[int, int]:
    """(rows of the embedding, --make-vocab-size-divisible-by with which Megatron makes as many at this degree). No row of ours is cut."""
    run, carried, tp, words = _run_of(source), _still_valid(source), target.tensor_parallel, source.meta["vocab_size"]
    own = flag = run.model.make_vocab_size_divisible_by
    if carried:
        flag = _args_of(plain_data.decode(carried["state"][0])).get("make_vocab_size_divisible_by", own)
        if tp == len(carried["state"]):
            return carried["rows"], flag
    if -(-words // (flag * tp)) * flag * tp < run.model.padded_vocab_size(words):  # was padded for a larger degree
        flag = own // tp if own % tp == 0 else own
    return -(-words // (flag * tp)) * flag * tp, flag


def _args_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what the arguments hold, in whichever kind of object; empty without any."""
    args = state.get("args", {})
    return dict(args) if isinstance(args, dict) else dict(vars(args))


def losses(run: RunConfig, vocab_size: int, **options: int | None) -> list[str]:
    """What a model of Megatron-DeepSpeed does not have, a sentence each. ConfigError for what cannot even be left out."""
    fitting, sentences = without_losses(run)
    target_of(fitting, **options)  # does the layout fit it?
    return sentences


def kept(run: RunConfig, vocab_size: int, tensors: Tensors, **_: int | None) -> Tensors:
    """The tensors of the model without what is lost: all of them where nothing is."""
    from megatron_moe.checkpoint.state import model_state
    from megatron_moe.model.plain import build_plain

    fitting, sentences = without_losses(run)
    if not sentences:
        return tensors
    names = model_state(build_plain(fitting, vocab_size)).keys()
    return {name: entry for name, entry in tensors.items() if name in names}


def stored_dtypes(source: Source) -> dict[str, str]:
    """Parameter -> the type it gets if nobody asks for another: as it came, or what DeepSpeed trains in."""
    run = _run_of(source)
    half = {"fp16": "float16", "bf16": "bfloat16"}
    usual = next((dtype for name, dtype in half.items() if getattr(run.training, name)), run.training.params_dtype)
    names = [name for entry in entries(run, False) for name in entry.ours]
    carried = source.meta.get(CARRIED, {}).get("dtypes", {})
    return {name: carried.get(name, usual) for name in names}


def _run_of(source: Source) -> RunConfig:
    return RunConfig.from_dict(source.meta["config"])


def write(selection: Selection, directory: Path, journal: Journal | None = None, **options: int | None) -> None:
    """A directory with one tag. Each tensor is read once; what has to wait for its file waits in a mapped file beside it.

    Going on: a layer whose experts' files are all finished is not read again, nor are the dense tensors once every rank has its file.
    """
    writing = _Writing(selection, directory, _target_run(selection.source), journal, **options)
    try:
        for number in sorted({e.number for e in writing.entries if e.layer}):
            writing.experts(number)
        writing.models()
    finally:
        shutil.rmtree(writing.waiting, ignore_errors=True)
    sync_directory(writing.path)
    iteration = selection.source.iteration
    write_through(directory / TRACKER, str(iteration))
    write_through(directory / LATEST, writing.path.name)


def _target_run(source: Source) -> RunConfig:
    """The run without what cannot be held."""
    return without_losses(_run_of(source))[0]


class _Writing:
    def __init__(self, selection: Selection, directory: Path, run: RunConfig, journal: Journal | None, **options: int | None):
        self.selection, self.run, self.journal = selection, run, journal
        self.target = target = target_of(run, **options)
        self.carried = _still_valid(selection.source)
        self.is_same = self.carried is not None and target == target_of(run)
        tag = self.carried["tag"] if self.is_same else f"global_step{selection.source.iteration}"
        self.path, self.waiting = directory / tag, directory / "waiting"
        self.path.mkdir(parents=True, exist_ok=True)
        self.waiting.mkdir(exist_ok=True)
        self.entries = list(entries(run, target.cuts_experts and target.tensor_parallel > 1))
        m = run.model
        version = self.carried["checkpoint_version"] if self.carried else 3.0
        self.heads = Heads(m.num_attention_heads, m.key_value_heads, m.head_dim, version)
        self.rows, self.multiple = padding_for(selection.source, target)
        self.kept = 0

    def experts(self, number: int) -> None:
        """The files of one MoE layer."""
        members = [entry for entry in self.entries if entry.number == number]
        ours, tp = [name for entry in members for name in entry.ours], self.target.tensor_parallel
        files = {e: {expert_file(number, e, rank): rank for rank in self._ranks_with(members[0], e)} for e in range(members[0].num_experts)}
        if self._are_finished([file for of_expert in files.values() for file in of_expert], ours):
            return
        stacks = {name: self._wait(tensor) for name, tensor in self._read(ours)}
        for expert, of_expert in files.items():
            todo = {file: rank for file, rank in of_expert.items() if not self._is_finished(file)}
            names = {entry: self._expert_key(entry, expert) for entry in members if todo}
            made = {entry: parts(entry, self.heads, [stacks[name][expert] for name in entry.ours], tp) for entry in names}
            for file, rank in todo.items():
                self._finish(file, {names[entry]: _own(pieces[rank % len(pieces)]) for entry, pieces in made.items()}, ours)
        self._forget()

    def _are_finished(self, files: Iterable[str], ours: list[str]) -> bool:
        """Whether all these files are, of a conversion that was interrupted; then their tensors count as read."""
        if not all(map(self._is_finished, files)):
            return False
        self.selection.credit(ours)
        return True

    def _is_finished(self, file: str) -> bool:
        return self.journal is not None and f"{self.path.name}/{file}" in self.journal.finished

    def _finish(self, file: str, content: dict[str, Any], ours: list[str]) -> None:
        _save(self.path / file, content)
        if self.journal is not None:
            self.journal.finish(f"{self.path.name}/{file}", describe_file(self.path / file), ours)

    def _expert_key(self, entry: Entry, expert: int) -> str:
        prefix = self.carried["expert_prefix"] if self.is_same else EXPERT_PREFIX
        return prefix + entry.theirs.removeprefix("encoder.").format(expert)

    def _ranks_with(self, entry: Entry, expert: int) -> Sequence[int]:
        """Tensor-parallel ranks in whose names the file of an expert is written."""
        if self.is_same:
            return self.carried["expert_ranks"][str(entry.number)][expert]
        tp = self.target.tensor_parallel
        if self.target.cuts_experts and tp > 1:
            return range(tp)
        return mp_ranks_of(expert, entry.num_experts, self.target.expert_parallel, tp)

    def models(self) -> None:
        """The file of each tensor-parallel rank."""
        tp = self.target.tensor_parallel
        dense = [entry for entry in self.entries if not entry.layer]
        names = [name for entry in dense for name in entry.ours]
        if self._are_finished([model_file(rank) for rank in range(tp)], names):
            return
        flat: list[dict[str, Tensor]] = [{} for _ in range(tp)]
        for entry in dense:
            ours = [tensor for _, tensor in self._read(list(entry.ours))]
            if entry.kind == "vocab":
                ours = [fit_rows(t, self.rows) for t in ours]
            pieces = [self._wait(piece) for piece in parts(entry, self.heads, ours, tp)]
            for rank in range(tp):
                flat[rank][entry.theirs] = pieces[rank % len(pieces)]
        ways = self.carried["keys"] if self.carried else [_way(name) for name in flat[0]]
        for rank, state in enumerate(self._states()):
            if not self._is_finished(model_file(rank)):
                self._finish(model_file(rank), {"module": _nested(ways, flat[rank])} | state, names)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        import torch

        for name in names:  # one at a time: a source may read together what it is asked for together
            ((_, tensor),) = self.selection.read([name])
            before, after = self.selection.source.tensors[name]["dtype"], self.selection.tensors[name]["dtype"]
            if before != after and after == "float16" and torch.isinf(tensor).any():
                raise ValueError(f"{name}: has numbers that float16 cannot hold (beyond 65504); choose --dtype bfloat16 or float32")
            yield name, tensor

    def _wait(self, tensor: Tensor) -> Tensor:
        """On the disk, in pages that the system may take out of memory."""
        import torch

        if not tensor.numel():
            return tensor.clone()
        self.kept += 1
        file = self.waiting / str(self.kept)
        with open(file, "wb") as made:
            os.posix_fallocate(made.fileno(), 0, tensor.nbytes)  # a full disk is an error here; in a mapped page it would be a signal
        place = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return place.view(tensor.shape).copy_(tensor)

    def _forget(self) -> None:
        for file in self.waiting.iterdir():
            file.unlink()

    def _states(self) -> list[dict[str, Any]]:
        """What each file has beside the weights."""
        tp, run, source = self.target.tensor_parallel, self.run, self.selection.source
        args = args_of_run(run, source.meta["vocab_size"], self.rows, self._degrees(), source.meta["progress"])
        if not self.carried:
            return [_state_of(run, source, args, tp)] * tp
        states = [plain_data.decode(state) for state in self.carried["state"]]
        if self.is_same:
            return states
        first = {key: value for key, value in states[0].items() if key not in _RNG} | {"mp_world_size": tp}
        changed = (_args_of(first) or vars(args)) | self._degrees() | {"padded_vocab_size": self.rows}
        return [first | {"args": Namespace(**changed)}] * tp

    def _degrees(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.target.tensor_parallel, "moe_expert_parallel_size": self.target.expert_parallel,
            "enable_expert_tensor_parallelism": self.target.cuts_experts, OWN_MULTIPLE: self.run.model.make_vocab_size_divisible_by,
            "make_vocab_size_divisible_by": self.multiple,
        }  # fmt: skip


def _state_of(run: RunConfig, source: Source, args: Any, tp: int) -> dict[str, Any]:
    """The keys of DeepSpeed and Megatron. Generators are not there: --no-load-rng."""
    experts = [n for n in run.moe.experts_per_layer(run.model.num_layers) if n > 1]
    nothing = ("optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "lr_scheduler",
               "data_sampler", "random_ltd", "ds_config")  # fmt: skip
    progress = source.meta["progress"]
    return dict.fromkeys(nothing) | {
        "buffer_names": [], "sparse_tensor_module_names": [], "skipped_steps": 0, "global_steps": source.iteration,
        "global_samples": progress["consumed_samples"], "dp_world_size": 1, "mp_world_size": tp, "ds_version": LAYOUT_VERSION,
        "num_experts": experts, "ds_autoep_layers": None, "iteration": source.iteration, "checkpoint_version": 3.0, "args": args,
        "tokens": progress["consumed_tokens"],
    }  # fmt: skip


def _way(name: str) -> list[str]:
    """As Megatron nests it: below `encoder` the names stay whole."""
    top, _, rest = name.partition(".")
    return ["language_model", top, *(rest.split(".", 1) if top == "embedding" else [rest])]


def _nested(ways: Sequence[Sequence[str]], flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Way: the keys from the top to a tensor."""
    nested: dict[str, Any] = {}
    for *above, last in ways:
        inner = nested
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = flat[".".join([*above, last]).removeprefix("language_model.")]
    return nested


def _own(tensor: Tensor) -> Tensor:
    """With a storage of its own: torch.save writes the whole storage of a view."""
    return tensor.clone().contiguous() if not tensor.is_contiguous() else tensor.clone()


def _save(path: Path, content: dict[str, Any]) -> None:
    import torch

    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
