"""Megatron's order of samples: golden vectors, a slow walk over tokens as oracle, its cache, and what follows its end."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data import index_cache, megatron_order
from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_moe.data.loader import build_datasets, data_problems
from megatron_moe.data.megatron_order import MegatronDataset, Plan, draw_order, make_plan, share_of, window_starts

SIZES = (5, 3, 7, 2, 4)
# by samples wanted: epochs, is the last separate, documents, starts, windows (seq_length 4, seed 1234)
GOLDEN = {
    5: (1, False, [4, 0, 1, 2, 3], "00 10 14 30 34 41", [3, 2, 1, 0, 4]),
    6: (2, True, [4, 0, 1, 2, 3, 3, 2, 1, 0, 4], "00 10 14 30 34 41 61 65 72 83 92", [2, 0, 4, 3, 1, 6, 9, 5, 7, 8]),
}
GOLDEN[8] = GOLDEN[6]


def write(prefix, sizes):
    """Documents of these sizes; all tokens together count up."""
    first = 0
    with IndexedDatasetWriter(str(prefix), "int32") as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size))
            first += size
    return IndexedDataset(str(prefix))


def build(indexed, samples, seq_length=4, seed=1234, document_range=None, **more):
    return MegatronDataset(indexed, document_range or (0, len(indexed)), seq_length, seed, "train", samples=samples, **more)


def texts(dataset, count):
    return [dataset[i]["text"].tolist() for i in range(count)]


# ---------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("samples", GOLDEN)
def test_golden_vectors(samples):
    epochs, is_separate, documents, starts, windows = GOLDEN[samples]
    plan = make_plan(sum(SIZES), 4, samples)
    assert (plan.epochs, plan.is_last_separate) == (epochs, is_separate)
    order = draw_order(np.array(SIZES, np.int32), (0, 5), 4, 1234, plan)
    assert order.documents.tolist() == documents and order.documents.dtype == np.int32
    assert order.starts.tolist() == [[int(place), int(offset)] for place, offset in starts.split()]
    assert order.windows.tolist() == windows and order.windows.dtype == np.uint32


def test_first_samples_of_the_golden_order(tmp_path):
    """Documents are tokens 0-4, 5-7, 8-14, 15-16, 17-20, and are read as 4 0 1 2 3."""
    stream = [*range(17, 21), *range(0, 5), *range(5, 8), *range(8, 15), *range(15, 17)]
    read = texts(build(write(tmp_path / "x", SIZES), 5), 5)
    assert read == [stream[4 * k : 4 * k + 5] for k in (3, 2, 1, 0, 4)] and read[0] == [8, 9, 10, 11, 12]


def test_last_epoch_is_separate_when_less_than_four_fifths_of_it_are_wanted():
    assert [make_plan(21, 4, n).is_last_separate for n in range(1, 11)] == [False] * 5 + [True] * 3 + [False] * 2
    assert [make_plan(21, 4, n).epochs for n in (0, 1, 5, 6, 10, 11, 15, 16)] == [1, 1, 1, 2, 2, 3, 3, 4]


def test_part_of_a_blend_is_half_a_percent_larger_and_rounded_up():
    assert [share_of(1000, 0.3), share_of(10, 0.5), share_of(200, 0.5), share_of(0, 0.5)] == [302, 6, 101, 0]


# ---------------------------------------------------------------- the slow oracle


def oracle(documents, seq_length, samples, seed):
    """Megatron's walk, one token at a time, with lists: (document order, starts, window order, texts in the order of reading)."""
    per_epoch = sum(map(len, documents))
    epochs = 1
    while (epochs * per_epoch - 1) // seq_length < samples:
        epochs += 1
    before_last = ((epochs - 1) * per_epoch - 1) // seq_length
    separate = epochs > 1 and samples - before_last < int(0.8 * ((per_epoch - 1) // seq_length))
    generator, order = np.random.RandomState(seed), []
    for count in (epochs - 1, 1) if separate else (epochs,):
        part = list(range(len(documents))) * count
        generator.shuffle(part)
        order += part
    stream = [(place, offset, token) for place, d in enumerate(order) for offset, token in enumerate(documents[d])]
    total = (epochs * per_epoch - 1) // seq_length
    starts = [[0, 0]] + [list(stream[k * seq_length][:2]) for k in range(1, total + 1)]
    windows = []
    for first, last in ((0, before_last), (before_last, total)) if separate else ((0, total),):
        part = list(range(first, last))
        generator.shuffle(part)
        windows += part
    read = [[token for _, _, token in stream[k * seq_length : (k + 1) * seq_length + 1]] for k in windows]
    return order, starts, windows, read


@settings(max_examples=250, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    seq_length=st.integers(1, 7),
    samples=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_equals_a_walk_over_the_tokens(sizes, seq_length, samples, seed):
    documents, token = [], 0
    for size in sizes:
        documents.append(list(range(token, token + size)))
        token += size
    plan = make_plan(sum(sizes), seq_length, samples)
    if plan.num_samples == 0:
        return
    order = draw_order(np.array(sizes, np.int32), (0, len(sizes)), seq_length, seed, plan)
    expected = oracle(documents, seq_length, samples, seed)
    assert (order.documents.tolist(), order.starts.tolist(), order.windows.tolist()) == expected[:3]


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=3, max_size=8), seq_length=st.integers(1, 6), samples=st.integers(1, 30))
def test_samples_of_a_part_of_a_file_equal_the_walk(tmp_path_factory, sizes, seq_length, samples):
    indexed = write(tmp_path_factory.mktemp("walk") / "x", sizes)
    if sum(sizes[1:]) < seq_length + 1:
        with pytest.raises(ValueError, match="--seq-length"):
            build(indexed, samples, seq_length, document_range=(1, len(sizes)))
        return
    dataset = build(indexed, samples, seq_length, 7, (1, len(sizes)))
    expected = oracle([indexed[i].tolist() for i in range(1, len(sizes))], seq_length, samples, 7)[3]
    assert texts(dataset, len(expected)) == expected
    assert len(dataset) == (sum(sizes[1:]) - 1) // seq_length and dataset[0]["text"].dtype == np.int64


def test_numbers_that_need_64_bits_are_kept():
    """Documents of 2 billion tokens: their running sum passes 2**31 at the second and 2**33 at the fifth."""
    sizes = np.full(6, 2_000_000_000, np.int32)
    starts = window_starts(sizes, 1_000_000_000, 11)
    assert starts.tolist() == [[k // 2, k % 2 * 1_000_000_000] for k in range(12)]


# ---------------------------------------------------------------- beyond the samples that were wanted


def test_more_samples_than_wanted_go_on_in_a_further_order(tmp_path):
    indexed = write(tmp_path / "x", SIZES)
    dataset = build(indexed, 8)  # two epochs, ten samples
    first, second = texts(build(indexed, 8), 10), texts(build(indexed, 8, seed=1235), 10)
    assert texts(dataset, 25) == first + second + texts(build(indexed, 8, seed=1236), 5) and first != second
    assert dataset[13]["sample_id"] == 13
    assert dataset[3]["text"].tolist() == first[3]  # back again
    assert pickle.loads(pickle.dumps(dataset))[13]["text"].tolist() == second[3]


def test_seed_after_the_last_is_the_first(tmp_path):
    indexed = write(tmp_path / "x", SIZES)
    assert texts(build(indexed, 5, seed=2**32 - 1), 10)[5:] == texts(build(indexed, 5, seed=0), 5)


def test_exact_epochs_end_where_they_end(tmp_path):
    indexed = write(tmp_path / "x", SIZES)
    dataset = build(indexed, 6, exact_epochs=1)
    assert texts(dataset, 5) == texts(build(indexed, 5), 5)
    with pytest.raises(ValueError, match="--train-data-exact-num-epochs 1 has 5 samples"):
        dataset[5]
    assert make_plan(21, 4, 6, 3) == Plan(3, True, 15, 10)  # more than needed: the last epoch is one of which nothing is wanted


# ---------------------------------------------------------------- datasets from flags


@pytest.fixture
def corpora(tmp_path):
    write(tmp_path / "a", [7] * 30)
    write(tmp_path / "b", [4] * 40)
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_every_split_is_ordered_for_its_own_count_and_the_seed_of_the_run(corpora):
    indexed = IndexedDataset(corpora[0])
    built = build_datasets(DataConfig(data_path=corpora[:1], split="60,20,20", data_order="megatron"), 4, 9, 999, (80, 30, 5))
    for dataset, bounds, samples in zip(built, ((0, 18), (18, 24), (24, 30)), (80, 30, 5)):
        assert texts(dataset, samples) == texts(build(indexed, samples, seed=9, document_range=bounds), samples)


def test_blend_orders_each_dataset_for_its_part(corpora):
    a, b = (IndexedDataset(prefix) for prefix in corpora)
    data = DataConfig(train_data_path=("30", corpora[0], "70", corpora[1]), data_order="megatron")
    train = build_datasets(data, 4, 9, 999, (200, 0, 0)).train
    parts = [build(a, 61, seed=9), build(b, 141, seed=9)]  # ceil(200 * w * 1.005)
    assert isinstance(train, BlendedDataset) and [d.plan for d in train.datasets] == [d.plan for d in parts]
    assert texts(train, 200) == texts(BlendedDataset(parts, [0.3, 0.7]), 200)
    assert [train.locate(i)[0] for i in range(10)] == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]


def test_one_dataset_with_a_weight_counts_as_a_blend(corpora):
    """52 samples are an epoch; half a percent more are two."""
    epochs = {}
    for words in (corpora[:1], ("1", corpora[0])):
        epochs[len(words)] = build_datasets(
            DataConfig(train_data_path=words, data_order="megatron"), 4, 9, 999, (52, 0, 0)
        ).train.plan.epochs
    assert epochs == {1: 1, 2: 2}


def test_exact_epochs_that_are_too_few_are_told_before_the_start(corpora):
    data = DataConfig(train_data_path=corpora[:1], data_order="megatron", train_data_exact_num_epochs=2)
    assert data_problems(data, 4, 999, samples=104) == []
    (problem,) = data_problems(data, 4, 999, samples=105)
    assert "exact-num-epochs 2" in problem and "104 samples" in problem and "takes 105; give 3 to a new run" in problem
    train, valid, _ = build_datasets(DataConfig(data_path=corpora[:1], split="1,1", data_order="megatron",
                                                train_data_exact_num_epochs=3), 4, 9, 999, (10, 60, 0))  # fmt: skip
    assert (train.plan.epochs, valid.plan.epochs) == (3, 3)  # validation: 60 samples of 26 an epoch


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"train_iters": 10}, (40, 8, 8)),
        ({"train_iters": 10, "eval_interval": 3}, (40, 32, 8)),
        ({"train_iters": 10, "eval_interval": 0}, (40, 8, 8)),
        ({"train_samples": 42, "eval_interval": 3}, (42, 32, 8)),
        ({"train_iters": 10, "train_tokens": 100}, (40, 8, 8)),
        ({"train_tokens": 6145}, (8, 8, 8)),  # 1024 x 4 a step
    ],
)
def test_wanted_samples_are_megatrons(settings, wanted):
    run = RunConfig.from_values({"eval_iters": 2, "eval_interval": 1000, "global_batch_size": 4, **settings})
    assert run.wanted_samples(1) == wanted


# ---------------------------------------------------------------- the cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Builds datasets that use the cache however small they are; returns (build, folder of the cache)."""
    monkeypatch.setattr(index_cache, "CACHE_FROM", 1)
    indexed = write(tmp_path / "x", [9, 0, 12, 30, 5, 7] * 3)
    return (lambda samples=60, **more: build(indexed, samples, **more)), tmp_path / "index-cache"


def test_order_comes_from_the_cache_when_it_is_there(cached, monkeypatch):
    make, folder = cached
    expected = texts(make(), 60)
    assert len(os.listdir(folder)) == 3
    monkeypatch.setattr(megatron_order, "draw_order", lambda *_: pytest.fail("drawn again"))
    assert texts(make(), 60) == expected
    assert texts(make(58), 58) == expected[:58]  # the same epochs: the same order


@pytest.mark.parametrize(
    "change", [{"samples": 99}, {"samples": 90}, {"seq_length": 5}, {"seed": 2}, {"document_range": (0, 9)}, {"exact_epochs": 3}]
)
def test_cache_is_not_used_for_anything_else(cached, change):
    make, folder = cached
    make().prepare()
    make(**change).prepare()
    assert len(os.listdir(folder)) == 6


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "pickle", "shape", "values"])
@pytest.mark.parametrize("kind", ["documents", "starts", "windows"])
def test_damaged_cache_is_drawn_again_with_a_warning(cached, kind, how, caplog):
    make, folder = cached
    expected = texts(make(), 60)
    (file,) = folder.glob(f"*-megatron-{kind}-*")
    good = file.read_bytes()
    array = np.load(file)
    swapped = np.concatenate([array[:1], array[:0:-1]]) if kind == "starts" else array * 0
    changed = {"pickle": np.array([{}], object), "shape": array[:-1], "values": swapped}
    plain = {"truncated": good[:-5], "empty": b"", "text": b"hello"}
    file.write_bytes(plain[how]) if how in plain else np.save(file, changed[how], allow_pickle=True)
    assert texts(make(), 60) == expected
    assert "rebuilding the index cache" in caplog.text and file.read_bytes() == good


@pytest.mark.parametrize("shift", [-1, 1, 10**6])
def test_damage_that_no_cheap_check_sees_stops_the_run(cached, shift):
    make, folder = cached
    make().prepare()
    (file,) = folder.glob("*-megatron-starts-*")
    starts = np.load(file)
    row = next(k for k in range(5, len(starts)) if starts[k, 1] > 0)
    starts[row, 1] += shift
    np.save(file, starts)
    dataset = make()
    with pytest.raises(ValueError, match=r"(window of [46] tokens, not 5|of sequence .*); the index cache in .*index-cache is damaged"):
        texts(dataset, 60)


def test_without_a_writable_folder_the_order_stays_in_memory(cached, tmp_path, caplog):
    make, _ = cached
    (tmp_path / "file").write_text("not a folder")
    assert texts(make(cache_path=tmp_path / "file"), 60) == texts(make(), 60) and "--data-cache-path" in caplog.text
