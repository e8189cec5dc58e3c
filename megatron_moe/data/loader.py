"""From flags to micro-batches: which datasets, what is wrong with them, and who reads which sample when.

    DataConfig -> data_problems (before anything starts) -> build_datasets -> build_loader -> Batch, Batch, ...

Who reads what: step s takes samples first + s*G .. first + (s+1)*G, where G = micro-batch size * data-parallel size *
number of micro-batches; where G grows from step to step, each step takes the next G of them. They are cut into micro-batches of consecutive samples; rank r of R takes micro-batches r, R + r, ...
Worked example, micro-batch size 2, R = 2, two micro-batches, step 0: rank 0 reads (0 1) (4 5), rank 1 reads (2 3) (6 7).
With R = 1 and four micro-batches rank 0 reads (0 1) (2 3) (4 5) (6 7): the same micro-batches.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_moe.config.data import DataConfig, blend_of
from megatron_moe.data.batch import Batch, Samples
from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.gpt_dataset import GPTDataset, split_ranges
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.data.megatron_order import MegatronDataset, make_plan, share_of
from megatron_moe.data.mock import MockDataset

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the trainer answers them, its workers do not
SPLITS = ("train", "valid", "test")
SCANNED_TOKENS = 1 << 22  # how many tokens are looked at to find one outside the vocabulary
SCANNED_PIECES = 64


class SplitDatasets(NamedTuple):
    """Datasets with `len` (samples per epoch) and items for any index; None where a split is empty."""

    train: Any
    valid: Any
    test: Any


class Source(NamedTuple):
    """One dataset of a blend: where it is, its weight, and which entry of --split to take (None: all of it)."""

    prefix: str
    weight: float
    split: int | None
    has_weight: bool  # it was given with one, as in a blend

    def wanted(self, samples: int) -> int:
        """How many samples Megatron orders of this dataset when `samples` of all are wanted."""
        return share_of(samples, self.weight) if self.has_weight else samples


def sources_of(data: DataConfig) -> list[list[Source]]:
    """What training, validation and test are read from, in this order. A weight of zero leaves a dataset out."""
    if data.data_path:
        return [_sources(data.data_path, split) for split in range(3)]
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    return [_sources(words, None) if words else [] for words in paths]


def prefixes_of(data: DataConfig) -> list[str]:
    """Every dataset that is read, once."""
    return list(dict.fromkeys(s.prefix for sources in sources_of(data) for s in sources))


def _sources(words: tuple[str, ...], split: int | None) -> list[Source]:
    return [Source(prefix, weight, split, len(words) > 1) for weight, prefix in blend_of(words) if weight > 0]


def build_datasets(data: DataConfig, seq_length: int, seed: int, vocab_size: int, wanted: Sequence[int] | None = None) -> SplitDatasets:
    """The three datasets of a run. Raises ValueError for unusable files or when there is too little to train on.

    `vocab_size` is what mock data draws from. `wanted`: samples of each split that Megatron's order is drawn for.
    In the stable order validation and test do not depend on the seed of the run, so that runs with different seeds are
    measured on the same samples; in Megatron's they do.
    """
    is_megatron = data.data_order == "megatron"
    assert not is_megatron or wanted is not None, "Megatron's order needs to know how many samples are wanted"
    seeds = (seed, seed, seed) if is_megatron else (seed, 1, 2)
    if data.mock_data:
        # Far from each other: --seed 1 must not train on the validation text.
        return SplitDatasets(*(MockDataset(vocab_size, seq_length, 3 * s + k) for k, s in enumerate(seeds)))
    open_once = functools.cache(IndexedDataset)
    splits = []
    for split, (name, sources) in enumerate(zip(SPLITS, sources_of(data))):
        samples = wanted[split] if is_megatron else None
        parts = [(_build_one(data, open_once(s.prefix), s, name, seq_length, seeds[split], samples), s.weight) for s in sources]
        splits.append(_blend([(dataset, weight) for dataset, weight in parts if dataset is not None]))
    return SplitDatasets(*splits)


class TrainingSize(NamedTuple):
    """How much one dataset has to train on: its training split, in tokens and in samples."""

    prefix: str
    weight: float
    tokens: int
    samples: int


def training_sizes(data: DataConfig, seq_length: int) -> list[TrainingSize]:
    """Raises ValueError for unusable files, as `build_datasets` does."""
    sizes = []
    for source in sources_of(data)[0]:
        indexed = IndexedDataset(source.prefix)
        dataset = GPTDataset(indexed, _range_of(source, data, indexed), seq_length, 0, "train")
        sizes.append(TrainingSize(source.prefix, source.weight, dataset.num_tokens, len(dataset)))
    return sizes


def _build_one(
    data: DataConfig, indexed: IndexedDataset, source: Source, name: str, seq_length: int, seed: int, samples: int | None
) -> GPTDataset | None:
    """The dataset of one source, in Megatron's order for its part of `samples` if they are given; None without any data."""
    first, last = _range_of(source, data, indexed)
    if first == last:
        return None
    arguments = (indexed, (first, last), seq_length, seed, name, data.data_cache_path)
    try:
        if samples is None:
            return GPTDataset(*arguments)
        exact = data.train_data_exact_num_epochs if name == "train" else None
        dataset = MegatronDataset(*arguments, samples=source.wanted(samples), exact_epochs=exact)
        dataset.prepare()
        return dataset
    except ValueError as error:
        if name == "train":
            raise
        logger.warning("no %s data from %s: %s", name, source.prefix, error)
        return None


def _range_of(source: Source, data: DataConfig, indexed: IndexedDataset) -> tuple[int, int]:
    """Sequences [first, last) of a source."""
    if source.split is None:
        return 0, len(indexed)
    bounds = split_ranges(data.split, len(indexed))
    return bounds[source.split], bounds[source.split + 1]


def _blend(parts: list[tuple[GPTDataset, float]]) -> GPTDataset | BlendedDataset | None:
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0][0]
    return BlendedDataset([d for d, _ in parts], [w for _, w in parts])


# ---------------------------------------------------------------- what is wrong, before anything starts


def data_problems(
    data: DataConfig,
    seq_length: int,
    vocab_size: int,
    fingerprint: str | None = None,
    samples: int | None = None,
    unseen: Collection[str] = (),
) -> list[str]:
    """Everything that would stop this run's data later, one sentence each; [] when it is fine.

    vocab_size: of the model, before padding. fingerprint: of the run's tokenizer, to compare with the one that made the data.
    samples: how many the whole run takes, to compare with --train-data-exact-num-epochs.
    unseen: prefixes that are not looked at, because they are on another machine.
    """
    problems: list[str] = []
    opened: dict[str, IndexedDataset] = {}
    everything = sources_of(data)
    for prefix in (p for p in prefixes_of(data) if p not in unseen):
        try:
            opened[prefix] = IndexedDataset(prefix)
            problems += _content_problems(opened[prefix], vocab_size, fingerprint)
        except ValueError as error:
            problems.append(str(error))
    for source in everything[0]:
        if source.prefix in opened:
            try:
                dataset = GPTDataset(opened[source.prefix], _range_of(source, data, opened[source.prefix]), seq_length, 0, "train")
                if data.train_data_exact_num_epochs and samples:
                    problems += _exact_epochs_problems(dataset, source.weight, samples, data.train_data_exact_num_epochs)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _exact_epochs_problems(dataset: GPTDataset, weight: float, samples: int, epochs: int) -> Iterator[str]:
    taken = math.floor(weight * (samples - 1)) + 1  # the most that a blend takes of it: it is never ahead of its weight by one
    has = make_plan(dataset.num_tokens, dataset.seq_length, taken, epochs).num_samples
    if taken > has:
        needed = make_plan(dataset.num_tokens, dataset.seq_length, taken).epochs
        yield (
            f"--train-data-exact-num-epochs {epochs} of {dataset.indexed.prefix} has {has} samples and the run takes {taken}; "
            f"give {needed} to a new run, or shorten this one"
        )


def _content_problems(indexed: IndexedDataset, vocab_size: int, fingerprint: str | None) -> Iterator[str]:
    made_by = indexed.meta.get("fingerprint")
    if fingerprint and made_by and made_by != fingerprint:
        yield (
            f"{indexed.prefix} was made with another tokenizer ({indexed.meta.get('tokenizer_type')}, fingerprint {made_by}) than "
            f"this run has (fingerprint {fingerprint}); give the tokenizer it was made with, or preprocess the text again"
        )
    largest = highest_token(indexed)
    if largest >= vocab_size:
        yield (
            f"{indexed.prefix} has a vocabulary larger than the model's: token id {largest}, and the model knows "
            f"0 to {vocab_size - 1}; raise --vocab-size, or give the tokenizer that made the data"
        )


def highest_token(indexed: IndexedDataset) -> int:
    """The largest id among up to SCANNED_TOKENS tokens spread evenly over the file; -1 without tokens."""
    if indexed.num_tokens == 0:
        return -1
    if indexed.num_tokens <= SCANNED_TOKENS:
        return int(indexed.read(0, indexed.num_tokens).max())
    piece = SCANNED_TOKENS // SCANNED_PIECES
    last = indexed.num_tokens - piece
    return max(int(indexed.read(k * last // (SCANNED_PIECES - 1), piece).max()) for k in range(SCANNED_PIECES))


# ---------------------------------------------------------------- reading


class MicroBatchSampler:
    """Sample numbers of one rank's micro-batches, in the order it computes them; endless without `num_steps`.

    num_microbatches: of a rank and step; a function of the samples consumed before the step where the batch grows.
    """

    def __init__(
        self,
        first_sample: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        num_microbatches: int | Callable[[int], int],
        num_steps: int | None = None,
    ):
        assert 0 <= rank < ranks, f"rank {rank} of {ranks}"
        self.first_sample, self.micro_batch_size, self.num_microbatches = first_sample, micro_batch_size, num_microbatches
        self.rank, self.ranks, self.num_steps = rank, ranks, num_steps

    def __iter__(self) -> Iterator[list[int]]:
        consumed, given = self.first_sample, self.num_microbatches
        for _ in itertools.count() if self.num_steps is None else range(self.num_steps):
            num_microbatches = given(consumed) if callable(given) else given
            for microbatch in range(num_microbatches):
                first = consumed + (microbatch * self.ranks + self.rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))
            consumed += self.micro_batch_size * self.ranks * num_microbatches


class Unread:
    """In place of a dataset where nobody looks at the tokens: the numbers of its samples, and zeros."""

    def __init__(self, seq_length: int):
        self.seq_length = seq_length

    def __getitem__(self, index: int) -> dict:
        return {"text": np.zeros(self.seq_length + 1, np.int64), "sample_id": int(index)}


class _Endless(torch.utils.data.Dataset):
    """Lets DataLoader fetch any index: it would otherwise take `len` for the end."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Samples | list[dict]:
        """What DataLoader asks for a whole micro-batch."""
        if hasattr(self.dataset, "texts"):
            return Samples(self.dataset.texts(indices), indices)
        return [self.dataset[index] for index in indices]


def build_loader(
    dataset: Any,
    first_sample: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_microbatches: int | Callable[[int], int],
    num_workers: int,
    collate: Callable[[Sequence[dict] | Samples], Batch],
    num_steps: int | None = None,
) -> Iterator[Batch]:
    """Micro-batches of one data-parallel rank from `first_sample` on (the samples consumed so far, when resuming).

    collate: is given Samples by datasets that have `texts`, items by others.
    num_microbatches: per rank and step, a number or a function of the samples consumed before the step. Endless without `num_steps`. With num_workers > 0 processes read ahead; the order
    is the same.
    """
    sampler = MicroBatchSampler(first_sample, micro_batch_size, data_parallel_rank, data_parallel_size, num_microbatches, num_steps)
    leash = _Leash()
    loader = torch.utils.data.DataLoader(
        _Endless(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=leash.start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    # Workers that get a signal before they ignore it die of it; a new process inherits what its parent blocks.
    allowed = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
    multiprocessing.util.Finalize(batches, leash.release, exitpriority=100)
    return batches


class _Leash:
    """Keeps data workers alive through signals, and ends them when the trainer ends.

    The signals that stop a run reach the whole process group, and workers that die of them take the trainer along before it has
    saved. But SIGTERM is also how Python's own exit ends them, and then waits for them: workers that merely ignore it
    while the loader is still in use hang the trainer's exit for ever. So Python's exit sets a flag first, which they watch.
    """

    def __init__(self) -> None:
        self._over = multiprocessing.RawValue("b", 0)  # without a lock, which a killed worker could hold

    def start_worker(self, worker: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.value:
            time.sleep(0.1)
        os._exit(0)

    def release(self) -> None:
        self._over.value = 1
