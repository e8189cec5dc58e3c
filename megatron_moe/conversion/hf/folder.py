"""A transformers folder, written: weights under their names there, config.json, the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.checkpoint.files import write_through
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.hf.choice import Choice, choose
from megatron_moe.conversion.hf.names import Place, Places, theirs_of
from megatron_moe.conversion.hf.source import expected, places_of
from megatron_moe.conversion.hf.tokenizer import write_tokenizer
from megatron_moe.conversion.shards import DEFAULT_SHARD_SIZE, plan_shards, write_checksums, write_shards
from megatron_moe.conversion.source import Selection, Source, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.journal import Journal


def losses(run: RunConfig, vocab_size: int, hf_model_type: str | None = None) -> list[str]:
    """What of a model a transformers folder cannot say, one sentence each. ConfigError for what cannot even be left out."""
    return choose(run, vocab_size, hf_model_type).losses


def kept(run: RunConfig, vocab_size: int, tensors: Tensors, hf_model_type: str | None = None) -> Tensors:
    """The tensors that have a place there. The bias of the experts stays float32: it moves by a thousandth at a time."""
    names = expected(Path(), choose(run, vocab_size, hf_model_type).run)
    exact = lambda name: {"dtype": "float32"} if name.endswith(".expert_bias") else {}  # noqa: E731
    return {name: entry | exact(name) for name, entry in tensors.items() if name in names}


def stored_dtypes(source: Source) -> dict[str, str]:
    """Parameter -> the type it gets if nobody asks for another: bfloat16 for a run that computes in it, as public checkpoints have it."""
    from megatron_moe.conversion.fit import run_of  # imports torch

    names = [name for name in source.tensors if name.startswith("model.") and not name.endswith(".expert_bias")]
    return dict.fromkeys(names, "bfloat16") if run_of(source).training.bf16 else {}


def expressed(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """A tensor as it comes back from such a folder: without what the padding of the vocabulary held."""
    if name not in ("model.embedding.weight", "model.head.weight"):
        return tensor
    tensor = tensor.clone()
    tensor[vocab_size:] = 0
    return tensor


def reading_options(run: RunConfig) -> dict[str, Any]:
    """With which `open_source` sees the same shapes as this run."""
    return {"make_vocab_size_divisible_by": run.model.make_vocab_size_divisible_by}


def write(selection: Selection, directory: Path, journal: Journal | None = None, max_shard_size: int = DEFAULT_SHARD_SIZE,
          hf_model_type: str | None = None) -> None:  # fmt: skip
    """Memory holds one tensor of ours, and one matrix of theirs."""
    from megatron_moe.conversion.fit import run_of  # imports torch

    source, vocab = selection.source, selection.source.meta["vocab_size"]
    choice = choose(run_of(source), vocab, hf_model_type)
    directory.mkdir(exist_ok=True)
    map_ = places_of(choice.family.names, selection.tensors, vocab)
    cutter = Cutter(selection, map_)
    theirs = theirs_of(map_, selection.tensors)
    if journal is not None:
        todo = [
            name for file, names in plan_shards("model", theirs, max_shard_size).items() if file not in journal.finished for name in names
        ]
        done = {name for names in journal.finished.values() for name in names}
        selection.credit(sorted(done - set(cutter.behind(todo))))
    write_shards(directory, "model", theirs, max_shard_size, cutter.read, journal, cutter.behind)
    write_checksums(directory, journal.entries if journal else None)
    dtype = next(iter(theirs.values()))["dtype"]
    write_through(directory / "config.json", json.dumps(configuration(choice, source.meta, dtype), indent=2) + "\n")
    if choice.family.brings:
        for path in sorted((Path(__file__).parent / choice.family.brings).glob("*_megatron_moe.py")):
            shutil.copyfile(path, directory / path.name)
    end = source.meta["eod"]
    if end >= 0:
        write_through(directory / "generation_config.json", json.dumps({"eos_token_id": end, "pad_token_id": end}, indent=2) + "\n")
    write_tokenizer(directory, source.meta["tokenizer"], choice.run.model.max_position_embeddings)


def configuration(choice: Choice, meta: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json."""
    end = meta["eod"] if meta["eod"] >= 0 else None
    head = {"architectures": [choice.family.architecture], "model_type": choice.family.model_type}
    return head | choice.family.write(choice.run) | {"bos_token_id": None, "eos_token_id": end, "use_cache": True, "torch_dtype": dtype}


class Cutter:
    """Their tensors out of ours. Holds the tensor of ours that is being cut, so that each is read once."""

    def __init__(self, selection: Selection, map_: Mapping[str, Places]):
        self._selection, self._map = selection, map_
        self._held: dict[str, Tensor] = {}
        self._behind: dict[str, list[tuple[str, int]]] = {}
        for name, places in map_.items():
            for number, place in enumerate(places.of):
                self._behind.setdefault(place.name, []).append((name, number))

    def behind(self, names: list[str]) -> list[str]:
        """The tensors of ours that these are made of."""
        return list(dict.fromkeys(ours for name in names for ours, _ in self._behind[name]))

    def read(self, names: list[str]) -> Iterator[Tensor]:
        return map(self._piece, names)

    def _piece(self, name: str) -> Tensor:
        import torch

        needed = [ours for ours, _ in self._behind[name]]
        if any(ours not in self._held for ours in needed):
            self._held = {}  # before the next is read
            self._held = dict(self._selection.read(needed))
        pieces = {}
        for ours, number in self._behind[name]:
            place = self._map[ours].of[number]
            pieces[place.which] = uncut(self._held[ours], self._map[ours], place, number)
        place = self._map[needed[0]].of[self._behind[name][0][1]]
        return pieces[0] if len(pieces) == 1 else torch.cat([pieces[i] for i in range(place.parts)], dim=place.dim)


def uncut(tensor: Tensor, places: Places, place: Place, number: int) -> Tensor:
    """The part that a tensor of ours is of one of theirs."""
    part = tensor[number] if places.is_stack else tensor if places.vocab is None else tensor[: places.vocab]
    return (part.mT if place.is_turned else part).contiguous()
