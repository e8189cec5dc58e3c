"""Whole micro-batches read at once: the samples are those that are read one by one, in every order."""

import functools

import numpy as np
import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.data.batch import Samples, make_batch
from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.gpt_dataset import GPTDataset
from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_moe.data.loader import build_loader
from megatron_moe.data.megatron_order import MegatronDataset
from megatron_moe.data.mock import MockDataset

E = 7  # end of a document


def write(prefix, dtype, seed):
    """Documents of 0 to 29 tokens, some of them E."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for _ in range(40):
            writer.add_document(generator.integers(0, 20, generator.integers(0, 30)))
    return IndexedDataset(str(prefix))


@pytest.fixture
def datasets(tmp_path):
    a, b = write(tmp_path / "a", np.uint16, 0), write(tmp_path / "b", np.int32, 1)
    stable = GPTDataset(a, (3, 37), 8, 1, "train")
    megatron = MegatronDataset(b, (3, 37), 8, 1, "train", samples=30)
    return {
        "stable": stable, "in file order": GPTDataset(a, (3, 37), 8, 1, "train", shuffle=False), "megatron": megatron,
        "blend": BlendedDataset([stable, megatron], [0.6, 0.4]),
    }  # fmt: skip


KINDS = ("stable", "in file order", "megatron", "blend")


def order_of(dataset):
    return getattr(dataset, "_order_length", 60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_micro_batch_is_its_samples(datasets, kind, size):
    dataset = datasets[kind]
    first = order_of(dataset) - size // 2  # with more than one sample it reaches into the next order
    indices = list(range(first, first + size))
    texts = dataset.texts(indices)
    assert texts.shape == (size, 9) and texts.dtype == (np.uint16 if kind in KINDS[:2] else np.int32) and texts.dtype == dataset.dtype
    np.testing.assert_array_equal(texts, [dataset[i]["text"] for i in indices])


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_samples_is_read_and_nothing_is_shared_between_batches(datasets, kind):
    dataset = datasets[kind]
    indices = [70, 2, 130, 0, 2]
    first, second = dataset.texts(indices), dataset.texts(indices)
    np.testing.assert_array_equal(first, [dataset[i]["text"] for i in indices])
    first[:] = 0
    np.testing.assert_array_equal(second, dataset.texts(indices))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_before_the_first_are_refused(datasets, kind):
    with pytest.raises(IndexError, match="sample -1: samples are counted from 0"):
        datasets[kind].texts([3, -1])


FLAGS = {"plain": {}, "documents": {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}}


def test_a_damaged_order_does_not_read_beyond_the_split(datasets):
    dataset = datasets["stable"]
    dataset._orders[0] = np.full(len(dataset), len(dataset), np.uint32)
    with pytest.raises(IndexError, match=f"window {len(dataset)} of {len(dataset)}"):
        dataset.texts([0, 1])


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_gives_what_single_items_make(datasets, kind, flags):
    dataset, collate = datasets[kind], functools.partial(make_batch, eod=E, **flags)
    for step, batch in enumerate(build_loader(dataset, 50, 4, 0, 1, 1, 0, collate, num_steps=5)):
        expected = collate([dataset[i] for i in range(50 + 4 * step, 54 + 4 * step)])
        for name, ours, theirs in zip(batch._fields, batch, expected):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.is_contiguous(), name


def test_a_dataset_without_texts_is_read_item_by_item():
    batches = list(build_loader(MockDataset(9, 4, 1), 0, 2, 0, 1, 1, 0, functools.partial(make_batch, eod=0), num_steps=2))
    assert batches[1].tokens.tolist() == [MockDataset(9, 4, 1)[i]["text"][:-1].tolist() for i in (2, 3)]


def test_only_positions_are_shared_by_batches():
    a, b = (make_batch(Samples(np.full((2, 6), token, np.uint16), [0, 1]), E) for token in (1, 2))
    assert a.position_ids is b.position_ids and a.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    for name in ("tokens", "labels", "loss_mask"):
        getattr(a, name).zero_()
    assert b.tokens.eq(2).all() and b.labels.eq(2).all() and b.loss_mask.eq(1).all() and b.loss_mask.dtype == torch.float32


@pytest.mark.distributed
def test_training_does_not_write_into_positions():
    writes, shape = run_distributed(_trained_positions, 1)[0]
    assert writes == 0 and shape == [2, 16]


def _trained_positions():
    """How often the positions that the batches of a run share were written to after they were made, and their shape."""
    from training import runs

    from megatron_moe.data import batch

    made = []
    whole = batch._plain_positions

    def remembered(*shape):
        positions = whole(*shape)
        if not made:
            made.append((positions, positions._version))
        return positions

    batch._plain_positions = remembered
    try:
        runs.train_here("--mock-data --vocab-size 64 --train-iters 4")
    finally:
        batch._plain_positions = whole
    ((positions, version),) = made
    assert positions.tolist() == [list(range(16))] * 2
    return positions._version - version, list(positions.shape)
