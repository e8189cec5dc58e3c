"""Samples of a GPT: windows of seq_length + 1 tokens over documents laid end to end, in an order shuffled every epoch.

Sequences lie in the .bin one after another (checked when it is opened), so window k of a split that begins at token b is
the tokens [b + k*S, b + k*S + S + 1): a slice, and no index has to be built. One token overlaps, because the last label of a
window is the first input of the next.

Worked example: documents of 5, 3 and 4 tokens, S = 4. Tokens 0..11 give (12 - 1) // 4 = 2 windows, [0..4] and [4..8];
the 3 tokens after them are never read.

Sample i of any i >= 0 is window order(seed, epoch)[i % n] with epoch = i // n. It depends on nothing else: not on how many
samples a run wants, nor on ranks, workers or batch sizes, so a run can be prolonged or moved to another layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.config.data import split_shares
from megatron_moe.data import index_cache
from megatron_moe.data.index_cache import cache_name, check_permutation, load_or_draw
from megatron_moe.data.indexed_dataset import IndexedDataset


def split_ranges(split: str, count: int) -> list[int]:
    """Boundaries [0, b1, b2, b3] of training, validation and test among `count` sequences, rounded as Megatron does.

    '969,30,1' of 1000 -> [0, 969, 999, 1000]. Every share is rounded half to even; what that adds up to beyond `count`
    is then taken from all three boundaries.
    """
    bounds = [0]
    for share in split_shares(split):
        bounds.append(bounds[-1] + round(share * float(count)))
    excess = bounds[-1] - count
    # NOTE: Megatron's first boundary can fall to -1 here (0,1,1 of 3); ours stops at 0.
    return [0] + [max(b - excess, 0) for b in bounds[1:]]


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count), uint32[count] (uint64 from 2**32 on).

    Sorting raw PCG64 words rather than Generator.permutation: numpy promises that the raw stream never changes, and a new
    numpy must not reorder the data of a run that is being resumed.
    """
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(words, kind="stable").astype(_order_dtype(count))


def _order_dtype(count: int) -> type:
    return np.uint32 if count < 2**32 else np.uint64


def picked(array: np.ndarray, places: Sequence[int]) -> list[int]:
    """array[places] for a few places: a list that numpy would first make an array of takes it several times as long."""
    values = memoryview(array)
    return [values[place] for place in places]


class GPTDataset:
    """Windows over the sequences [first, last) of an indexed dataset.

    Item i: {"text": int64[seq_length + 1], "sample_id": i}, for any i >= 0. `len` is the number of windows in one epoch.
    Raises ValueError when the sequences hold too few tokens for one window.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        document_range: tuple[int, int],
        seq_length: int,
        seed: int,
        split_name: str,
        cache_path: str | Path | None = None,
        shuffle: bool = True,
    ):
        first, last = document_range
        assert 0 <= first <= last <= len(indexed), f"{document_range} of {len(indexed)}"
        self.indexed, self.document_range, self.seq_length = indexed, (first, last), seq_length
        self.seed, self.split_name, self.shuffle = seed, split_name, shuffle
        self.first_token = indexed.start_of(first)
        self.num_tokens = indexed.start_of(last) - self.first_token
        self._count = self._count_windows()
        self._cache = Path(cache_path) if cache_path else Path(indexed.prefix).parent / "index-cache"
        self._orders: dict[int, Any] = {}

    def _count_windows(self) -> int:
        count = (self.num_tokens - 1) // self.seq_length
        if count < 1:
            first, last = self.document_range
            raise ValueError(
                f"the {self.split_name} split of {self.indexed.prefix} has {self.num_tokens} tokens in {last - first} documents, and "
                f"one sample takes --seq-length + 1 = {self.seq_length + 1}; shorten --seq-length, change --split, or add data"
            )
        return count

    def __getstate__(self) -> dict:
        # Orders are memory maps: a spawned data worker loads its own instead of being sent them.
        return {**self.__dict__, "_orders": {}}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        return {"text": self.texts([int(index)])[0].astype(np.int64), "sample_id": int(index)}

    @property
    def dtype(self) -> np.dtype:
        """What `texts` are in."""
        return self.indexed.dtype

    def texts(self, indices: Sequence[int]) -> np.ndarray:
        """The tokens of several samples: [len(indices), seq_length + 1] in the dtype of the data. The fast way to read."""
        first = min(indices, default=0)
        if first < 0:
            raise IndexError(f"sample {first}: samples are counted from 0, without end")
        texts = np.empty((len(indices), self.seq_length + 1), self.dtype)
        length, done = self._order_length, 0
        number = first // length
        if indices and max(indices) < (number + 1) * length:  # nearly always: without the cost of groups
            self._fill(texts, number, [index - number * length for index in indices])
            return texts
        for number, group in itertools.groupby(indices, length.__rfloordiv__):
            positions = [index - number * length for index in group]
            self._fill(texts[done : done + len(positions)], number, positions)
            done += len(positions)
        return texts

    @property
    def _order_length(self) -> int:
        """Samples until the next order begins."""
        return self._count

    def _fill(self, texts: np.ndarray, number: int, positions: list[int]) -> None:
        """Put the samples at these positions of an order into the rows."""
        windows = picked(self._order(number), positions) if self.shuffle else positions
        if max(windows) >= self._count:
            raise IndexError(f"window {max(windows)} of {self._count} in {self.indexed.prefix}")
        flat, tokens, length = memoryview(texts.reshape(-1)), self.indexed.tokens, self.seq_length + 1
        for row, window in enumerate(windows):
            start = self.first_token + window * self.seq_length
            flat[row * length : (row + 1) * length] = tokens[start : start + length]

    # ------------------------------------------------------------ the order of an epoch

    def _order(self, epoch: int) -> Any:
        """The order of an epoch. Two are kept: batches at the end of an epoch reach into the next."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        count = self._count
        if count < index_cache.CACHE_FROM:
            return epoch_order(self.seed, epoch, count)
        path = self._cache_file(f"epoch{epoch}", self.seed, epoch)
        check = partial(check_permutation, count=count, dtype=_order_dtype(count))
        return load_or_draw([path], lambda: [epoch_order(self.seed, epoch, count)], check)[0]

    def _cache_file(self, name: str, *key: Any) -> Path:
        """The name differs as soon as anything differs that the order depends on, the data's .idx included."""
        if not hasattr(self, "_digest"):
            self._digest = self.indexed.digest()  # reads the .idx once more: only for datasets that use the cache
        stem = f"{Path(self.indexed.prefix).name}-{self.split_name}-{name}"
        return self._cache / cache_name(stem, [self._digest, self.seq_length, self.document_range, *key])
