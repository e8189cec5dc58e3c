"""A training run that starts from a transformers folder (--load-hf): its settings, and its weights in any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.config.flags import ConfigError, fields_of, words_of
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import FIELDS, RunConfig
from megatron_moe.conversion.hf.choice import forward_settings
from megatron_moe.conversion.hf.source import HFSource, open_source, read_values
from megatron_moe.conversion.hf.tokenizer import tokenizer_config

if TYPE_CHECKING:
    from torch import nn

# Settings that a folder suggests and training may choose: they concern no weight, or only how it is trained.
FREE = {
    "hidden_dropout", "attention_dropout", "init_method_std", "moe_loss_coeff", "moe_token_dropping", "moe_top2_2nd_expert_sampling", "bf16",
    "seq_length",
}  # fmt: skip
_BESIDE = ("--moe-token-dropping", "--mtp-num-layers")  # what a folder does not say, or modules that training adds to its model
_OF_EXPERTS = {s.name for s in fields_of(MoEConfig)}
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")


def starting_values(directory: Path, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, by name, out of the folder; the tokenizer's too, unless one is `stated`. ConfigError with what is wrong."""
    if not directory.is_dir():
        raise ConfigError([f"--load-hf {directory}: there is no such directory"])
    values = read_values(directory)[1]
    values["seq_length"] = min(FIELDS["seq_length"].default, values["max_position_embeddings"])
    if any(stated.get(name) for name in ("fp16", "params_dtype")):
        values.pop("bf16", None)
    if not any(stated.get(name) for name in _TOKENIZER):
        found = tokenizer_config(directory)
        values |= {name: getattr(found, name) for name in _TOKENIZER if getattr(found, name) is not None}
    return values


def contradictions(directory: Path, values: Mapping[str, Any], stated: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """What is stated and differs from the folder; `where` says in which place a setting was stated.

    With --moe-use-upcycling the folder has to be dense, and what is stated of experts is what to make of it.
    """
    is_upcycled = bool(stated.get("moe_use_upcycling"))
    has_experts = is_upcycled and any(n > 1 for n in values.get("num_experts", ()))
    return [
        *([_experts_already(directory, values["num_experts"])] if has_experts else []),
        *(
            f"{' '.join(words_of(FIELDS[name], stated[name]))} {where(name)} contradicts {directory / 'config.json'}, which makes it "
            f"{' '.join(words_of(FIELDS[name], value)) if value is not None else 'not given'}; drop it"
            for name, value in values.items()
            if name in stated and stated[name] != value and name not in FREE and not (name == "kv_channels" and value is None)
            if not (is_upcycled and name in _OF_EXPERTS)
        ),
    ]


def _experts_already(directory: Path, num_experts: tuple[int, ...]) -> str:
    return (
        f"--load-hf {directory} has experts already ({' '.join(map(str, num_experts))}, says config.json), and --moe-use-upcycling starts from a "
        "dense model; drop the flag to train these experts, or make a run directory of the folder with tools/convert_checkpoint.py --from hf "
        "--to native and change their number with tools/edit_experts.py"
    )


def other_model(directory: Path, run: RunConfig) -> list[str]:
    """How the model of `run`, or the dense one that it is upcycled from, is another one than the folder's, by whatever flag."""
    values = read_values(directory)[1]
    folder = RunConfig.from_values(values | {"seq_length": 1})
    there = forward_settings(folder)
    here = forward_settings(run.dense() if run.upcycling.moe_use_upcycling else run)
    makes_experts = run.moe.has_experts and not folder.moe.has_experts
    hints = {"--num-experts": ", or add --moe-use-upcycling to make experts of the dense MLPs"} if makes_experts else {}
    return [
        f"{option} is {here.get(option)} in this command, and {there.get(option)} in {directory / 'config.json'}; drop what changes it"
        f"{hints.get(option, '')}"
        for option in {**here, **there}
        if here.get(option) != there.get(option) and option not in _BESIDE
    ]


def open_start(run: RunConfig, verify: str | None = None) -> HFSource:
    """The folder of --load-hf, padded as the run is; ConfigError with all that is wrong with it. `verify`: --ckpt-verify when not given."""
    source = open_source(Path(run.checkpoint.load_hf), make_vocab_size_divisible_by=run.model.make_vocab_size_divisible_by)
    verify = verify or run.checkpoint.ckpt_verify
    if verify != "off" and (problems := source.file_problems(verify)):
        raise ConfigError(problems)
    return source


def fill(model: nn.Module, source: HFSource) -> int:
    """Every parameter and buffer of what is here of the model, sharded or not; returns how many. Not collective. Modules of multi-token
    prediction, for which such a folder has no names, stay as they are.

    One tensor after the other, and of a stack only the experts that are here: memory is the largest of them, beside what is filled.
    """
    import torch

    from megatron_moe.checkpoint.state import MTP, model_state
    from megatron_moe.utils.dtensor import local_part

    targets = {name: tensor for name, tensor in model_state(model).items() if not name.startswith(MTP)}
    with torch.no_grad():
        for name, tensor in targets.items():
            local, where = local_part(tensor)
            if local.numel() == 0:
                continue
            part = source.read_part(name, where)
            if part.shape != local.shape:  # copy_ alone would broadcast
                raise ValueError(f"{name}: {list(part.shape)} in {source.path}, {list(local.shape)} here")
            local.copy_(part)
    return len(targets)
