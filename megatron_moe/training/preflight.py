"""Everything that can be wrong with a run and be seen without starting it. Every rank comes to the same answer alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe.checkpoint.preflight import checkpoint_problems
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.loader import data_problems
from megatron_moe.optimizer.schedule import build_schedule
from megatron_moe.parallel.compile import compiler_problems
from megatron_moe.tokenizers import build_tokenizer

MOCK_VOCAB_SIZE = 512


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
    problems: list[str] = []
    tokenizer = None
    if run.tokenizer.kind:
        try:
            tokenizer = build_tokenizer(run.tokenizer, run.model.vocab_size)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
    vocab_size = run.model.vocab_size or (tokenizer.vocab_size if tokenizer else MOCK_VOCAB_SIZE)
    if tokenizer and run.tokenizer.kind == "NullTokenizer":
        vocab_size = tokenizer.vocab_size
    if tokenizer and tokenizer.vocab_size > vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}; raise --vocab-size or leave it out")
    d = run.data
    if tokenizer is None and (d.reset_position_ids or d.reset_attention_mask or d.eod_mask_loss):
        problems.append("--reset-position-ids, --reset-attention-mask and --eod-mask-loss need the tokenizer's end-of-document token")
    if not d.mock_data:
        problems += data_problems(d, run.training.seq_length, vocab_size, tokenizer.fingerprint if tokenizer else None)
    described = dataclasses.asdict(run.tokenizer) | {"fingerprint": tokenizer.fingerprint if tokenizer else None}
    prepared = Prepared(run, vocab_size, tokenizer.eod if tokenizer else -1, described)
    problems += checkpoint_problems(run.checkpoint, prepared.architecture)
    if run.training.compile:
        problems += compiler_problems("cuda" if torch.cuda.is_available() else "cpu")
    try:
        build_schedule(run.optimizer, run.training, run.global_batch_size(world_size), run.train_iterations(world_size))
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return prepared
