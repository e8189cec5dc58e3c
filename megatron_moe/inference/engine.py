"""A loaded model that answers requests: text in, pieces of text out, on one rank or on several.

    with Engine(load_for_inference("runs/a")) as engine:
        for pieces in engine.stream([Request("def main", 50, stop=("\\n\\n",))], SamplingConfig(top_p=0.9)):
            for piece in pieces:
                print(piece.text, end="")

In a layout of several ranks rank 0 calls, and the others sit in `follow()` until rank 0 closes the engine:

    with Engine(load_for_inference("runs/a", layout=layout)) as engine:
        if not engine.is_leader:
            engine.follow()
        else: ...

One call at a time; between two steps of a stream the model belongs to it. A server that serves several clients puts them into one
call, or waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.inference import InferenceConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import Prompts, prompt_problems, start, stream
from megatron_moe.inference.layout import ONE_PROCESS, Layout
from megatron_moe.inference.load import Loaded, load_for_inference
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.scoring import Row, Score, row_problems, score_rows
from megatron_moe.inference.text import TextStream, TokenIds
from megatron_moe.utils.groups import end_groups

Finish = Literal["end of document", "stop string", "length", "cancelled"]
IDLE = timedelta(days=365)  # the other ranks wait for the next request for as long as a person thinks


@dataclass(frozen=True)
class Request:
    """A prompt as text or as tokens; text ends before the first of the `stop` strings."""

    prompt: str | Sequence[int]
    max_new_tokens: int = 100
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to the answer of one request: perhaps no text, when a character or a stop string is not complete."""

    row: int  # which request, from 0
    text: str
    token: int | None  # None: the end of the document, or nobody wants more
    finish: Finish | None = None  # with the last piece of a request


@dataclass
class Answer:
    """A whole one. `tokens`: all that were made, those of a stop string among them."""

    prompt_tokens: list[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += [] if piece.token is None else [piece.token]
        self.finish = piece.finish


class Engine:
    """See above. Closing tells the other ranks; after an error within a call they are left to torchrun, which ends them.

    on_close: what is to be ended then on each rank, such as the process groups of a tool: a process that exits with groups open may be
    aborted by their threads.
    """

    def __init__(self, loaded: Loaded, on_close: Callable[[], None] = lambda: None):
        self.loaded, self.model = loaded, loaded.model
        self.tokenizer = loaded.tokenizer or TokenIds()
        self.is_leader = loaded.layout.is_leader
        self._group = dist.new_group(backend="gloo", timeout=IDLE) if loaded.layout.is_split else None
        self._is_busy = self._is_closed = False
        self._on_close = on_close

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    @property
    def most_tokens(self) -> int | None:
        """Prompt and answer together; None where positions have no end (rotary ones go on, and the text gets worse)."""
        config = self.model.config
        return config.max_position_embeddings if config.position_embedding_type == "learned_absolute" else None

    # ------------------------------------------------------------ rank 0

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Tokens to start from. ValueError for text that is none."""
        return start(self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt), self.loaded.eod)

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """What keeps these requests from being answered, one sentence each; nothing runs."""
        try:
            prompts = [self.encode(request.prompt) for request in requests]
        except ValueError as error:
            return [str(error)]
        return prompt_problems(self.model, prompts, [request.max_new_tokens for request in requests])

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def stream(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        generator: torch.Generator | None = None,
        cancelled: Callable[[int], bool] = lambda row: False,
    ) -> Iterator[list[Piece]]:
        """Answers, a step at a time: the pieces of all requests that are not finished.

        `generator`: of the draws; without it one with the seed of `sampling`. With a list in `sampling`, one per request, each
        request draws from its own seed, whatever the others do. `cancelled(row)` is asked before every step, and
        closing the iterator cancels all. ValueError, before anything runs, for requests that `problems` names.
        """
        if problems := self.problems(requests):
            raise ValueError("\n".join(problems))
        prompts = [self.encode(request.prompt) for request in requests]
        finished: set[int] = set()
        limits = [request.max_new_tokens for request in requests]
        generators = generator or (
            self.generator(sampling.seed) if isinstance(sampling, SamplingConfig) else [self.generator(own.seed) for own in sampling]
        )
        with self._call("stream", prompts, limits):
            steps = stream(self.model, prompts, limits, sampling, self.loaded.eod, generators, finished)
            try:
                yield from self._pieces(steps, requests, prompts, finished, cancelled)
            finally:
                steps.close()

    def complete(self, requests: Sequence[Request], sampling: Sampling, generator: torch.Generator | None = None) -> list[Answer]:
        """The whole answers."""
        answers = [Answer(self.encode(request.prompt)) for request in requests]
        for pieces in self.stream(requests, sampling, generator):
            for piece in pieces:
                answers[piece.row].add(piece)
        return answers

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """How likely the model finds these, in one forward. ValueError, before anything runs, for rows that cannot be scored."""
        if problems := row_problems(self.model, rows):
            raise ValueError("\n".join(problems))
        rows = [Row([int(token) for token in row.tokens], row.first) for row in rows]
        with self._call("score", rows):
            return score_rows(self.model, rows)

    def _pieces(self, steps: Iterator[list[int | None]], requests: Sequence[Request], prompts: Prompts, finished: set[int],
                cancelled: Callable[[int], bool]) -> Iterator[list[Piece]]:  # fmt: skip
        texts = [TextStream(self.tokenizer, prompt, request.stop) for prompt, request in zip(prompts, requests)]
        left = [request.max_new_tokens for request in requests]
        for step in steps:
            pieces = []
            for row, token in enumerate(step):
                if row in finished:
                    continue
                left[row] -= 1
                piece = next_piece(row, token, texts[row], left[row], cancelled(row))
                if piece.finish:
                    finished.add(row)
                pieces.append(piece)
            yield pieces
        # the step at which the last rows came to their end is not seen: nothing is left to be said but this
        if last := [next_piece(row, None, texts[row], 0, False) for row in range(len(requests)) if row not in finished]:
            yield last

    # ------------------------------------------------------------ all ranks

    def follow(self) -> None:
        """Ranks other than 0: do what rank 0 does, until it closes the engine."""
        work = {"stream": self._follow_stream, "score": lambda rows: score_rows(self.model, rows)}
        while (call := self._told(None)) is not None:
            name, *arguments = call
            work[name](*arguments)
        self._close(is_in_step=True)

    def _follow_stream(self, prompts: Prompts, limits: list[int]) -> None:
        # rank 0 draws: what is drawn here is overwritten
        for _ in stream(self.model, prompts, limits, SamplingConfig(greedy=True), self.loaded.eod):
            pass

    def _call(self, *call: Any) -> _Call:
        if self._is_closed or self._is_busy:
            raise RuntimeError("the engine is closed" if self._is_closed else "the engine is still in another call: end or close that one")
        return _Call(self, call)

    def _told(self, what: Any) -> Any:
        """Rank 0's word on every rank."""
        box = [what]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        """Lets the other ranks go. A second time it does nothing."""
        if self._is_closed:
            return
        is_in_step = self.is_leader and not self._is_busy
        if is_in_step:
            self._told(None)
        self._close(is_in_step)

    def _close(self, is_in_step: bool) -> None:
        """`is_in_step`: all ranks come here, so that none ends its connections while another still reads from them."""
        self._is_closed = True
        if not is_in_step:
            return
        if self._group is not None:
            dist.barrier(self._group)
        self._on_close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Call:
    """The time in which all ranks are in the same work."""

    def __init__(self, engine: Engine, call: tuple[Any, ...]):
        self.engine, self.call = engine, call

    def __enter__(self) -> None:
        self.engine._is_busy = True
        self.engine._told(self.call)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after any other error the ranks may be at different places; alone there is nobody to wait for
        if kind in (None, GeneratorExit) or self.engine._group is None:
            self.engine._is_busy = False


def next_piece(row: int, token: int | None, text: TextStream, left: int, is_cancelled: bool) -> Piece:
    """`token`: None when the document has ended; `left`: how many tokens may follow."""
    if is_cancelled:
        return Piece(row, "", None, "cancelled")
    if token is None:
        last = text.end()
        return Piece(row, last, None, "stop string" if text.stopped else "end of document")
    new = text.push(token)
    if not text.stopped and left == 0:
        new += text.end()
    return Piece(row, new, token, "stop string" if text.stopped else "length" if left == 0 else None)


def open_engine(config: InferenceConfig, tokenizer: TokenizerConfig, init: Callable[[ParallelConfig], Any]) -> Engine:
    """What the flags of a tool describe, under torchrun or alone. `init` is training.distributed.init_distributed.

    Raises ValueError or CheckpointError for what the user has to change.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if problems := list(config.rank_problems(world_size)):
        raise ValueError("\n".join(problems))
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device("cuda" if config.device != "cpu" and has_gpu else "cpu")
    if world_size == 1:
        return Engine(_load(config, tokenizer, device, ONE_PROCESS))
    world = init(ParallelConfig(distributed_backend="gloo" if device.type == "cpu" else "auto"))
    layout = Layout(config.tensor_model_parallel_size, config.moe_expert_parallel_size, world.cpu_group)
    try:
        return Engine(_load(config, tokenizer, world.device, layout), end_groups)
    except Exception:  # what is wrong with a checkpoint is wrong on every rank
        end_groups()
        raise


def _load(config: InferenceConfig, tokenizer: TokenizerConfig, device: torch.device, layout: Layout) -> Loaded:
    return load_for_inference(config.load, config.ckpt_step, device, tokenizer, config.ckpt_verify, layout, config.expert_cache_bytes)
