"""Token ids that arrive one by one -> text, with characters never torn, up to a stop string.

    ids --Detokenizer--> whole characters --StopScanner--> what may be shown

Worked example, stop string "END". What a token adds, what is shown, what is kept back:

  "A E"    shown "A "    kept "E"      it may become END
  "N"                    kept "EN"
  "T"      shown "ENT"
  "END."                               stopped: the text is "A ENT"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

TORN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
MOST_TORN = 3  # bytes of a character that is not complete; SentencePiece writes one TORN for each
CONTEXT = 8  # tokens before the new ones that a decoder sees: SentencePiece drops the blank before the first
LONGEST = 64  # tokens decoded at a time


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class TokenIds:
    """In place of a tokenizer: text that already is token ids, such as "5 17 2"."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                f"the model was trained without a tokenizer: a prompt is token ids separated by blanks, not {text!r}; give ids, or "
                f"the tokenizer with --tokenizer-model, --vocab-file and --merge-file, or --tokenizer-type"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Detokenizer:
    """What each token adds to the text behind `prompt`. Together it is the text that all tokens have at once."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = ()):
        self.decoder = decoder
        self._ids: list[int] = list(prompt[-CONTEXT:])  # context, then tokens whose text is not all shown
        self._shown = len(_complete(self._decoded()))

    def push(self, token: int) -> str:
        """The characters that are complete now; none while one is torn."""
        self._ids.append(token)
        text = self._decoded()
        whole = _complete(text)
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if len(self._ids) >= LONGEST and whole == text:  # a clean border: what is before it is context
            self._ids = self._ids[-CONTEXT:]
            self._shown = len(_complete(self._decoded()))
        return new

    def end(self) -> str:
        """What no further token will complete."""
        text = self._decoded()
        new, self._shown = text[self._shown :], len(text)
        return new

    def _decoded(self) -> str:
        return self.decoder.decode(list(self._ids)) if self._ids else ""


def _complete(text: str) -> str:
    """Without torn characters at the end that a later token may complete."""
    whole = text.rstrip(TORN)
    return whole if len(text) - len(whole) <= MOST_TORN else text[:-MOST_TORN]


class StopScanner:
    """Text in pieces -> the text before the first stop string to be complete, wherever the pieces are cut.

    Of two that are complete at the same character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._kept = ""

    def push(self, piece: str) -> str:
        """What may be shown of it, and of what was kept back. Nothing after a stop."""
        if self.stopped:
            return ""
        text = self._kept + piece
        ends = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._kept = True, ""
            return text[: min(ends)[1]]
        keep = max((_beginning_at_the_end(text, stop) for stop in self.stops), default=0)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """No more text comes: what was kept back is no stop string."""
        kept, self._kept = self._kept, ""
        return kept


def _beginning_at_the_end(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`: 2 for "A EN" and "END"."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Both together, for one text."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = (), stops: Sequence[str] = ()):
        self.detokenizer, self.scanner = Detokenizer(decoder, prompt), StopScanner(stops)

    @property
    def stopped(self) -> bool:
        return self.scanner.stopped

    def push(self, token: int) -> str:
        return self.scanner.push(self.detokenizer.push(token))

    def end(self) -> str:
        """What is left when no stop string has come."""
        last = self.scanner.push(self.detokenizer.end())
        return last if self.scanner.stopped else last + self.scanner.end()
