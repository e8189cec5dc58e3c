"""What the endpoints do, without HTTP: JSON in, jobs and replies out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_moe.inference.chat import PlainTemplate, TokenizerTemplate
from megatron_moe.inference.engine import Engine
from megatron_moe.inference.serving import protocol
from megatron_moe.inference.serving.protocol import ApiError, Call, Limits, Reply, Usage
from megatron_moe.inference.serving.scheduler import Job, Scheduler


@dataclass(frozen=True)
class Asked:
    """A call that has its place in the queue."""

    call: Call
    job: Job
    reply: Reply
    prompt_tokens: int


class Service:
    """One model under one name."""

    def __init__(self, engine: Engine, scheduler: Scheduler, limits: Limits, name: str, template: PlainTemplate | TokenizerTemplate):
        self.engine, self.scheduler, self.limits, self.name, self.template = engine, scheduler, limits, name, template
        self.created = int(time.time())

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(self.name)]}

    def model(self, name: str) -> dict[str, Any]:
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r} here; this server has {self.name!r}", "model", "model_not_found")
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "megatron_moe",
                "max_model_len": self.limits.total_tokens}  # fmt: skip

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body."""
        running, waiting = self.scheduler.counts()
        is_open = self.scheduler.is_open
        return 200 if is_open else 503, {"status": "ok" if is_open else "stopping", "running": running, "waiting": waiting}

    def ask_completion(self, body: bytes) -> Asked:
        return self._ask(protocol.completion_call(protocol.parse_json(body)), "cmpl")

    def ask_chat(self, body: bytes) -> Asked:
        return self._ask(protocol.chat_call(protocol.parse_json(body)), "chatcmpl")

    def _ask(self, call: Call, prefix: str) -> Asked:
        """Raises ApiError for what is wrong with it, and when the queue is full."""
        if call.model is not None:
            self.model(call.model)
        stops = self.template.stops if call.is_chat else ()
        given = (or_refuse(lambda: self.template.render(call.messages), "messages"),) if call.is_chat else call.prompts
        prompts = [or_refuse(lambda p=p: self.engine.encode(p), "messages" if call.is_chat else "prompt") for p in given]
        requests = protocol.requests_of(call, prompts, self.limits, stops)
        if problems := self.engine.problems(requests[:: call.n]):  # one of each prompt
            protocol.refuse_problems([("prompt", problem, "invalid_value") for problem in problems])
        seed = secrets.randbits(63) if call.seed is None else call.seed
        job = Job(requests, protocol.samplings_of(call, seed, len(requests)), runs_alone=call.seed is not None)
        openings = [self._text(p) if call.echo else "" for p in given for _ in range(call.n)]
        reply = Reply(call.is_chat, f"{prefix}-{secrets.token_hex(12)}", self.name, int(time.time()), tuple(openings))
        self.scheduler.submit(job)
        return Asked(call, job, reply, sum(map(len, prompts)))

    def _text(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(list(prompt))


def or_refuse(make: Callable[[], Any], param: str) -> Any:
    """What a tokenizer or a template refuses is the client's to change."""
    try:
        return make()
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param, "invalid_value") from None


class Collected:
    """The answers of a job, as far as they are there."""

    def __init__(self, asked: Asked):
        self.asked, self.usage = asked, Usage(asked.prompt_tokens)
        self.texts, self.finishes = [""] * len(asked.job.requests), [None] * len(asked.job.requests)

    @property
    def is_whole(self) -> bool:
        return None not in self.finishes

    def add(self, event: Any) -> None:
        """Raises the error that an event may be; 503 when the server has ended an answer."""
        if isinstance(event, ApiError):
            raise event
        for piece in event:
            if piece.finish == "cancelled":
                raise ApiError(503, "the server has stopped before the end of the answer", code="stopping")
            self.texts[piece.row] += piece.text
            self.usage.completion_tokens += piece.token is not None
            self.finishes[piece.row] = piece.finish

    def body(self) -> dict[str, Any]:
        return self.asked.reply.whole(self.texts, self.finishes, self.usage)
