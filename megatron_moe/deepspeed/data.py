"""The loader of `training_data`: every rank reads its share of each epoch, in micro-batches.

Where it is goes into the engine's checkpoints: after `load_checkpoint` the first pass over it begins with the batch that would have come
next. A pass that the caller breaks off begins anew otherwise, as it does with torch's loader.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler


class ShareLoader:
    """Micro-batches of this rank. Another order in every epoch, and the same ones in every run."""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        rank: int,
        ranks: int,
        collate_fn: Callable[[list], Any] | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
        sampler: Sampler | None = None,
        num_workers: int = 0,
    ):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"training_data must be a data set with a length and numbered samples, not {type(dataset).__name__}: an endless stream "
                f"cannot be shared among {ranks} ranks by number; load it yourself and give no training_data"
            )
        if len(dataset) == 0:
            raise ValueError("training_data has no samples; give a data set of at least one, or None")
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.sampler = DistributedSampler(dataset, ranks, rank) if sampler is None else sampler
        self.options = {"collate_fn": collate_fn, "pin_memory": pin_memory and torch.cuda.is_available(), "num_workers": num_workers}
        self.epoch = self.batch = 0  # where the caller is: batches of this epoch that he was given
        self._first = 0

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return len(BatchSampler(self.sampler, self.batch_size, self.drop_last))

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
        self.batch, self._first = self._first, 0
        batches = itertools.islice(BatchSampler(self.sampler, self.batch_size, self.drop_last), self.batch, None)
        own = torch.Generator().manual_seed(self.epoch)  # torch draws a number per pass, and the model's dropout is to draw as without
        for batch in DataLoader(self.dataset, batch_sampler=list(batches), generator=own, **self.options):
            self.batch += 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state(self, state: dict[str, int]) -> None:
        self.epoch, self._first = state["epoch"], state["batch"]
        if self._first >= len(self):  # saved behind the last batch of an epoch, which had not been asked whether it was the last
            self.epoch, self._first = self.epoch + 1, 0
        self.batch = self._first
