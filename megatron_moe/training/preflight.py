"""Everything that can be wrong with a run and be seen without starting it. Every rank comes to the same answer alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe.checkpoint.preflight import checkpoint_problems, dense_problems, teacher_problems
from megatron_moe.config.data import MOCK_VOCAB_SIZE
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.conversion.hf.start import open_start
from megatron_moe.conversion.upcycle import fit_problems
from megatron_moe.data.loader import data_problems
from megatron_moe.kernels.fp8 import gpu_problems
from megatron_moe.optimizer.apex_adam import apex_problems
from megatron_moe.optimizer.schedule import build_schedule
from megatron_moe.parallel.compile import compiler_problems
from megatron_moe.parallel.fused import device_problem
from megatron_moe.tokenizers import Tokenizer, build_tokenizer
from megatron_moe.training.graphed import graph_gpu_problems


@dataclass(frozen=True)
class Prepared:
    """A checked run, and what its tokenizer decides."""

    run: RunConfig
    vocab_size: int
    eod: int  # end-of-document token; -1 without a tokenizer
    tokenizer: dict[str, Any]  # how to build it again: kept in the checkpoint for generation

    @property
    def architecture(self) -> dict[str, Any]:
        return self.run.architecture(self.vocab_size)


def prepare(run: RunConfig, world_size: int) -> Prepared:
    """Raises ConfigError with all problems of schedule, tokenizer, data and checkpoint directories."""
    tokenizer = None
    if run.tokenizer.kind:
        try:
            tokenizer = build_tokenizer(run.tokenizer, run.model.vocab_size)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
    vocab_size = vocab_size_of(run, tokenizer)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    problems = [*tokenizer_problems(run, tokenizer), *schedule_problems(run, world_size)]
    if not run.data.mock_data:
        samples = run.pace(world_size).after(run.train_iterations(world_size)).samples
        problems += data_problems(run.data, run.training.seq_length, vocab_size, fingerprint, samples)
    described = dataclasses.asdict(run.tokenizer) | {"fingerprint": fingerprint}
    prepared = Prepared(run, vocab_size, tokenizer.eod if tokenizer else -1, described)
    problems += checkpoint_problems(run, prepared.architecture)
    problems += start_problems(run, vocab_size)
    if run.upcycling.moe_use_upcycling and run.checkpoint.load:
        problems += dense_problems(run, run.dense().architecture(vocab_size), fingerprint)
    if run.distillation.is_on and run.distillation.load_teacher:
        problems += teacher_problems(run, run.teacher().architecture(vocab_size), fingerprint)
    problems += apex_problems(run.optimizer)
    problems += expert_problems(run)
    if run.moe.moe_token_dispatcher == "fused" and max(run.expert_degrees(), default=1) > 1 and (reason := device_problem()):
        problems.append(f"--moe-token-dispatcher fused {reason}; use --moe-token-dispatcher auto, or alltoall")
    if run.training.compile:
        problems += compiler_problems("cuda" if torch.cuda.is_available() else "cpu")
    if run.training.cuda_graph_impl != "none":
        problems += graph_gpu_problems()
    if (switch := run.training.kill_switch_file) and os.path.exists(switch):
        problems.append(f"--kill-switch-file {switch} is there already: the run would stop at once; remove the file to train")
    if problems:
        raise ConfigError(problems)
    return prepared


def start_problems(run: RunConfig, vocab_size: int, verify: str | None = None) -> list[str]:
    """What is wrong with the folder of --load-hf, or keeps this model from being made of it. `verify`: --ckpt-verify when not given."""
    if not run.checkpoint.load_hf:
        return []
    try:
        source = open_start(run, verify)
    except ConfigError as error:
        return error.problems
    return fit_problems(run, vocab_size, source)[:10] if run.upcycling.moe_use_upcycling else []


def expert_problems(run: RunConfig) -> list[str]:
    """What the GPU here cannot do of what is asked for the experts."""
    if not (run.moe.moe_fp8_experts and run.moe.has_experts and torch.cuda.is_available()) or run.training.moe_kernels == "reference":
        return []
    width, inner = run.moe.moe_latent_size or run.model.hidden_size, run.moe.expert_ffn_size(run.model.ffn_size) // run.parallel.etp
    return gpu_problems(torch.cuda.get_device_capability(), getattr(torch, run.training.half or run.training.params_dtype), (width, inner))


def vocab_size_of(run: RunConfig, tokenizer: Tokenizer | None) -> int:
    """Before padding: the flag's, else the tokenizer's, else that of mock data."""
    if tokenizer and run.tokenizer.kind == "NullTokenizer":
        return tokenizer.vocab_size
    return run.model.vocab_size or (tokenizer.vocab_size if tokenizer else MOCK_VOCAB_SIZE)


def tokenizer_problems(run: RunConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    vocab_size, d = vocab_size_of(run, tokenizer), run.data
    if tokenizer and tokenizer.vocab_size > vocab_size:
        yield f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}; raise --vocab-size or leave it out"
    if run.tokenizer.kind is None and (d.reset_position_ids or d.reset_attention_mask or d.eod_mask_loss):
        yield "--reset-position-ids, --reset-attention-mask and --eod-mask-loss need the tokenizer's end-of-document token"


def schedule_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    try:
        build_schedule(run.optimizer, run.pace(world_size), run.train_iterations(world_size))
    except ValueError as error:
        yield str(error)
