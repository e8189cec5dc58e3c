"""Prompts -> continuations: one pass over the prompts fills the cache, then each pass adds a token to every row."""
# B prompts, S tokens of this pass, D hidden, V padded vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.kv_cache import cached_attention
from megatron_moe.inference.sampling import Generators, Sampling, sample
from megatron_moe.model.core import all_are_here
from megatron_moe.model.gpt import GPT
from megatron_moe.model.loss import mask_padding
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.tensor import VocabParallelProjection
from megatron_moe.parallel.zero import reshard

Prompts = list[list[int]]


def generate(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eod: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the end of document: fewer than `max_new_tokens` mean that it came."""
    return collect(stream(model, prompts, max_new_tokens, sampling, eod, generator), len(prompts))


def collect(steps: Iterator[list[int | None]], num_prompts: int) -> list[list[int]]:
    """The steps of `stream`, put together by prompt."""
    texts: list[list[int]] = [[] for _ in range(num_prompts)]
    for step in steps:
        for text, token in zip(texts, step):
            if token is not None:
                text.append(token)
    return texts


@torch.no_grad()  # not inference mode: FSDP keeps what it gathers, and training cannot use tensors of that mode
def stream(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    eod: int | None = None,
    generator: Generators = None,
    finished: set[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the next token of every prompt, None where the text has ended; stops when all have. `max_new_tokens`: of all, or of each.

    An empty prompt starts from `eod`. Greedy tokens of a prompt do not depend on the others; draws do, as all come from one
    `generator` (on the model's device), unless each prompt has a config and a generator of its own. Between two steps the model belongs to this stream.
    The caller may add numbers of prompts (from 0) to `finished` between two steps: these end there.

    A model in a layout: every rank calls it with the same prompts. The draws of rank 0 count, what rank 0 has finished, and when
    rank 0 closes the stream; all ranks get the same tokens.
    """
    finished = set() if finished is None else finished
    prompts = [start(prompt, eod) for prompt in prompts]
    problems = prompt_problems(model, prompts, max_new_tokens)
    if problems:
        raise ValueError("\n".join(problems))
    tokens_BS, lengths_B = padded(prompts, model.output_weight.device)
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    limits_B = torch.as_tensor(max_new_tokens, device=lengths_B.device).expand_as(lengths_B)
    steps = int(limits_B.max())
    at_B, last_B = lengths_B - 1, lengths_B - 1
    ended_B = torch.zeros_like(lengths_B, dtype=torch.bool)
    with evaluating(model), unmeasured(model), cached_attention(model, tokens_BS.shape[1] + steps):
        for step in range(1, steps + 1):
            next_B = next_tokens_of(model, logits_at(model, tokens_BS, positions_BS, last_B), sampling, generator)
            next_tokens = next_B.tolist()
            ended_B |= next_B == (-1 if eod is None else eod)
            ended = ended_B.tolist()
            if all(ended):
                return
            try:
                yield [None if done else token for done, token in zip(ended, next_tokens)]
            except GeneratorExit:
                agree_on_ended(model, torch.ones_like(ended_B))  # or the other ranks would go on
                raise
            unwanted_B = torch.tensor([row in finished for row in range(len(prompts))], device=ended_B.device)
            ended_B = agree_on_ended(model, ended_B | unwanted_B | (limits_B <= step))
            if bool(ended_B.all()):
                return
            # rows that have ended go on unseen, at the place where they are: without dropping, they touch nobody
            at_B = torch.where(ended_B, at_B, at_B + 1)
            tokens_BS, positions_BS, last_B = next_B[:, None], at_B[:, None], torch.zeros_like(lengths_B)


def is_in_a_layout(model: GPT) -> bool:
    """Whether several ranks answer together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    has_columns = isinstance(model.project, VocabParallelProjection)
    return has_columns or isinstance(model, FSDPModule) or any(moe.dispatcher.name != "local" for moe in moe_layers(model))


def agree_on_ended(model: GPT, ended_B: Tensor) -> Tensor:
    """Rank 0's: only it may know who has gone away. bool [B]"""
    if not is_in_a_layout(model):
        return ended_B
    flags_B = ended_B.to(torch.uint8)
    dist.broadcast(flags_B, src=0)
    return flags_B.bool()


def next_tokens_of(model: GPT, logits_Bv: Tensor, sampling: Sampling, generator: Generators) -> Tensor:
    """[B]. Under tensor parallelism a rank has some columns of the logits: they are put together."""
    if isinstance(model.project, VocabParallelProjection):
        logits_Bv = model.project.gather(logits_Bv)
    next_B = sample(mask_padding(logits_Bv, model.vocab_size), sampling, generator)
    if is_in_a_layout(model):  # ranks whose texts differ would wait for each other
        dist.broadcast(next_B, src=0)
    return next_B


def start(prompt: list[int], eod: int | None) -> list[int]:
    """The prompt, or for an empty one the token after which documents begin."""
    if not prompt and eod is None:
        raise ValueError("an empty prompt starts from the end-of-document token, and without a tokenizer there is none; give a token")
    return prompt or [eod]


def fixed_problem(model: GPT) -> str | None:
    """Why this model cannot answer at all."""
    if model.locate is not all_are_here:
        return "one token cannot be cut over ranks: build the model without --context-parallel-size and without --sequence-parallel"
    if model.moe_config.moe_token_dropping and model.moe_config.has_experts:
        return "token dropping lets a token's fate depend on its neighbours; build the model with moe_token_dropping=False"
    return None


def prompt_problems(model: GPT, prompts: Prompts, max_new_tokens: int | Sequence[int]) -> list[str]:
    """What keeps these prompts from being continued, one sentence each. `max_new_tokens`: of all, or of each."""
    if problem := fixed_problem(model):
        return [problem]
    config = model.config
    problems = [] if prompts else ["there is no prompt to continue"]
    most_new = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if wrong := [n for n in most_new if n < 1]:
        problems.append(f"the number of new tokens must be at least 1, not {wrong[0]}")
    limit = config.max_position_embeddings if config.position_embedding_type == "learned_absolute" else None
    for number, (prompt, new) in enumerate(zip(prompts, most_new), start=1):
        wrong = [token for token in prompt if not 0 <= token < model.vocab_size]
        if wrong:
            problems.append(f"prompt {number} has the token {wrong[0]}, and the vocabulary goes from 0 to {model.vocab_size - 1}")
        if limit is not None and len(prompt) + new > limit:
            room = limit - len(prompt)
            remedy = f"ask for {room} or fewer" if room > 0 else f"shorten the prompt to {limit - new} tokens or fewer"
            if room <= 0 and new >= limit:
                remedy = f"shorten the prompt, and ask for {limit - 1} new tokens or fewer"
            problems.append(
                f"prompt {number} has {len(prompt)} tokens; with {new} new ones that exceeds the {limit} learned positions "
                f"of the model (max_position_embeddings); {remedy}"
            )
    return problems


def padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, longest], padded on the right with token 0, and lengths [B]."""
    lengths = [len(prompt) for prompt in prompts]
    rows = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(lengths, device=device)


def logits_at(model: GPT, tokens_BS: Tensor, positions_BS: Tensor, index_B: Tensor) -> Tensor:
    """Logits [B, V] of one token per row. Those of a whole prompt, [B, S, V], would be the largest tensor of all."""
    project, row_B = model.project, torch.arange(len(index_B), device=index_B.device)
    with projecting(model, lambda h_BSD, weight_VD: project(h_BSD[row_B, index_B], weight_VD)):
        return model(tokens_BS, positions_BS)


@contextmanager
def projecting(model: GPT, work: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, `work(hidden, weight)` takes the place of the model's projection, and the model returns what it returns."""
    project, model.project = model.project, work
    try:
        yield
    finally:
        model.project = project


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode inside, the mode of before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        reshard(model)


@contextmanager
def unmeasured(model: GPT) -> Iterator[None]:
    """Routers keep no statistics inside: nobody reads those of a text that is being written."""
    layers = moe_layers(model)
    before = [layer.measures for layer in layers]
    try:
        for layer in layers:
            layer.measures = False
        yield
    finally:
        for layer, measured in zip(layers, before):
            layer.measures = measured
