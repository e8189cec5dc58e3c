"""OpenAI's HTTP dialect: JSON -> a validated call, and pieces of text -> JSON. Pure functions: no socket, no model.

    {"prompt": "def", "n": 2, "seed": 7}  --completion_call-->  Call  --requests_of-->  two engine requests, each with its own seed
    pieces of text  --Reply.chunk-->  chat.completion.chunk, text_completion     (streams)
                    --Reply.whole-->  chat.completion, text_completion, with usage

A field that we do not have is refused, not overlooked: what a client asks for and does not get should be no secret. Fields of OpenAI
that we know and cannot do pass with the value that asks for nothing (`"presence_penalty": 0`), as clients send it unasked.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.chat import ROLES, Message
from megatron_moe.inference.engine import Finish, Piece, Request

MOST_STOPS = 16
FINISH_REASONS: dict[Finish, str] = {"end of document": "stop", "stop string": "stop", "length": "length"}
KINDS = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """An answer that is none: HTTP status, and what the body of OpenAI's shape says."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """Of one call."""

    total_tokens: int  # prompt and answer together
    default_max_tokens: int  # without max_tokens, if the room is there
    answers: int  # prompts times n


@dataclass(frozen=True)
class Call:
    """What a client wants: continuations of `prompts`, or an answer to `messages`."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


# ---------------------------------------------------------------- JSON -> call

# A check gets a value and says what is wrong with it, or None.
Check = Callable[[Any], "str | None"]


def shown(value: Any) -> str:
    """A value in a message, short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def integer(low: int, high: int | None = None) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return f"wants a whole number, not {shown(value)}"
        if value < low or (high is not None and value > high):
            return f"must be {low} or more, not {shown(value)}" if high is None else f"must be from {low} to {high}, not {shown(value)}"
        return None

    return check


def number(low: float, high: float, is_open: bool = False) -> Check:
    """`is_open`: above `low`, not equal to it."""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"wants a number, not {shown(value)}"
        if not low <= value <= high or (is_open and value == low):
            return f"must be {'above' if is_open else 'from'} {low:g}{' and at most' if is_open else ' to'} {high:g}, not {shown(value)}"
        return None

    return check


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"wants true or false, not {shown(value)}"


def text(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"wants text, not {shown(value)}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half of a character (a lone surrogate) at {error.start}: send UTF-8, or both halves"
    return None


def stop_texts(value: Any) -> str | None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s and text(s) is None for s in stops):
        return f"wants a text or a list of texts, none of them empty, not {shown(value)}"
    return f"has {len(stops)} texts; at most {MOST_STOPS} are looked for" if len(stops) > MOST_STOPS else None


def is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)


def prompt_texts(value: Any) -> str | None:
    if isinstance(value, str):
        return text(value)
    if is_token_list(value) or (isinstance(value, list) and value and all(map(is_token_list, value))):
        return None
    if isinstance(value, list) and value and all(isinstance(p, str) for p in value):
        return next((f"number {i} {problem}" for i, p in enumerate(value, start=1) if (problem := text(p))), None)
    return f"wants a text, a list of texts, a list of token ids or a list of such lists, not {shown(value)}"


def stream_options(value: Any) -> str | None:
    if not isinstance(value, dict) or value.keys() - {"include_usage"}:
        return f'wants {{"include_usage": true}} and nothing else, not {shown(value)}'
    problem = boolean(value.get("include_usage", False))
    return problem and f"include_usage {problem}"


def message_list(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return f"wants a list of messages, not {shown(value)}"
    return "; ".join(f"message {i} {problem}" for i, m in enumerate(value, start=1) if (problem := message_problem(m))) or None


def message_problem(message: Any) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return f'wants {{"role": "user", "content": "..."}}, not {shown(message)}'
    if unknown := sorted(message.keys() - {"role", "content", "name"}):
        return f"has the unknown field {unknown[0]!r}; there are role and content"
    if message.get("name") is not None:
        return "has a name, which no template of ours shows; leave it out"
    if message["role"] not in ROLES:
        return f"has the role {shown(message['role'])}; there are {', '.join(ROLES)}"
    problem = text(content_of(message))
    return problem and f"content {problem}"


def content_of(message: dict[str, Any]) -> Any:
    """Text may come in parts: [{"type": "text", "text": "..."}]. What is no text at all comes back as it is."""
    parts = message["content"]
    if isinstance(parts, list) and all(isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in parts):
        return "".join(p["text"] for p in parts) if all(isinstance(p["text"], str) for p in parts) else parts
    return parts


COMMON: dict[str, Check] = {
    "model": text, "max_tokens": integer(1), "n": integer(1), "stop": stop_texts, "temperature": number(0, 2),
    "top_p": number(0, 1, is_open=True), "top_k": integer(0), "seed": integer(-(2**63), 2**63 - 1), "stream": boolean,
    "stream_options": stream_options, "user": text,
}  # fmt: skip
COMPLETION = COMMON | {"prompt": prompt_texts, "echo": boolean}
CHAT = COMMON | {"messages": message_list, "max_completion_tokens": integer(1)}

# Of OpenAI and not here, with the values (as JSON) that ask for nothing.
NOT_HERE: dict[str, set[str]] = {
    "logprobs": {"false"}, "top_logprobs": set(), "best_of": {"1"}, "suffix": {'""'}, "presence_penalty": {"0", "0.0"},
    "frequency_penalty": {"0", "0.0"}, "logit_bias": {"{}"}, "tools": {"[]"}, "tool_choice": {'"none"'}, "functions": {"[]"},
    "function_call": {'"none"'}, "parallel_tool_calls": {"true", "false"}, "response_format": {'{"type": "text"}'}, "store": {"false"},
    "metadata": {"{}"}, "service_tier": {'"auto"', '"default"'}, "modalities": {'["text"]'}, "reasoning_effort": set(),
}  # fmt: skip


def parse_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError 400 for what is no JSON object."""
    try:
        payload = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once_each)
    except RecursionError:
        raise ApiError(400, "the body is JSON in too many levels; the fields here need three", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(payload, dict):
        raise ApiError(400, f'the body is a JSON object such as {{"prompt": "def"}}, not {shown(payload)}', code="invalid_json")
    return payload


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return values


def problems_of(payload: dict[str, Any], checks: dict[str, Check], needed: str) -> Iterator[tuple[str, str, str]]:
    """(field, what is wrong, code). null is a field that is not there."""
    if payload.get(needed) is None:
        yield needed, f"{needed}: is missing", "missing_required_parameter"
    for name, value in payload.items():
        if value is None and (name in checks or name in NOT_HERE):
            continue
        if name in NOT_HERE:
            if json.dumps(value) not in NOT_HERE[name]:
                yield name, f"{name}: this server does not support it (given: {shown(value)}); leave it out", "unsupported_parameter"
        elif name not in checks:
            near = difflib.get_close_matches(name, checks, 1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(checks))}"
            yield name, f"{shown(name)[1:-1]}: unknown field; {hint}", "unknown_parameter"
        elif problem := checks[name](value):
            yield name, f"{name}: {problem}", "invalid_value"
    if payload.get("stream_options") is not None and not payload.get("stream"):
        yield "stream_options", 'stream_options: is about a stream; add "stream": true, or leave it out', "invalid_value"


def refuse_problems(problems: Sequence[tuple[str, str, str]]) -> None:
    """One ApiError 400 with all of them; it names the first field."""
    if problems:
        raise ApiError(400, "\n".join(message for _, message, _ in problems), problems[0][0], problems[0][2])


def completion_call(payload: dict[str, Any]) -> Call:
    """The body of POST /v1/completions. Raises ApiError with everything that is wrong."""
    refuse_problems(list(problems_of(payload, COMPLETION, "prompt")))
    prompt = payload["prompt"]
    prompts = [prompt] if isinstance(prompt, str) or is_token_list(prompt) else prompt
    fixed = tuple(p if isinstance(p, str) else tuple(p) for p in prompts)
    return Call(prompts=fixed, echo=bool(payload.get("echo")), max_tokens=payload.get("max_tokens"), **_common(payload))


def chat_call(payload: dict[str, Any]) -> Call:
    """The body of POST /v1/chat/completions. Raises ApiError with everything that is wrong."""
    problems = list(problems_of(payload, CHAT, "messages"))
    names = [name for name in ("max_tokens", "max_completion_tokens") if payload.get(name) is not None]
    if len({payload[name] for name in names if isinstance(payload[name], int)}) > 1:
        both = f"max_tokens ({payload['max_tokens']}) and max_completion_tokens ({payload['max_completion_tokens']})"
        problems.append(("max_tokens", f"{both} are two names of one limit; give one", "invalid_value"))
    refuse_problems(problems)
    messages = tuple({"role": m["role"], "content": content_of(m)} for m in payload["messages"])
    return Call(messages=messages, max_tokens=payload[names[0]] if names else None, **_common(payload))


def _common(payload: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in payload.items() if value is not None}
    stop = given.get("stop", ())
    return {
        "model": given.get("model"), "n": given.get("n", 1), "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "sampling": sampling_of(given), "seed": given.get("seed"), "stream": given.get("stream", False),
        "include_usage": given.get("stream_options", {}).get("include_usage", False),
    }  # fmt: skip


def sampling_of(given: dict[str, Any]) -> SamplingConfig:
    if given.get("temperature") == 0:
        return SamplingConfig(greedy=True)
    return SamplingConfig(temperature=float(given.get("temperature", 1)), top_k=given.get("top_k", 0), top_p=float(given.get("top_p", 1)))


# ---------------------------------------------------------------- call -> engine


def requests_of(call: Call, prompts: Sequence[list[int]], limits: Limits, stops: tuple[str, ...] = ()) -> list[Request]:
    """One per answer: the n of the first prompt, then those of the second. `stops`: of the chat template, beside the call's own.

    Raises ApiError for what does not fit, with the numbers.
    """
    if (answers := len(prompts) * call.n) > limits.answers:
        message = (
            f"n: {len(prompts)} prompts with {call.n} answers each are {answers}; this server writes at most {limits.answers} at a time"
        )
        refuse_problems([("n", message, "invalid_value")])
    refuse_problems([("max_tokens", problem, "context_length_exceeded") for problem in size_problems(call, prompts, limits)])
    asked = call.max_tokens
    return [
        Request(tokens, asked or min(limits.default_max_tokens, limits.total_tokens - len(tokens)), (*call.stop, *stops))
        for tokens in prompts
        for _ in range(call.n)
    ]


def size_problems(call: Call, prompts: Sequence[list[int]], limits: Limits) -> Iterator[str]:
    for number_, tokens in enumerate(prompts, start=1):
        room, new = limits.total_tokens - len(tokens), call.max_tokens or 1
        if room < new:
            remedy = (
                f"ask for {room} or fewer" if room > 0 else f"shorten the prompt to {max(limits.total_tokens - new, 0)} tokens or fewer"
            )
            name = f"prompt {number_}" if len(prompts) > 1 else "the conversation" if call.is_chat else "the prompt"
            yield (f"{name} has {len(tokens)} tokens; with max_tokens {new} that is {len(tokens) + new}, and this server takes "
                   f"{limits.total_tokens}, prompt and answer together; {remedy}")  # fmt: skip


def samplings_of(call: Call, seed: int, answers: int) -> list[SamplingConfig]:
    """One per answer, each with a seed of its own that `seed` and its number make."""
    return [SamplingConfig(s.greedy, s.temperature, s.top_k, s.top_p, mixed(seed, i)) for s in [call.sampling] for i in range(answers)]


def mixed(seed: int, number_: int) -> int:
    """63 bits. Not seed + number: seed 8 would give the second answer of seed 7 as its first."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number_}".encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------- pieces -> JSON


@dataclass
class Usage:
    """In tokens. Those of a prompt count once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}


@dataclass(frozen=True)
class Reply:
    """What all chunks of an answer have in common. `openings`: per answer the text before its first piece (echo), or nothing."""

    is_chat: bool
    id: str
    model: str
    created: int  # seconds since 1970
    openings: tuple[str, ...]

    def first(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for index, opening in enumerate(self.openings):
            if self.is_chat:
                yield self._body([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], ".chunk")
            elif opening:
                yield self.chunk(Piece(index, opening, None))

    def chunk(self, piece: Piece) -> dict[str, Any]:
        finish = FINISH_REASONS[piece.finish] if piece.finish else None
        if self.is_chat:
            choice = {"index": piece.row, "delta": {"content": piece.text} if piece.text else {}, "finish_reason": finish}
        else:
            choice = {"index": piece.row, "text": piece.text, "logprobs": None, "finish_reason": finish}
        return self._body([choice], ".chunk")

    def last(self, usage: Usage) -> dict[str, Any]:
        """Of a stream whose client has asked for its usage."""
        return self._body([], ".chunk") | {"usage": usage.body()}

    def whole(self, texts: Sequence[str], finishes: Sequence[Finish], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, (answer, finish) in enumerate(zip(texts, finishes)):
            said = {"message": {"role": "assistant", "content": answer}} if self.is_chat else {"text": self.openings[index] + answer}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": FINISH_REASONS[finish]})
        return self._body(choices, "") | {"usage": usage.body()}

    def _body(self, choices: list[dict[str, Any]], suffix: str) -> dict[str, Any]:
        kind = "chat.completion" + suffix if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event: JSON has no bare line breaks, so that one line holds it."""
    return b"data: " + encoded(body) + b"\n\n"


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
