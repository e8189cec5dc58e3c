"""A checkpoint of any layout -> a model in one process or in a layout of its own, and the tokenizer that belongs to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.files import run_directory
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.state import MTP, model_state
from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.inference.layout import ONE_PROCESS, Layout, build_in_layout
from megatron_moe.inference.offload import ExpertCache, offload_experts
from megatron_moe.model.gpt import GPT
from megatron_moe.model.plain import build_plain
from megatron_moe.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what a person should know about where it comes from."""

    model: GPT
    run: RunConfig  # as it was trained
    vocab_size: int
    eod: int | None  # end-of-document token; None without a tokenizer
    tokenizer: Tokenizer | None
    path: Path
    notes: tuple[str, ...]
    tokenizer_config: TokenizerConfig  # of `tokenizer`: where its files are
    layout: Layout = ONE_PROCESS
    expert_cache: ExpertCache | None = None  # of experts that stay on the disk


def load_for_inference(
    directory: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    tokenizer: TokenizerConfig | None = None,
    verify: str = "crc",
    layout: Layout = ONE_PROCESS,
    expert_cache_bytes: int | None = None,
) -> Loaded:
    """The newest checkpoint of a run directory, or that of `step`; a single iter_ directory works too.

    Only the model's tensors are read. `tokenizer` overrides where the tokenizer's files are. With a `layout` of several ranks it
    is collective, and each reads its own part. With `expert_cache_bytes` experts stay on the disk, and that much of them in the
    memory of each rank: inference/offload.py. Raises CheckpointError for a checkpoint that cannot be read, ValueError for a
    tokenizer that does not belong to it or a layout that does not divide the model.
    """
    found = find_checkpoint(*run_directory(directory, step), verify, layout.group)
    meta = found.meta
    run, vocab_size = RunConfig.from_dict(meta["config"]), meta["vocab_size"]
    flags = tokenizer_flags(meta["tokenizer"], tokenizer or TokenizerConfig())
    restored = restore_tokenizer(meta["tokenizer"], tokenizer or TokenizerConfig(), run.model.vocab_size, vocab_size)
    plain = run.without_mtp()
    model = build_plain(plain, vocab_size)
    build_in_layout(model, plain, layout, torch.device(device).type)
    cache = None if expert_cache_bytes is None else offload_experts(model, found.path, expert_cache_bytes, torch.device(device))
    model.to_empty(device=device)
    complete = ("model.",) if cache is None else ()  # then it has been compared, experts and all
    load_tensors(found.path, model_state(model), complete, layout.group, optional=[MTP])
    eod = meta["eod"] if meta["eod"] >= 0 else restored.eod if restored else None
    return Loaded(model.eval(), run, vocab_size, eod, restored, found.path, tuple(found.notes), flags, layout, cache)


def tokenizer_flags(saved: dict[str, Any], given: TokenizerConfig) -> TokenizerConfig:
    """Those of training, but for the ones that are `given` now."""
    fields = {field.name: saved.get(field.name) for field in dataclasses.fields(TokenizerConfig)}
    fields |= {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    return TokenizerConfig(**fields)


def restore_tokenizer(saved: dict[str, Any], given: TokenizerConfig, null_size: int | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of training, from the files it had then or those that are `given` now. None when there was none.

    saved: TokenizerConfig as a dict, with its fingerprint. null_size: see build_tokenizer.
    """
    config = tokenizer_flags(saved, given)
    if config.kind is None:
        return None
    tokenizer = build_tokenizer(config, null_size)
    if saved["fingerprint"] not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"the {config.kind} has the fingerprint {tokenizer.fingerprint}, the one of training had {saved['fingerprint']}: another "
            f"type, or its files have changed; point --tokenizer-model, or --vocab-file and --merge-file, to those of training"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the {config.kind} has {tokenizer.vocab_size} tokens, the model only {vocab_size}; give the tokenizer of its training data"
        )
    return tokenizer
