"""Samples in the order in which Megatron reads them, for --data-order megatron.

Megatron shuffles documents over all epochs together, lays them end to end, cuts windows of seq_length + 1 tokens that overlap
by one, and shuffles the windows. How many epochs that are, and whether the last is shuffled on its own, follows from the
number of samples that a run wants: another number is another order.

    samples wanted -> epochs -> documents [epochs * D] -> starts [N + 1, 2] -> windows [N]
    sample i = the tokens from starts[windows[i]] to starts[windows[i] + 1], both included

Worked example: documents of 5, 3, 7, 2 and 4 tokens, seq_length 4, seed 1234, 5 samples wanted. An epoch has 21 tokens and
(21 - 1) // 4 = 5 windows: one epoch is enough. The documents come as 4 0 1 2 3, with 4 5 3 7 2 tokens. Window 1 begins at
token 4 of these, which is token 0 of the second document; the windows begin at (0,0) (1,0) (1,4) (3,0) (3,4), the end of the
last is (4,1). They are read as 3 2 1 0 4, so sample 0 is (3,0)..(3,4): the first five tokens of document 2.

Samples beyond the N that Megatron has go on in a further such order, drawn with the next seed for the same number of samples:
sample i is sample i % N of the order with seed + i // N. So it is a function of (seed, samples wanted, i) and of nothing else.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_moe.data import index_cache
from megatron_moe.data.gpt_dataset import GPTDataset, picked
from megatron_moe.data.index_cache import check_permutation, load_or_draw
from megatron_moe.data.indexed_dataset import IndexedDataset

SEPARATE_BELOW = 0.80  # of an epoch's samples: a last epoch of which fewer are wanted is shuffled on its own
SURPLUS = 1.005  # a dataset of a blend is ordered for half a percent more than its share


class Plan(NamedTuple):
    """The numbers that an order is drawn from."""

    epochs: int
    is_last_separate: bool
    num_samples: int  # windows of all epochs together: at least as many as wanted
    samples_before_last: int  # of all epochs but the last


class Order(NamedTuple):
    documents: np.ndarray  # int32[epochs * D], sequence numbers in the .bin
    starts: np.ndarray  # int32[N + 1, 2] (int64 when a number is too large): place in `documents`, token in that document
    windows: np.ndarray  # uint32[N] (int64 from 2**32 - 2 on), rows of `starts`


def share_of(samples: int, weight: float) -> int:
    """How many samples one dataset of a blend is ordered for."""
    return math.ceil(samples * weight * SURPLUS)


def make_plan(tokens_per_epoch: int, seq_length: int, samples: int, exact_epochs: int | None = None) -> Plan:
    """Epochs for `samples` samples, or exactly as many as are asked for."""
    assert tokens_per_epoch > 0, f"{tokens_per_epoch=}"
    needed = max(-(-(samples * seq_length + 1) // tokens_per_epoch), 1)
    epochs = exact_epochs or needed
    windows = lambda n: (n * tokens_per_epoch - 1) // seq_length  # noqa: E731
    is_separate = epochs > 1 and samples - windows(epochs - 1) < int(SEPARATE_BELOW * windows(1))
    return Plan(epochs, is_separate, windows(epochs), windows(epochs - 1))


def draw_order(sizes: np.ndarray, document_range: tuple[int, int], seq_length: int, seed: int, plan: Plan) -> Order:
    """The order over the sequences [first, last) of a dataset whose sequences have `sizes` tokens."""
    generator = np.random.RandomState(seed)  # its stream is frozen by numpy. Documents first, then windows
    documents = _documents(document_range, plan, generator)
    starts = window_starts(sizes[documents], seq_length, plan.num_samples)
    return Order(documents, starts, _windows(plan, generator))


def _documents(document_range: tuple[int, int], plan: Plan, generator: np.random.RandomState) -> np.ndarray:
    once = np.arange(*document_range, dtype=np.int32)
    parts = [np.tile(once, plan.epochs - 1), once] if plan.is_last_separate else [np.tile(once, plan.epochs)]
    for part in parts:
        generator.shuffle(part)
    return np.concatenate(parts)


def window_starts(lengths: np.ndarray, seq_length: int, count: int) -> np.ndarray:
    """Where each of `count` windows over documents of these lengths begins, and where the last one ends: [count + 1, 2].

    Window k begins at token k * seq_length of the documents laid end to end.
    """
    bounds = np.zeros(len(lengths) + 1, np.int64)  # tokens before each document, and of all
    np.cumsum(lengths, dtype=np.int64, out=bounds[1:])
    tokens = np.arange(count + 1, dtype=np.int64) * seq_length
    # the first document that ends behind the token: empty ones are passed over, but for those before the very first token
    places = np.searchsorted(bounds[1:], tokens, side="right")
    places[0] = 0
    starts = np.empty((count + 1, 2), np.int32 if len(lengths) < 2**31 else np.int64)
    starts[:, 0] = places
    np.subtract(tokens, bounds[places], out=starts[:, 1], casting="same_kind")  # a place within a document fits: sizes are int32
    return starts


def _windows(plan: Plan, generator: np.random.RandomState) -> np.ndarray:
    first = plan.samples_before_last if plan.is_last_separate else plan.num_samples
    windows = np.arange(plan.num_samples, dtype=_windows_dtype(plan.num_samples))
    generator.shuffle(windows[:first])
    if first < plan.num_samples:
        generator.shuffle(windows[first:])
    return windows


def _windows_dtype(count: int) -> type:
    return np.uint32 if count < 2**32 - 2 else np.int64


class MegatronDataset(GPTDataset):
    """The same items as GPTDataset's in Megatron's order for `samples` samples: {"text": int64[seq_length + 1], "sample_id": i}.

    `len` is again the number of windows in one epoch. With `exact_epochs` there is nothing beyond the last epoch.
    Raises ValueError when the sequences hold too few tokens for one window; Megatron would repeat them until one is full.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        document_range: tuple[int, int],
        seq_length: int,
        seed: int,
        split_name: str,
        cache_path: str | Path | None = None,
        *,
        samples: int,
        exact_epochs: int | None = None,
    ):
        super().__init__(indexed, document_range, seq_length, seed, split_name, cache_path)
        self.exact_epochs = exact_epochs
        self.plan = make_plan(self.num_tokens, seq_length, samples, exact_epochs)

    def prepare(self) -> None:
        """Draw the order or find it in the cache now, before several processes look for it at once."""
        self._order(0)

    @property
    def _order_length(self) -> int:
        return self.plan.num_samples

    def _fill(self, texts: np.ndarray, number: int, positions: list[int]) -> None:
        if number and self.exact_epochs:
            raise ValueError(
                f"sample {number * self._order_length + positions[0]} of {self.indexed.prefix}: --train-data-exact-num-epochs "
                f"{self.exact_epochs} has {self.plan.num_samples} samples; shorten the run, or start anew from its weights with --finetune"
            )
        order = self._order(number)
        try:
            self._copy_windows(texts, order, picked(order.windows, positions))
        except IndexError as error:  # damage of a cached file that no cheap check sees
            raise ValueError(
                f"samples {number * self._order_length + positions[0]} and so on of {self.indexed.prefix}: {error}; the index cache in "
                f"{self._cache} is damaged: delete its files and resume"
            ) from None

    def _copy_windows(self, texts: np.ndarray, order: Order, windows: list[int]) -> None:
        """Into the rows, piece by piece: one for each document that a window is in.

        IndexError if a window is none of seq_length + 1 tokens within its documents.
        """
        # Plain numbers: the arrays of a micro-batch are so short that operations on them would take twice as long. And memoryviews: an
        # element of one, and a slice, take a third of the time of an array's.
        flat, tokens, first_token = memoryview(texts.reshape(-1)), self.indexed.tokens, memoryview(self.indexed.starts)
        document, starts = memoryview(order.documents), memoryview(order.starts.reshape(-1))
        row_end = done = 0
        for window in windows:
            place, begin, last, end = starts[2 * window], starts[2 * window + 1], starts[2 * window + 2], starts[2 * window + 3]
            row_end += self.seq_length + 1
            for at in range(place, last + 1):
                sequence = document[at]
                head, tail = first_token[sequence], first_token[sequence + 1]
                start, stop = head + begin, tail if at < last else head + end + 1
                before, done = done, done + stop - start
                if not head <= start <= stop <= tail:
                    raise IndexError(f"tokens [{begin}, {stop - head}) of sequence {sequence}, which has {tail - head}")
                if done > row_end:
                    break
                flat[before:done] = tokens[start:stop]
                begin = 0
            if done != row_end:
                raise IndexError(f"a window of {self.seq_length + 1 + done - row_end} tokens, not {self.seq_length + 1}")

    def _make_order(self, epoch: int) -> Order:
        """`epoch` counts whole orders, each of several epochs of the data."""
        seed = (self.seed + epoch) % 2**32
        draw = partial(draw_order, self.indexed.sizes, self.document_range, self.seq_length, seed, self.plan)
        num_documents = self.plan.epochs * (self.document_range[1] - self.document_range[0])
        if max(self.plan.num_samples, num_documents) < index_cache.CACHE_FROM:
            return draw()
        kinds = Order._fields
        paths = [self._cache_file(f"megatron-{kind}", "megatron", kind, seed, *self.plan) for kind in kinds]
        return Order(*load_or_draw(paths, draw, self._check))

    def _check(self, documents: np.ndarray, starts: np.ndarray, windows: np.ndarray) -> None:
        """Cheap proof that cached arrays belong to this plan. ValueError if not."""
        first, last = self.document_range
        plan, count = self.plan, last - first
        shapes = [(plan.epochs * count,), (plan.num_samples + 1, 2)]
        if [documents.shape, starts.shape] != shapes or documents.dtype != np.int32 or starts.dtype.kind != "i":
            raise ValueError(f"it holds {[documents.shape, starts.shape]} where {shapes} are wanted")
        every = plan.epochs * (first + last - 1) * count // 2
        if documents.min() < first or documents.max() >= last or int(documents.sum(dtype=np.int64)) != every:
            raise ValueError(f"it does not hold {plan.epochs} times the sequences {first} to {last - 1}")
        places = starts[:, 0]
        if starts[0].any() or starts.min() < 0 or places[-1] >= len(documents) or (places[1:] < places[:-1]).any():
            raise ValueError("its windows do not follow one another")
        check_permutation(windows, plan.num_samples, _windows_dtype(plan.num_samples))
