"""Several datasets as one, mixed by weight, in an order without randomness.

Sample i comes from the dataset that lags most behind its weight: argmax over d of w_d * max(i, 1) - count_d, where count_d
is how many of the samples before i were drawn from d, and the first wins a tie. It is that dataset's sample number count_d.

Worked example, weights .5 .3 .2: datasets 0 1 2 0 1 0 2 0 1 0 0 1, so sample 3 is sample 1 of dataset 0.

What sample i is depends only on the samples before it, never on how many are wanted. The choices are worked out in chunks;
only the counts at the start of each chunk are kept for good.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

CHUNK = 8192  # samples worked out at once: a few milliseconds


def choose(weights: Sequence[float], counts: Sequence[int], first: int, length: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Greedy choices for samples [first, first + length), given how often each dataset was drawn before.

    Returns dataset int16[length], sample within it int64[length], and the counts afterwards.
    """
    counts = list(counts)
    which, inner = [0] * length, [0] * length
    for k in range(length):  # every choice depends on the one before; plain floats are faster here than small arrays
        scale = float(max(first + k, 1))
        best, best_lag = 0, -np.inf
        for d, weight in enumerate(weights):
            lag = weight * scale - counts[d]
            if lag > best_lag:
                best, best_lag = d, lag
        which[k], inner[k] = best, counts[best]
        counts[best] += 1
    return np.array(which, np.int16), np.array(inner, np.int64), counts


class BlendedDataset:
    """Item i of the blend is an item of one of the datasets, renumbered: {"text", "sample_id": i}, for any i >= 0.

    Weights are normalised. ValueError for a weight that is not above zero: leave such a dataset out.
    """

    def __init__(self, datasets: Sequence, weights: Sequence[float]):
        assert len(datasets) == len(weights) > 0, f"{len(datasets)} datasets, {len(weights)} weights"
        if min(weights) <= 0:
            # A weight of zero would still win ties at the points where all others are exactly on their share.
            raise ValueError(f"weights of a blend must be above zero, not {list(weights)}; leave the dataset out instead")
        self.datasets = list(datasets)
        # numpy's sum: Megatron's, and unlike Python's the same under every version
        self.weights = (np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))).tolist()
        self._counts = [[0] * len(weights)]  # before each chunk
        self._chunks: dict[int, tuple[list[int], list[int]]] = {}

    def __len__(self) -> int:
        """Samples in one epoch of every dataset together; with unequal weights some are seen again earlier than others."""
        return sum(len(d) for d in self.datasets)

    def __getitem__(self, index: int) -> dict:
        dataset, inner = self.locate(index)
        return {**self.datasets[dataset][inner], "sample_id": int(index)}

    def texts(self, indices: Sequence[int]) -> np.ndarray:
        """As GPTDataset's; each dataset is asked once. In the widest dtype among the datasets."""
        places: dict[int, list[int]] = {}  # of each dataset: which rows are its
        located = [self.locate(index) for index in indices]
        for row, (dataset, _) in enumerate(located):
            places.setdefault(dataset, []).append(row)
        parts = {dataset: self.datasets[dataset].texts([located[row][1] for row in rows]) for dataset, rows in places.items()}
        if len(parts) == 1:
            return next(iter(parts.values())).astype(self.dtype, copy=False)
        texts = np.empty((len(indices), next(iter(parts.values())).shape[1]), self.dtype)
        for dataset, rows in places.items():
            texts[rows] = parts[dataset]
        return texts

    @functools.cached_property
    def dtype(self) -> np.dtype:
        return np.result_type(*(dataset.dtype for dataset in self.datasets))

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, sample within it) of sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0, without end")
        chunk, position = divmod(int(index), CHUNK)
        which, inner = self._chunk(chunk)
        return which[position], inner[position]

    def _chunk(self, number: int) -> tuple[list[int], list[int]]:
        if number not in self._chunks:
            for earlier in range(len(self._counts) - 1, number):
                self._counts.append(choose(self.weights, self._counts[earlier], earlier * CHUNK, CHUNK)[2])
            which, inner, after = choose(self.weights, self._counts[number], number * CHUNK, CHUNK)
            if len(self._counts) == number + 1:
                self._counts.append(after)
            # The neighbour stays, since batches cross the boundary.
            self._chunks = {n: c for n, c in self._chunks.items() if n == number - 1} | {number: (which.tolist(), inner.tolist())}
        return self._chunks[number]
