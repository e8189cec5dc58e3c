"""How likely a model finds texts that are given: the sums of log-probabilities that perplexity, accuracy and choices are made of.

A row is a run of tokens of which the last ones are scored, each given all before it. A long text becomes rows that overlap; every token
is scored once, with at least `window - stride` tokens before it (the first ones of the text: with those that there are). Worked
example, 10 tokens behind a start token `^`, window 4 and stride 3, what is scored in brackets:

    ^ [0 1 2 3]
         2 3 [4 5 6]        the window begins three tokens later
               5 6 [7 8 9]
"""
# B rows, S tokens of the longest, D hidden, N scored tokens of all rows, V padded vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.inference.generate import evaluating, fixed_problem, is_in_a_layout, padded, projecting
from megatron_moe.model.gpt import GPT
from megatron_moe.model.loss import mask_padding
from megatron_moe.parallel.tensor import VocabParallelProjection

LOGITS_AT_A_TIME = 2**24  # numbers; those of a whole batch would be the largest tensor of all


@dataclass(frozen=True)
class Row:
    """The tokens from `first` (1 or more) on are scored."""

    tokens: Sequence[int]
    first: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Score:
    """`log_prob`: nats, of all scored tokens together; `is_greedy`: each of them is the likeliest one."""

    log_prob: float
    tokens: int
    is_greedy: bool


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Row]:
    """Rows that score every token but the first once. At most `window` tokens are seen by any; the last row is moved back to see as many.

    ValueError for a stride that would leave tokens out.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"the stride ({stride}) must be from 1 to the window ({window}): tokens between two windows would not be scored")
    done = 0  # tokens behind the first that have been scored
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens) - 1)
        if end <= done:
            return
        begin = max(min(begin, end - window), 0)
        yield Row(tokens[begin : end + 1], done + 1 - begin)
        done = end


def encode_pair(encoder: Encoder, context: str, continuation: str, start: int | None) -> tuple[list[int], list[int]]:
    """Tokens of both, cut where the context ends as text; blanks at the end of the context belong to the continuation, for tokenizers
    write them that way. An empty context is the `start` token. ValueError when there is nothing to score."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    before = encoder.encode(context) if context else []
    whole = encoder.encode(context + continuation)
    if not before and start is None:
        raise ValueError(
            "there is nothing before the text to be scored, and without a tokenizer no token that begins a document; give a context"
        )
    if not whole[len(before) :]:
        raise ValueError(f"there is nothing to score in {continuation!r}")
    return before or [start], whole[len(before) :]


def pair_row(before: list[int], after: list[int], window: int) -> Row:
    """The context is cut on the left to what the window has room for. ValueError when it has none for what is scored."""
    if len(after) > window:
        raise ValueError(f"{len(after)} tokens are to be scored, and the window has {window}; give a larger --window or a shorter text")
    tokens = (before + after)[-(window + 1) :]
    return Row(tokens, len(tokens) - len(after))


def row_problems(model: GPT, rows: Sequence[Row]) -> list[str]:
    """What keeps these rows from being scored, one sentence each."""
    if problem := fixed_problem(model):
        return [problem]
    config, problems = model.config, []
    limit = config.max_position_embeddings if config.position_embedding_type == "learned_absolute" else None
    for row in rows:
        wrong = [token for token in row.tokens if not 0 <= token < model.vocab_size]
        if wrong:
            problems.append(f"a text has the token {wrong[0]}, and the vocabulary goes from 0 to {model.vocab_size - 1}")
        if limit is not None and len(row.tokens) - 1 > limit:
            problems.append(
                f"a window of {len(row.tokens) - 1} tokens exceeds the {limit} learned positions of the model; give --window {limit}"
            )
    return list(dict.fromkeys(problems))


@torch.no_grad()
def score_rows(model: GPT, rows: Sequence[Row]) -> list[Score]:
    """One forward of all rows. In a layout every rank calls it with the same rows, and gets the same scores."""
    device = model.output_weight.device
    inputs_BS, _ = padded([list(row.tokens[:-1]) for row in rows], device)
    row_N = [b for b, row in enumerate(rows) for _ in range(row.scored)]
    place_N = torch.tensor([i - 1 for row in rows for i in range(row.first, len(row.tokens))], device=device)
    target_N = torch.tensor([token for row in rows for token in row.tokens[row.first :]], device=device)
    index_N = torch.tensor(row_N, device=device)
    positions_BS = torch.arange(inputs_BS.shape[1], device=device).expand_as(inputs_BS)
    project = model.project
    with evaluating(model), projecting(model, lambda h_BSD, w: scores_of(model, project, h_BSD[index_N, place_N], w, target_N)):
        scored_2N = model(inputs_BS, positions_BS).double()
    if is_in_a_layout(model):  # sums of other orders: ranks whose answers differ in the last bit would show different text
        dist.broadcast(scored_2N, src=0)
    log_prob_B = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add(0, index_N, scored_2N[0])
    misses_B = torch.zeros_like(log_prob_B).index_add(0, index_N, 1 - scored_2N[1])
    return [Score(p, row.scored, m == 0) for p, m, row in zip(log_prob_B.tolist(), misses_B.tolist(), rows)]


def scores_of(model: GPT, project: Callable[[Tensor, Tensor], Tensor], h_ND: Tensor, weight: Tensor, target_N: Tensor) -> Tensor:
    """[2, N]: log-probability of each target, and 1 where it is the likeliest token. Some logits at a time."""
    parts = []
    for h_nD, target_n in zip(*(t.split(max(LOGITS_AT_A_TIME // model.output_weight.shape[0], 1)) for t in (h_ND, target_N))):
        logits_nV = project(h_nD[None], weight)[0]
        if isinstance(project, VocabParallelProjection):
            logits_nV = project.gather(logits_nV)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        logits_nV = mask_padding(logits_nV, model.vocab_size)
        log_prob_n = logits_nV.log_softmax(-1).gather(1, target_n[:, None]).squeeze(1)
        parts.append(torch.stack([log_prob_n, (logits_nV.argmax(-1) == target_n).to(log_prob_n.dtype)]))
    return torch.cat(parts, 1)
