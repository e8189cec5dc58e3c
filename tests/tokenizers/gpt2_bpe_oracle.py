"""GPT-2's byte-level BPE written for reading: what the fast tokenizer is compared with. No library but `regex`.

    text -> pieces by a pattern -> bytes of a piece as printable characters -> merges, the lowest rank first -> ids

Worked example with the merges "h e", "l l", "he ll": " hello" is one piece; a space is written as U+0120, so its symbols are
U+0120 h e l l o; "h e" joins first, then "l l", then "he ll", and U+0120 hell o are looked up in the vocabulary.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import regex

LETTERS, DIGITS, NEITHER = r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]"
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")  # after an apostrophe, in lower case


def piece_pattern() -> regex.Pattern:
    """Where a piece ends: a contraction; a run of letters, of digits or of other signs, each with one space before it; white space.

    Of white space before a word the last character is left over: a space then begins the word.
    """
    runs = [f" ?{kind}+" for kind in (LETTERS, DIGITS, NEITHER)]
    return regex.compile("|".join([f"'(?:{'|'.join(CONTRACTIONS)})", *runs, r"\s+(?!\S)", r"\s+"]))


def printable_bytes() -> dict[int, str]:
    """A visible character for each of the 256 bytes: itself if Latin-1 prints it, else the next free one from U+0100 on."""
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or (0xA1 <= b <= 0xFF and b != 0xAD)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + k) for k, b in enumerate(others)}


class GPT2BPEOracle:
    """Text <-> ids from vocab.json and merges.txt; no token is special in text."""

    def __init__(self, vocab_file: str | Path, merge_file: str | Path):
        self.ids: dict[str, int] = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        lines = Path(merge_file).read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.pattern = piece_pattern()
        self.characters = printable_bytes()
        self.bytes = {character: byte for byte, character in self.characters.items()}
        self.tokens = {number: token for token, number in self.ids.items()}

    def encode(self, text: str) -> list[int]:
        return [self.ids[symbol] for piece in self.pattern.findall(text) for symbol in self.merged(piece)]

    def decode(self, ids: list[int]) -> str:
        data = bytes(self.bytes[character] for number in ids for character in self.tokens[number])
        return data.decode("utf-8", errors="replace")

    def merged(self, piece: str) -> list[str]:
        """Symbols of one piece: join the pair of the lowest rank wherever it stands, from the left, until no pair has a rank."""
        symbols = [self.characters[byte] for byte in piece.encode("utf-8")]
        while ranked := [self.ranks[pair] for pair in itertools.pairwise(symbols) if pair in self.ranks]:
            symbols = self.joined(symbols, min(ranked))
        return symbols

    def joined(self, symbols: list[str], rank: int) -> list[str]:
        out, k = [], 0
        while k < len(symbols):
            is_pair = self.ranks.get(tuple(symbols[k : k + 2])) == rank
            out.append("".join(symbols[k : k + 2]) if is_pair else symbols[k])
            k += 2 if is_pair else 1
        return out
