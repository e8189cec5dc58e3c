"""Made-up tokens that can be learnt: a random language with word frequencies as in text, for trials without data.

Each token is followed by one of four fixed successors of it (15 times in 16), or by a fresh draw from a Zipf distribution.
The model first learns the frequencies, then the successors, so the loss falls quickly below the entropy of the
frequencies. The language is the same for every seed, so validation improves as training does; the seed picks the text.
"""

from __future__ import annotations

import functools

import numpy as np

BRANCHES = (0.55, 0.2, 0.125, 0.0625)  # the rest, 1/16, is a fresh draw
LANGUAGE_SEED = 20


class MockDataset:
    """Item i is a pure function of (seed, i): {"text": int64[seq_length + 1], "sample_id": i}. Ids lie in [0, vocab_size)."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int):
        if vocab_size < 2:
            raise ValueError(f"mock data needs at least two tokens, not --vocab-size {vocab_size}")
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict:
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0, without end")
        words = np.random.PCG64(np.random.SeedSequence((self.seed, int(index)))).random_raw(2 * (self.seq_length + 1))
        branch_draw, word_draw = (words >> np.uint64(11)).reshape(2, -1) * 2.0**-53  # uniform in [0, 1)
        branches = np.searchsorted(np.cumsum(BRANCHES), branch_draw, side="right")
        branches[0] = len(BRANCHES)  # nothing comes before the first token
        text = _walk(branches.tolist(), _words(self.vocab_size, word_draw).tolist(), _successors(self.vocab_size))
        return {"text": np.array(text, np.int64), "sample_id": int(index)}


def _walk(branches: list[int], fresh: list[int], successors: list[list[int]]) -> list[int]:
    """One token per branch: a successor of the token before, or the fresh word."""
    text, token = [], 0
    for branch, word in zip(branches, fresh):
        token = word if branch == len(BRANCHES) else successors[token][branch]
        text.append(token)
    return text


@functools.lru_cache(maxsize=4)
def _cumulative(vocab_size: int) -> np.ndarray:
    """Zipf with exponent 1: token t has a share proportional to 1 / (t + 1)."""
    shares = 1.0 / np.arange(1, vocab_size + 1)
    return np.cumsum(shares / shares.sum())


def _words(vocab_size: int, uniform: np.ndarray) -> np.ndarray:
    # The last entry of the running sum may be a hair below one.
    return np.minimum(np.searchsorted(_cumulative(vocab_size), uniform, side="right"), vocab_size - 1)


@functools.lru_cache(maxsize=4)
def _successors(vocab_size: int) -> list[list[int]]:
    """successors[token][branch], the grammar of the language."""
    raw = np.random.PCG64(np.random.SeedSequence((LANGUAGE_SEED, vocab_size))).random_raw(vocab_size * len(BRANCHES))
    return _words(vocab_size, (raw >> np.uint64(11)) * 2.0**-53).reshape(vocab_size, -1).tolist()
