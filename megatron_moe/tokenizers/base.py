"""What every tokenizer offers, and how two of them are told apart."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from abc import ABC, abstractmethod
from types import ModuleType

import numpy as np


class Tokenizer(ABC):
    """Text <-> token ids. Ids are in [0, vocab_size); `eod` ends a document.

    `fingerprint` is a short hash of the type and of the contents of its files: data carries the fingerprint of the
    tokenizer that made it, so that a run with another one is stopped.
    """

    vocab_size: int
    eod: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any added begin or end token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text; several threads where the library has them."""
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of each text: the ids of all of them end to end, integers, and how many each has, int64[len(texts)]."""
        lists = self.encode_batch(texts)
        sizes = np.fromiter(map(len, lists), np.int64, len(lists))
        return np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(sizes.sum())), sizes

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids."""


def fingerprint_of(kind: str, *contents: bytes) -> str:
    """16 hexadecimal digits that change with the type or with any byte of the files."""
    digest = hashlib.sha256(kind.encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def read_file(path: str, flag: str) -> bytes:
    """Contents of a tokenizer file. ValueError naming the file and the flag."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}; point it to a file on this machine") from None


def foreign(path: str, flag: str, wanted: str, error: Exception) -> ValueError:
    """The error for a file that is there but of another kind."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{flag} {path} is not {wanted} ({reason}); give the file that belongs to this tokenizer type")


def library(name: str) -> ModuleType:
    """Import a tokenizer library only when it is used. ValueError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this tokenizer needs the Python package {name} ({error}); pip install {name}") from None
