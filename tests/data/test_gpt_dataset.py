"""Windows over documents, their order, and the cache of orders."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.data import plain_sum
from megatron_moe.data import gpt_dataset, index_cache
from megatron_moe.data.gpt_dataset import GPTDataset, epoch_order, split_ranges
from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter


def write(prefix, sizes, first=0):
    """Documents of these sizes whose tokens count up."""
    with IndexedDatasetWriter(str(prefix), "int32") as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size))
            first += size
    return IndexedDataset(str(prefix))


def texts(dataset, count):
    return [dataset[i]["text"].tolist() for i in range(count)]


@pytest.mark.parametrize(
    "split, count, bounds",
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("98,2,0", 7, [0, 7, 7, 7]),
        ("33.3,33.3,33.3", 10, [0, 4, 7, 10]),
        ("969/30/1", 1000, [0, 969, 999, 1000]),
        ("1", 5, [0, 5, 5, 5]),
        ("50,50", 3, [0, 1, 3, 3]),  # 1.5 rounds to 2 twice: one too many, taken from all boundaries
        ("0,1,1", 3, [0, 0, 1, 3]),  # there Megatron would begin validation at -1
    ],
)
def test_split_is_rounded_as_megatron_does(split, count, bounds):
    assert split_ranges(split, count) == bounds


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda s: sum(s) > 1e-3), st.integers(0, 10**6))
def test_splits_cover_everything_once(shares, count):
    bounds = split_ranges(",".join(map(str, shares)), count)
    assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(bounds)


def test_shares_are_summed_from_left_to_right_under_every_python():
    assert plain_sum([0.1] * 10) == 0.9999999999999999  # from 3.12 on `sum` says 1.0


def test_windows_overlap_by_one_token(tmp_path):
    dataset = GPTDataset(write(tmp_path / "x", [5, 3, 4]), (0, 3), 4, seed=1, split_name="train", shuffle=False)
    assert len(dataset) == 2
    assert texts(dataset, 3) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert dataset[0]["text"].dtype == np.int64 and dataset[7]["sample_id"] == 7


def oracle_windows(documents, seq_length):
    """Megatron's walk, document by document and token by token."""
    windows, document, offset = [], 0, 0
    total = sum(map(len, documents))
    for _ in range((total - 1) // seq_length):
        window = []
        d, o = document, offset
        while len(window) < seq_length + 1:
            if o < len(documents[d]):
                window.append(documents[d][o])
                o += 1
                if len(window) == seq_length:
                    following = (d, o)
            else:
                d, o = d + 1, 0
        windows.append(window)
        document, offset = following
    return windows


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), seq_length=st.integers(1, 6), data=st.data())
def test_windows_equal_a_walk_over_the_documents(tmp_path_factory, sizes, seq_length, data):
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first + 1, len(sizes)))
    indexed = write(tmp_path_factory.mktemp("walk") / "x", sizes)
    windows = oracle_windows([indexed[i].tolist() for i in range(first, last)], seq_length)
    if not windows:
        with pytest.raises(ValueError, match="--seq-length"):
            GPTDataset(indexed, (first, last), seq_length, 3, "train")
        return
    plain = GPTDataset(indexed, (first, last), seq_length, 3, "train", shuffle=False)
    assert texts(plain, len(windows)) == windows
    shuffled = GPTDataset(indexed, (first, last), seq_length, 3, "train")
    assert sorted(texts(shuffled, len(windows))) == sorted(windows)


def test_every_epoch_has_all_windows_in_an_order_of_its_own(tmp_path):
    dataset = GPTDataset(write(tmp_path / "x", [101]), (0, 1), 4, seed=1, split_name="train")
    first, second = texts(dataset, 25), [dataset[25 + i]["text"].tolist() for i in range(25)]
    assert sorted(first) == sorted(second) and first != second


def test_order_depends_on_nothing_but_seed_and_epoch(tmp_path):
    indexed = write(tmp_path / "x", [30, 71])
    a = GPTDataset(indexed, (0, 2), 4, seed=1, split_name="train")
    b = GPTDataset(indexed, (0, 2), 4, seed=1, split_name="train", cache_path=tmp_path / "elsewhere")
    forwards = texts(a, 80)
    assert [b[i]["text"].tolist() for i in reversed(range(80))] == forwards[::-1]
    assert [b[i]["text"].tolist() for i in (60, 3, 77, 0)] == [forwards[i] for i in (60, 3, 77, 0)]
    assert texts(GPTDataset(indexed, (0, 2), 4, seed=2, split_name="train"), 25) != forwards[:25]


def test_order_is_golden():
    """If this changes, every run that is being resumed changes its data."""
    assert epoch_order(1234, 0, 10).tolist() == GOLDEN_ORDER
    assert epoch_order(1234, 1, 10).tolist() != GOLDEN_ORDER


GOLDEN_ORDER = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0]


def test_too_few_tokens_says_how_many(tmp_path):
    with pytest.raises(ValueError, match=r"valid split .* has 4 tokens in 1 documents, and one sample takes --seq-length \+ 1 = 5"):
        GPTDataset(write(tmp_path / "x", [9, 4]), (1, 2), 4, 1, "valid")


def test_negative_samples_do_not_exist(tmp_path):
    with pytest.raises(IndexError):
        GPTDataset(write(tmp_path / "x", [9]), (0, 1), 4, 1, "train")[-1]


# ---------------------------------------------------------------- the cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Builds datasets that use the cache however small they are; returns (build, folder of the cache)."""
    monkeypatch.setattr(index_cache, "CACHE_FROM", 1)

    def build(sizes=(101,), **changes):
        arguments = {"document_range": (0, len(sizes)), "seq_length": 4, "seed": 1, "split_name": "train"}
        return GPTDataset(write(tmp_path / "x", sizes), **{**arguments, **changes})

    return build, tmp_path / "index-cache"


def test_order_comes_from_the_cache_when_it_is_there(cached, monkeypatch):
    build, folder = cached
    expected = texts(build(), 30)
    assert len(os.listdir(folder)) == 2  # two epochs were touched
    monkeypatch.setattr(gpt_dataset, "epoch_order", lambda *_: pytest.fail("drawn again"))
    assert texts(build(), 30) == expected


@pytest.mark.parametrize("change", ["data", "seq_length", "seed", "range"])
def test_cache_is_not_used_for_anything_else(cached, change):
    build, folder = cached
    texts(build((101, 101)), 1)
    other = {
        "data": lambda: build((100, 102)),  # same number of tokens and windows
        "seq_length": lambda: build((101, 101), seq_length=5),
        "seed": lambda: build((101, 101), seed=2),
        "range": lambda: build((101, 101), document_range=(0, 1)),
    }[change]()
    texts(other, 1)
    assert len(os.listdir(folder)) == 2


def spoil(content, how):
    wrong = {"short": np.zeros(3, np.uint32), "repeats": np.zeros(25, np.uint32), "pickle": np.array([{}], object)}
    return {"truncated": content[:-5], "empty": b"", "text": b"hello"}.get(how) if how not in wrong else wrong[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "short", "repeats", "pickle"])
def test_damaged_cache_is_rebuilt_with_a_warning(cached, how, caplog):
    build, folder = cached
    expected = texts(build(), 25)
    (file,) = folder.iterdir()
    good = file.read_bytes()
    bad = spoil(good, how)
    file.write_bytes(bad) if isinstance(bad, bytes) else np.save(file, bad, allow_pickle=True)
    assert texts(build(), 25) == expected
    assert "rebuilding the index cache" in caplog.text and file.read_bytes() == good


def test_without_a_writable_folder_orders_stay_in_memory(cached, tmp_path, caplog):
    build, _ = cached
    (tmp_path / "file").write_text("not a folder")
    dataset = build(cache_path=tmp_path / "file")
    assert sorted(texts(dataset, 25)) == sorted(texts(build(), 25)) and "--data-cache-path" in caplog.text


def test_at_most_two_epochs_are_kept(tmp_path):
    dataset = GPTDataset(write(tmp_path / "x", [21]), (0, 1), 4, 1, "train")
    for sample in (0, 5, 10, 3, 30, 26):
        dataset[sample]
        assert len(dataset._orders) <= 2
    assert pickle.loads(pickle.dumps(dataset))[7]["text"].tolist() == dataset[7]["text"].tolist()
