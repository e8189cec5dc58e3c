"""Checkpoints of a few thousand weights, saved as a training run saves them, and what is in them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint.files import read_manifest
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.config.run import RunConfig
from megatron_moe.model.init import initialize_parameters
from megatron_moe.model.plain import build_plain
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.tokenizers import build_tokenizer
from megatron_moe.training.checkpoints import Progress, describe
from megatron_moe.training.preflight import Prepared
from tools import convert_checkpoint

VALUES = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_experts": (1, 4), "expert_interval": 1, "ffn_hidden_size": 24,
    "max_position_embeddings": 16, "seq_length": 16, "tokenizer_type": "ByteTokenizer", "init_method_std": 0.3, "mlp_type": "residual",
}  # fmt: skip


def save_small(directory: Path, iterations=(10,), with_optimizer=True, **values) -> Path:
    """A run directory; with moments that differ everywhere, as after a step."""
    run = RunConfig.from_values(VALUES | values)
    tokenizer = build_tokenizer(run.tokenizer, run.model.vocab_size)
    model = build_plain(run, tokenizer.vocab_size)
    model.to_empty(device="cpu")
    initialize_parameters(model, 1, 0.3, run.model.num_layers)
    optimizer = build_optimizer(model, run.optimizer)
    for parameter in model.parameters():
        parameter.grad = (parameter.detach() + 1) * 3
    optimizer.step()
    optimizer.zero_grad()
    tensors = model_state(model) | (optimizer_state(model, optimizer) if with_optimizer else {})
    prepared = Prepared(
        run, tokenizer.vocab_size, tokenizer.eod, dataclasses.asdict(run.tokenizer) | {"fingerprint": tokenizer.fingerprint}
    )
    for iteration in iterations:
        CheckpointManager(directory).save(iteration, tensors, describe(prepared, Progress(iteration, iteration * 4, iteration * 64)))
    return directory


def native_tensors(iteration_directory: Path) -> dict[str, Tensor]:
    """Everything in one checkpoint, read without the code under test."""
    entries = read_manifest(iteration_directory).tensors
    tensors = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in entries.items()}
    load_tensors(iteration_directory, tensors)
    return tensors


def hashes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {
        name: (str(t.dtype), tuple(t.shape), hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, t in tensors.items()
    }


def convert(capsys, source: str, target: str, load: Path, save: Path, *flags: str) -> tuple[int, str, str]:
    """The tool: exit code, standard output, standard error."""
    try:
        code = convert_checkpoint.main(["--from", source, "--to", target, "--load", str(load), "--save", str(save), *flags])
    except SystemExit as stopped:
        code = stopped.code
    out = capsys.readouterr()
    return code, out.out, out.err


def to_safetensors(capsys, load: Path, save: Path, *flags: str) -> tuple[int, str, str]:
    return convert(capsys, "native", "safetensors", load, save, *flags)


def to_native(capsys, load: Path, save: Path, *flags: str) -> tuple[int, str, str]:
    return convert(capsys, "safetensors", "native", load, save, *flags)
