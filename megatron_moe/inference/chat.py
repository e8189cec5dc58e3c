"""A conversation as one prompt: the template of the tokenizer's folder, or a plain one of our own.

The plain one, for models that nobody has taught to chat (a blank line between turns; an answer ends where a next turn would begin):

    User: What is a cat?

    Assistant: An animal.

    User: And a dog?

    Assistant:
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.data import TokenizerConfig

Message = dict[str, str]  # role: system, user or assistant; content
ROLES = ("system", "user", "assistant")


class PlainTemplate:
    """See above."""

    stops = ("\n\nUser:", "\nUser:")
    where = "User: ... Assistant: ..."

    def render(self, messages: Sequence[Message]) -> str:
        turns = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n\n".join([*turns, "Assistant:"])


class TokenizerTemplate:
    """`chat_template` of a tokenizer_config.json. It is a program: it runs in Jinja's sandbox, and sees the messages alone."""

    def __init__(self, source: str, special: dict[str, str], where: str):
        self.where, self.special = where, special
        self.stops = tuple(s for s in (special.get("eos_token"),) if s)
        self._template = compiled(source, where)

    def render(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self.special)
        except Exception as error:  # whatever the template does, the reason is in the template
            raise ValueError(
                f"{self.where}: its chat_template refuses this conversation ({error}); --chat-template plain does without"
            ) from None


def compiled(source: str, where: str) -> Any:
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(
            f"{where} has a chat_template, which needs the Python package jinja2; pip install jinja2, or --chat-template plain"
        ) from None

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"{where}: its chat_template is not readable ({error}); --chat-template plain does without") from None


def _refuse(message: str) -> None:
    raise ValueError(message)


def tokenizer_template(tokenizer: TokenizerConfig) -> TokenizerTemplate | None:
    """That of the tokenizer_config.json (or chat_template.jinja) beside tokenizer.json; None when there is none."""
    if tokenizer.kind != "HFTokenizer":
        return None
    folder = Path(tokenizer.tokenizer_model).parent
    path, beside = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _read_json(path) if path.is_file() else {}
    source, where = config.get("chat_template"), path
    if beside.is_file():
        source, where = beside.read_text(encoding="utf-8"), beside
    if isinstance(source, list):  # several, each with a name
        source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    tokens = {name: _text_of(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return TokenizerTemplate(source, {name: text for name, text in tokens.items() if text is not None}, str(where))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); correct it, or --chat-template plain") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; correct it, or --chat-template plain")
    return content


def _text_of(token: Any) -> str | None:
    """A special token is text, or an object with its text in it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def converse(
    lines: Callable[[], str | None], answer: Callable[[str, tuple[str, ...]], str], template: PlainTemplate | TokenizerTemplate,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """A conversation until /quit or the end of the lines. `answer(prompt, stops)` shows what it returns; ValueError is said, and the
    turn forgotten."""
    messages: list[Message] = []
    while (line := lines()) is not None:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            messages.clear()
            say("(forgotten)")
        elif text.startswith("/"):
            say(f"unknown command {text.split()[0]}: there are /reset and /quit")
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            try:
                reply = answer(template.render(turn), template.stops)
            except ValueError as error:
                say(f"{error}\n(this turn is forgotten; /reset forgets the others)")
                continue
            messages = [*turn, {"role": "assistant", "content": reply.strip()}]
