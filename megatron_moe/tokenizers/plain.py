"""Tokenizers without files: bytes, and numbers written as text."""

from __future__ import annotations

from megatron_moe.tokenizers.base import Tokenizer, fingerprint_of


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.fingerprint = fingerprint_of("ByteTokenizer")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 become the replacement character; the end of a document is left out."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class NullTokenizer(Tokenizer):
    """Text that already is token ids, such as "5 17 2". The id after the last, `vocab_size` as given, is the eod."""

    def __init__(self, vocab_size: int | None):
        if not vocab_size:
            raise ValueError("NullTokenizer needs --vocab-size, the number of different ids in the text")
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size
        self.fingerprint = fingerprint_of("NullTokenizer", str(vocab_size).encode())

    def encode(self, text: str) -> list[int]:
        """ValueError for a word that is no number, or one outside the vocabulary."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(f"NullTokenizer reads whole numbers separated by blanks: {error}") from None
        if ids and not 0 <= min(ids) <= max(ids) <= self.eod:
            raise ValueError(f"NullTokenizer got ids from {min(ids)} to {max(ids)}, and --vocab-size {self.eod} allows 0 to {self.eod}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(int(i)) for i in ids)
