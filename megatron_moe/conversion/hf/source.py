"""A folder of transformers, read as a checkpoint of ours: config.json, model*.safetensors, the tokenizer's files.

Nothing in the folder is executed, and nothing is believed: see `open_source` for what is checked before the first number is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import FIELDS, RunConfig
from megatron_moe.conversion.hf.families import FAMILIES, Family
from megatron_moe.conversion.hf.names import Place, Places, coverage_problems, theirs_of
from megatron_moe.conversion.hf.reader import Settings, read_json
from megatron_moe.conversion.hf.tokenizer import FoundTokenizer, find_tokenizer
from megatron_moe.conversion.shards import CHECKSUMS, checksum_problems, index_name, parts_in, read_headers, read_tensors
from megatron_moe.conversion.source import Tensors

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10  # tensors of a kind in an error
OURS = "megatron_moe"  # model_type of the flat format
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


def looks_like(directory: Path) -> bool:
    """A config.json that is not the flat format's, be it damaged."""
    content, _ = read_json(directory / "config.json")
    return (directory / "config.json").is_file() and content.get("model_type") != OURS and "config" not in content


class HFSource:
    """An opened folder. `map_`: our name -> places; `stored`: their name -> (file, name in it, which may lack the base model's prefix)."""

    iteration = 0

    def __init__(self, path: Path, meta: dict[str, Any], tensors: Tensors, map_: Mapping[str, Places],
                 stored: Mapping[str, tuple[str, str]], notes: list[str], copies: Mapping[str, str]):  # fmt: skip
        self.path, self.meta, self.tensors, self.notes = path, meta, tensors, notes
        self._map, self._stored, self._copies = map_, stored, copies

    @property
    def has_checksums(self) -> bool:
        return (self.path / CHECKSUMS).exists()

    def files(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in ["config.json", *self._weight_files()]}

    def file_problems(self, verify: str) -> list[str]:
        return checksum_problems(self.path, self._weight_files(), verify)

    def _weight_files(self) -> list[str]:
        indices = [name for name in (index_name("model"),) if (self.path / name).exists()]
        return [*indices, *dict.fromkeys(file for file, _ in self._stored.values())]

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._read(name)

    def _read(self, name: str) -> Tensor:
        import torch

        places, entry = self._map[name], self.tensors[name]
        parts = (cut(t, place) for t, place in zip(self._whole(places.of), places.of))
        if not places.is_stack and places.vocab is None:
            return next(parts).contiguous()
        out = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        if places.is_stack:
            for expert, part in enumerate(parts):
                out[expert] = part
            return out
        out[: places.vocab] = next(parts)
        if name in self._copies:
            self._compare_copy(name, out[: places.vocab])
        return out

    def read_part(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """A part of a tensor; of a stack only its experts are read."""
        import torch

        places = self._map[name]
        if not places.is_stack:
            return self._read(name)[where]
        mine = places.of[where[0]]
        return torch.stack([cut(whole, place)[where[1:]] for whole, place in zip(self._whole(mine), mine)])

    def _whole(self, places: Sequence[Place]) -> Iterator[Tensor]:
        return read_tensors(self.path, [self._stored[place.name] for place in places])

    def _compare_copy(self, name: str, rows_VD: Tensor) -> None:
        import torch

        (copy_VD,) = read_tensors(self.path, [self._stored[self._copies[name]]])
        if not torch.equal(copy_VD, rows_VD):
            raise ValueError(
                f"{self.path}: config.json ties the output layer to the embedding, and {self._copies[name]} is another matrix; set "
                "tie_word_embeddings to false there if it is meant, or remove the tensor"
            )


def cut(whole: Tensor, place: Place) -> Tensor:
    """What of a tensor there is one of ours; a view."""
    part = whole
    if place.parts > 1:
        size = whole.shape[place.dim] // place.parts
        part = whole.narrow(place.dim, place.which * size, size)
    return part.mT if place.is_turned else part


# ---------------------------------------------------------------- opening


def open_source(directory: Path, iteration: int | None = None, make_vocab_size_divisible_by: int | None = None) -> HFSource:
    """Configuration, names, shapes and types of a folder; ConfigError with all that is wrong.

    Checked: the configuration's types and values, the index (no file outside, none missing, no tensor twice), every header, that every
    tensor that the configuration asks for is there in its shape, and that nothing else is; that the tokenizer fits. The vocabulary is
    padded with zeros to a multiple of `make_vocab_size_divisible_by` (128, as in training, if not given).
    """
    directory = Path(directory)
    if iteration not in (None, 0):
        raise ConfigError([f"{directory}: a folder of transformers has no iterations, and --iteration says {iteration}; leave it out"])
    family, run, notes, content = read_configuration(directory, make_vocab_size_divisible_by)
    if not parts_in(directory, ["model"]):
        raise ConfigError([f"{directory}: {_why_no_weights(directory)}"])
    files, found, problems = read_headers(directory, "model")
    if problems:
        raise ConfigError(problems)
    problems = _size_problems(directory, run, found)
    if problems:
        raise ConfigError(problems)
    ours = expected(directory, run)
    is_fused = family.fused is not None and any(name.endswith("experts.gate_up_proj") for name in found)
    names = family.fused if is_fused and family.fused else family.names
    map_ = places_of(names, ours, run.model.vocab_size, is_fused)
    theirs = theirs_of(map_, ours)
    base = names.layer.partition(".")[0] + "."
    prefix = "" if any(name.startswith(base) for name in found) else base  # the base model alone was saved
    named = {name.removeprefix(prefix) if prefix else name: name for name in theirs}
    copies = _tied_copies(map_, run, found)
    ignored = [
        n for n in found if n not in named and (n in copies.values() or any(re.fullmatch(p, n) for p in names.ignored) or _is_mtp(n, run))
    ]
    problems = _tensor_problems(directory, theirs, found, {theirs_name: stored for stored, theirs_name in named.items()}, ignored)
    problems += coverage_problems(map_)
    if problems:
        raise ConfigError(problems)
    tokenizer = find_tokenizer(directory, run.model.vocab_size)
    stored = {theirs_name: (files[name], name) for name, theirs_name in named.items()} | {n: (files[n], n) for n in copies.values()}
    tensors = {name: {"shape": ours[name]["shape"], "dtype": found[stored[places.of[0].name][1]]["dtype"]} for name, places in map_.items()}
    notes += tokenizer.notes
    notes.append(f"{len(found) - len(ignored)} tensors of {family.model_type} in {len(set(files.values()))} files are {len(tensors)} here")
    if ignored:
        notes.append(
            f"{len(ignored)} tensors are not needed and ignored: {', '.join(ignored[:SHOWN])}{' ...' if len(ignored) > SHOWN else ''}"
        )
    return HFSource(directory, _meta(run, content, tokenizer), tensors, map_, stored, notes, copies)


def read_configuration(
    directory: Path, make_vocab_size_divisible_by: int | None = None
) -> tuple[Family, RunConfig, list[str], dict[str, Any]]:
    """(family, the run it describes, notes, config.json)."""
    family, values, notes, content = read_values(directory)
    values |= {"seq_length": min(1024, values["max_position_embeddings"])}
    if make_vocab_size_divisible_by is not None:
        values["make_vocab_size_divisible_by"] = make_vocab_size_divisible_by
    try:
        return family, RunConfig.from_values(values), notes, content
    except ConfigError as error:
        raise ConfigError([f"{directory / 'config.json'}: {problem}" for problem in error.problems]) from None


def read_values(directory: Path) -> tuple[Family, dict[str, Any], list[str], dict[str, Any]]:
    """(family, settings of a run by name, notes, config.json). ConfigError with all that is wrong with the file."""
    where = directory / "config.json"
    content, problem = read_json(where)
    if problem:
        raise ConfigError([problem])
    kind = content.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError([f"{where}: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}"])
    settings = Settings(content, str(where))
    values = family.read(settings)
    if "quantization_config" in content:
        settings.problem(
            "quantization_config", "says that the weights are quantised; write them as bfloat16 first, with the tool of their authors"
        )
    assert values.keys() <= FIELDS.keys(), values.keys() - FIELDS.keys()
    dtype = content.get("dtype") or content.get("torch_dtype")
    if dtype == "bfloat16":
        values["bf16"] = True
    if settings.problems:
        raise ConfigError(settings.problems)
    unused = [name for name in settings.unknown() if name != "quantization_config"]
    notes = [f"{where}: {', '.join(unused)}: not known here, and not looked at"] if unused else []
    return family, values, notes, content


def expected(directory: Path, run: RunConfig) -> Tensors:
    """Names and shapes of ours; a model without memory is built for it."""
    from megatron_moe.checkpoint.load import describe
    from megatron_moe.checkpoint.state import model_state
    from megatron_moe.model.plain import build_plain

    try:
        return describe(model_state(build_plain(run, run.model.vocab_size)))
    except (RuntimeError, OverflowError) as error:
        raise ConfigError([f"{directory / 'config.json'}: a model of these sizes cannot be built: {str(error).splitlines()[0]}"]) from None


def places_of(names: Any, ours: Tensors, vocab: int, is_fused: bool = False) -> dict[str, Places]:
    """Our name -> places. ConfigError for a tensor that the family has no place for."""
    map_ = {name: names.places(name.removeprefix("model."), entry, vocab, is_fused) for name, entry in ours.items()}
    if nowhere := [name for name, places in map_.items() if places is None]:
        raise ConfigError([f"{name}: has no place in this architecture" for name in nowhere[:SHOWN]])
    return map_


def _size_problems(directory: Path, run: RunConfig, found: Tensors) -> list[str]:
    """What would take for ever to build is not there in so many tensors."""
    most = max((max(entry["shape"], default=0) for entry in found.values()), default=0)
    wanted = {"layers": run.model.num_layers, "experts": max(run.moe.num_experts)}
    limits = {"layers": len(found), "experts": max(len(found), most)}
    return [
        f"{directory / 'config.json'}: {count} {what}, and there are {len(found)} tensors in all"
        for what, count in wanted.items()
        if count > limits[what]
    ]


def _tensor_problems(directory: Path, theirs: Tensors, found: Tensors, stored: Mapping[str, str], ignored: Sequence[str]) -> list[str]:
    """Missing, misshapen, of another type, not known: the first ten of each."""
    missing = [f"{name}: missing" for name in theirs if stored[name] not in found]
    there = {name: found[stored[name]] for name in theirs if stored[name] in found}
    shapes = [
        f"{name}: {list(entry['shape'])} in the file, and config.json makes it {list(theirs[name]['shape'])}"
        for name, entry in there.items()
        if list(entry["shape"]) != list(theirs[name]["shape"])
    ]
    dtypes = [
        f"{name}: {entry['dtype']}; weights are float32, bfloat16 or float16"
        for name, entry in there.items()
        if entry["dtype"] not in ("float32", "bfloat16", "float16")
    ]
    known = {*stored.values(), *ignored}
    extra = [f"{name}: not a tensor of this model" for name in found if name not in known]
    lines = [
        lines[:SHOWN] + [f"... and {len(lines) - SHOWN} more like this"] * (len(lines) > SHOWN)
        for lines in (missing, shapes, dtypes, extra)
    ]
    return [f"{directory}: {line}" for kind in lines for line in kind]


def _tied_copies(map_: Mapping[str, Places], run: RunConfig, found: Tensors) -> dict[str, str]:
    """Embedding -> the copy of it that a file holds although they are tied."""
    name = "lm_head.weight"
    return {"model.embedding.weight": name} if run.model.is_tied and name in found else {}


def _is_mtp(name: str, run: RunConfig) -> bool:
    """A layer behind the last one: DeepSeek's multi-token prediction, which transformers leaves out as well."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= run.model.num_layers and run.model.multi_latent_attention


def _why_no_weights(directory: Path) -> str:
    if any((directory / name).exists() for name in _PICKLES):
        return (
            "holds pickled weights (pytorch_model.bin or alike), which can run code when they are loaded, and no safetensors; where you trust "
            "them, write them anew: transformers' from_pretrained(DIR).save_pretrained(NEW)"
        )
    return f"no weights (looked for model.safetensors and {index_name('model')})"


def _meta(run: RunConfig, content: dict[str, Any], tokenizer: FoundTokenizer) -> dict[str, Any]:
    """As a training run describes itself; it has not made a step."""
    import torch

    import megatron_moe

    vocab = run.model.vocab_size
    run = dataclasses.replace(run, tokenizer=tokenizer.config)
    eos = content.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    eod = tokenizer.eod if tokenizer.eod is not None else eos if type(eos) is int and 0 <= eos < vocab else -1
    return {
        "world_size": 1,
        "versions": {"megatron_moe": megatron_moe.__version__, "torch": torch.__version__},
        "progress": {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0, "ordered_samples": None},
        "architecture": run.architecture(vocab),
        "vocab_size": vocab,
        "eod": eod,
        "tokenizer": dataclasses.asdict(tokenizer.config) | {"fingerprint": tokenizer.fingerprint},
        "config": run.to_dict(),
    }
