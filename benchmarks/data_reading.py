"""Samples/s of GPTDataset in each order against Megatron-Core's and a bare slice of the map; the sample index of 1e9 tokens against numpy

Reading: micro-batches of 8 samples of 2048 tokens, with what a step takes of them (tokens, labels, loss mask, positions; no attention
mask, as Megatron-Core's with create_attention_mask false), by one thread, from files that are in the page cache. Megatron-Core's
dataset gives single samples; what it takes to stack 8 of them is a line of its own. The bare slice is one per sample, made into an int64 tensor,
and is not all of a sample. Ours in Megatron's order must be Megatron-Core's samples, tensor by tensor.

Index: where each sample begins, of 1e9 tokens in documents of 1000 and of 200 on average, over numpy's cumsum of the sizes and
searchsorted of the samples' first tokens, which is the least it takes. Our stable order needs none: there the figure is what opening the
files and drawing the first order take. The files' .bin has no blocks on the disk. Memory is the most that numpy held.
"""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Options, Report, System, interleave, missing, paired_ratio, spread, table, timing_table
from megatron_moe.data.batch import Batch, Samples, make_batch
from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.gpt_dataset import GPTDataset
from megatron_moe.data.indexed_dataset import HEADER, MAGIC, IndexedDataset, IndexedDatasetWriter
from megatron_moe.data.loader import build_loader
from megatron_moe.data.megatron_order import MegatronDataset, draw_order, make_plan, window_starts

PEERS = {"megatron": "its GPTDataset; the package is megatron-core"}
EOD, SEED, MICRO_BATCH = 0, 1, 8
SLICE, PEER, PEER_STACKED = "bare slice", "Megatron-Core", "Megatron-Core, stacked"
STABLE = "ours"
NUMPY, INDEX, PEER_INDEX = "numpy", "ours", "Megatron-Core"


def run(options: Options) -> Report:
    torch.set_num_threads(1)
    tokens, seq_length, samples = (200_000, 128, 160) if options.quick else (60_000_000, 2048, 4000)
    report = Report("data_reading", {"tokens": tokens, "sequence": seq_length, "samples a turn": samples, "micro-batch": MICRO_BATCH})
    if missing(PEERS):
        report.skipped["Megatron-Core"] = "not installed (its GPTDataset); pip install --no-deps megatron-core"
    with tempfile.TemporaryDirectory() as folder:
        reading(report, Path(folder), tokens, seq_length, samples, options.rounds_or(9))
        for length in (1000, 200):
            index(report, Path(folder), 10**6 if options.quick else 10**9, length, options.rounds_or(9))
    return report


# ---------------------------------------------------------------- samples


def reading(report: Report, folder: Path, tokens: int, seq_length: int, samples: int, rounds: int) -> None:
    whole = write(folder / "whole", tokens, 0)
    parts = [write(folder / f"part{i}", tokens // 3, i + 1) for i in range(3)]
    count = (tokens // 2) // seq_length // MICRO_BATCH * MICRO_BATCH  # of the order that is drawn: less than there is
    samples = min(samples, count)
    stable = GPTDataset(whole, (0, len(whole)), seq_length, SEED, "train", folder)
    in_order = GPTDataset(whole, (0, len(whole)), seq_length, SEED, "train", folder, shuffle=False)
    megatron = MegatronDataset(whole, (0, len(whole)), seq_length, SEED, "train", folder, samples=count)
    blend = BlendedDataset([GPTDataset(p, (0, len(p)), seq_length, SEED, "train", folder) for p in parts], [0.5, 0.3, 0.2])
    systems = {
        STABLE: partial(read, stable, samples),
        f"{STABLE}, in file order": partial(read, in_order, samples),
        f"{STABLE}, blend of three": partial(read, blend, samples),
        f"{STABLE}, in Megatron's order": partial(read, megatron, samples),
        f"{STABLE}, rank 1 of 4 through the loader": partial(load, stable, samples),
        f"{STABLE}, micro-batches of 1": partial(read, stable, samples, 1),
        SLICE: partial(slices, whole, stable, samples),
    }
    if "Megatron-Core" not in report.skipped:
        theirs = megatron_core(whole, seq_length, count, folder)
        check_equal(megatron, theirs, min(samples, 64))
        systems |= {PEER: partial(single, theirs, samples), PEER_STACKED: partial(stacked, theirs, samples)}
    timed = report.samples["reading"] = interleave([System(name, run_it) for name, run_it in systems.items()], rounds)
    rates = report.figures["samples per CPU second"] = {
        name: spread(samples / t.cpu for t in turns)._asdict() for name, turns in timed.items()
    }
    report.tables.append(timing_table(timed, SLICE, {"samples/s cpu": lambda name: f"{rates[name]['median']:,.0f}"}))
    if PEER in timed:
        over = report.figures["samples/s over Megatron-Core's, by CPU time"] = {
            name: {base: paired_ratio(timed, base, name)._asdict() for base in (PEER, PEER_STACKED)}
            for name in timed if name.startswith(STABLE)
        }  # fmt: skip
        report.tables.append(table(["samples/s over", PEER, PEER_STACKED], [
            [name, *(f"{f['median']:.1f} ({f['low']:.1f}-{f['high']:.1f})" for f in ratios.values())] for name, ratios in over.items()
        ]))  # fmt: skip


def write(prefix: Path, tokens: int, seed: int, vocab_size: int = 60_000) -> IndexedDataset:
    """Documents of 100 to 2000 random tokens."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        while writer.num_tokens < tokens:
            sizes = generator.integers(100, 2000, 1000 if tokens > 10**6 else 20)
            writer.add_documents(generator.integers(1, vocab_size, sizes.sum(), np.uint16), sizes)
    return IndexedDataset(str(prefix))


def read(dataset: Any, samples: int, size: int = MICRO_BATCH) -> None:
    for first in range(0, samples, size):
        indices = list(range(first, first + size))
        make_batch(Samples(dataset.texts(indices), indices), EOD)


def load(dataset: GPTDataset, samples: int) -> None:
    batches = build_loader(dataset, 0, MICRO_BATCH, 1, 4, 1, 0, partial(make_batch, eod=EOD))
    for _ in islice(batches, samples // MICRO_BATCH):
        pass


def slices(indexed: IndexedDataset, dataset: GPTDataset, samples: int) -> None:
    bin_file = np.memmap(indexed.prefix + ".bin", indexed.dtype, "r").view(np.ndarray)
    length = dataset.seq_length
    for window in dataset._order(0)[:samples].tolist():
        torch.from_numpy(bin_file[window * length : window * length + length + 1].astype(np.int64))


# ---------------------------------------------------------------- Megatron-Core


def megatron_core(indexed: IndexedDataset, seq_length: int, samples: int, folder: Path) -> Any:
    """Its GPTDataset over the same file, without an attention mask."""
    from megatron.core.datasets.gpt_dataset import GPTDataset as Theirs
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirFile
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 60_000, EOD, -1, {"class": "none"}

    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=seq_length, blend=([indexed.prefix], None), split="1,0,0", path_to_cache=str(folder / "theirs"),
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    file = TheirFile(indexed.prefix, multimodal=False, mmap=True)
    return Theirs(file, indexed.prefix, np.arange(len(indexed), dtype=np.int32), samples, Split.train, config)


def single(dataset: Any, samples: int) -> None:
    for i in range(samples):
        dataset[i]


def stacked(dataset: Any, samples: int) -> None:
    for first in range(0, samples, MICRO_BATCH):
        torch.utils.data.default_collate([dataset[i] for i in range(first, first + MICRO_BATCH)])


def check_equal(ours: MegatronDataset, theirs: Any, samples: int) -> None:
    """The same tensors, of the same types."""
    for i in range(samples):
        batch: Batch = make_batch(Samples(ours.texts([i]), [i]), EOD)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            a, b = getattr(batch, name)[0], theirs[i][name]
            assert a.dtype == b.dtype and torch.equal(a, b), f"{name} of sample {i} differ: {a.dtype} {a[:4]}, {b.dtype} {b[:4]}"


# ---------------------------------------------------------------- the index


def index(report: Report, folder: Path, tokens: int, length: int, rounds: int) -> None:
    """Documents of 1 to 2 * `length` tokens."""
    sizes = np.random.default_rng(0).integers(1, 2 * length, tokens // length).astype(np.int32)
    seq_length = 2048
    plan = make_plan(int(sizes.sum(dtype=np.int64)), seq_length, 1)
    prefix = sparse(folder / f"index{length}", sizes)
    work: dict[str, Callable[[], object]] = {
        NUMPY: lambda: least(sizes, seq_length, plan.num_samples),
        INDEX: lambda: window_starts(sizes, seq_length, plan.num_samples),
        f"{INDEX}, with documents and both shuffles": lambda: draw_order(sizes, (0, len(sizes)), seq_length, SEED, plan),
        f"{STABLE}, stable order: opening and the first sample": lambda: opened(prefix, seq_length),
    }
    if "Megatron-Core" not in report.skipped:
        from megatron.core.datasets import helpers

        documents, total = np.arange(len(sizes), dtype=np.int32), int(sizes.sum(dtype=np.int64))
        work[PEER_INDEX] = lambda: helpers.build_sample_idx(sizes, documents, seq_length, 1, total, True, True)
    case = f"index, documents of {length}"
    timed = report.samples[case] = interleave([System(name, run_it) for name, run_it in work.items()], rounds)
    megabytes = {name: peak(run_it) / 1e6 for name, run_it in work.items() if name != PEER_INDEX}  # that one's C++ is not counted
    report.figures[case] = {
        "documents": len(sizes), "samples": plan.num_samples, "megabytes at most": megabytes,
        "over numpy, by CPU time": {name: paired_ratio(timed, name, NUMPY)._asdict() for name in work},
    }  # fmt: skip
    report.tables.append(f"{case}: {len(sizes):,} documents, {plan.num_samples:,} samples\n" + timing_table(
        timed, NUMPY, {"MB at most": lambda name: f"{megabytes[name]:.0f}" if name in megabytes else ""}))  # fmt: skip


def least(sizes: np.ndarray, seq_length: int, count: int) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes, dtype=np.int64), np.arange(count + 1, dtype=np.int64) * seq_length, side="right")


def opened(prefix: str, seq_length: int) -> None:
    indexed = IndexedDataset(prefix)
    GPTDataset(indexed, (0, len(indexed)), seq_length, SEED, "train", Path(tempfile.mkdtemp(dir=Path(prefix).parent))).texts([0])


def sparse(prefix: Path, sizes: np.ndarray) -> str:
    """A dataset of these sizes whose .bin is a hole."""
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, len(sizes), len(sizes) + 1))
        for array in (sizes, pointers, np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(array.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * int(sizes.sum(dtype=np.int64)))
    return str(prefix)


def peak(run_it: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at most, beyond what was there."""
    tracemalloc.start()
    try:
        run_it()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
