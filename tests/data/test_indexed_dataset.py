"""The .bin/.idx pair: bytes, round trips, every kind of damage, merging."""

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe.data.indexed_dataset import DTYPES, IndexedDataset, IndexedDatasetWriter, best_dtype, merge

# documents [1, 2, 3] and [4, 5] as uint16, written out by hand
GOLDEN_BIN = bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + b"\x01\0\0\0\0\0\0\0"  # version
    + b"\x08"  # uint16
    + b"\x02\0\0\0\0\0\0\0"  # sequences
    + b"\x03\0\0\0\0\0\0\0"  # entries of the document index
    + b"\x03\0\0\0\x02\0\0\0"  # sizes
    + b"\0\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0"  # pointers
    + b"\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"  # document index
)


@pytest.fixture
def golden(tmp_path):
    (tmp_path / "golden.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "golden.idx").write_bytes(GOLDEN_IDX)
    return str(tmp_path / "golden")


def write(prefix, documents, dtype="uint16", meta=None):
    with IndexedDatasetWriter(str(prefix), dtype, meta) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_writer_makes_the_golden_bytes(tmp_path):
    write(tmp_path / "ours", [[1, 2, 3], [4, 5]])
    assert (tmp_path / "ours.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "ours.idx").read_bytes() == GOLDEN_IDX


def test_reader_understands_the_golden_bytes(golden):
    dataset = IndexedDataset(golden)
    assert read(golden) == [[1, 2, 3], [4, 5]]
    assert dataset.dtype == np.uint16 and dataset.num_tokens == 5 and dataset.num_documents == 2
    assert dataset.sizes.tolist() == [3, 2] and dataset.document_indices.tolist() == [0, 1, 2]


def test_parts_of_a_sequence_and_what_is_outside_of_it(golden):
    dataset = IndexedDataset(golden)
    assert dataset.get(0, 1, 2).tolist() == [2, 3] and dataset.get(0, 3).tolist() == [] and dataset[-1].tolist() == [4, 5]
    for arguments in [(2,), (-3,), (0, 2, 2), (0, -1, 1), (0, 0, -1)]:
        with pytest.raises(IndexError):
            dataset.get(*arguments)


def test_what_is_read_is_a_copy_that_outlives_the_dataset(golden):
    dataset = IndexedDataset(golden)
    tokens = dataset[0]
    del dataset
    tokens[0] = 9
    assert tokens.tolist() == [9, 2, 3] and read(golden)[0] == [1, 2, 3]


def test_trailing_modes_of_multimodal_files_are_read_over(golden):
    with open(golden + ".idx", "ab") as file:
        file.write(b"\0\0")
    assert read(golden) == [[1, 2, 3], [4, 5]]


def test_pickle_carries_the_name_and_not_the_contents(golden):
    packed = pickle.dumps(IndexedDataset(golden))
    assert len(packed) < 500 and pickle.loads(packed)[1].tolist() == [4, 5]


def damaged(offset, layout, value):
    data = bytearray(GOLDEN_IDX)
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


DAMAGE = {
    "empty index": (b"", GOLDEN_BIN, "does not begin with the magic"),
    "foreign magic": (b"PK\x03\x04" + GOLDEN_IDX[4:], GOLDEN_BIN, "does not begin with the magic"),
    "legacy format": (b"TNTIDX\0\0" + GOLDEN_IDX[8:], GOLDEN_BIN, "legacy"),
    "header cut": (GOLDEN_IDX[:20], GOLDEN_BIN, "does not begin with the magic"),
    "version 2": (damaged(9, "<Q", 2), GOLDEN_BIN, "version 2"),
    "unknown dtype": (damaged(17, "<B", 99), GOLDEN_BIN, "type code 99"),
    "float64 dtype": (damaged(17, "<B", 6), GOLDEN_BIN, "type code 6"),
    "float32 dtype": (damaged(17, "<B", 7), GOLDEN_BIN, "type code 7"),
    "other dtype": (damaged(17, "<B", 4), GOLDEN_BIN, "pointer 1 is 6 where the sizes put it at 12"),
    "huge count": (damaged(18, "<Q", 2**62), GOLDEN_BIN, "take"),
    "count too small": (damaged(18, "<Q", 1), GOLDEN_BIN, "take"),
    "negative size": (damaged(34, "<i", -3), GOLDEN_BIN, "sequence 0 has -3 tokens"),
    "wrong size": (damaged(34, "<i", 4), GOLDEN_BIN, "pointer 1"),
    "wrong last size": (damaged(38, "<i", 3), GOLDEN_BIN, "the .bin has 10 bytes and the .idx describes 12"),
    "odd pointer": (damaged(50, "<q", 5), GOLDEN_BIN, "pointer 1 is 5"),
    "documents not from 0": (damaged(58, "<q", 1), GOLDEN_BIN, "document index"),
    "documents not to n": (damaged(74, "<q", 7), GOLDEN_BIN, "document index"),
    "documents fall": (damaged(66, "<q", 3), GOLDEN_BIN, "document index"),
    "index cut": (GOLDEN_IDX[:-1], GOLDEN_BIN, "81 bytes"),
    "index too long": (GOLDEN_IDX + b"\0", GOLDEN_BIN, "83 bytes"),
    "bin cut": (GOLDEN_IDX, GOLDEN_BIN[:-1], "the .bin has 9 bytes"),
    "bin empty": (GOLDEN_IDX, b"", "the .bin has 0 bytes"),
    "foreign bin": (GOLDEN_IDX, GOLDEN_BIN * 2, "the .bin has 20 bytes"),
    "no index": (None, GOLDEN_BIN, "does not exist"),
    "no bin": (GOLDEN_IDX, None, "does not exist"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_at_open_and_names_both_files_and_the_remedy(kind, tmp_path):
    index, tokens, reason = DAMAGE[kind]
    prefix = str(tmp_path / "corpus")
    for suffix, content in ((".idx", index), (".bin", tokens)):
        if content is not None:
            (tmp_path / f"corpus{suffix}").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        IndexedDataset(prefix)
    message = str(caught.value)
    assert reason in message, message
    assert prefix + ".idx" in message and prefix + ".bin" in message and "tools/preprocess_data.py" in message


def test_damaged_meta_file_is_named(golden):
    for content in ("{", "[1]"):
        with open(golden + ".meta.json", "w") as file:
            file.write(content)
        with pytest.raises(ValueError, match=r"golden\.meta\.json"):
            IndexedDataset(golden)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(sorted(DTYPES.values(), key=str)))
def test_any_documents_come_back_as_written(tmp_path, data, dtype):
    limits = np.iinfo(dtype)
    documents = data.draw(st.lists(st.lists(st.integers(int(limits.min), int(limits.max)), max_size=6), max_size=6))
    prefix = write(tmp_path / "any", documents, dtype)
    assert read(prefix) == documents
    assert IndexedDataset(prefix).num_documents == len(documents)


@pytest.mark.parametrize("token, dtype", [(70000, "uint16"), (65536, "uint16"), (-1, "uint16"), (2**31, "int32"), (128, "int8")])
def test_token_that_does_not_fit_is_refused_and_nothing_is_published(token, dtype, tmp_path):
    for tokens in ([1, token], np.array([1, token])):  # Megatron wraps arrays around: 70000 becomes 4464
        with pytest.raises(ValueError, match=f"token id {token} does not fit {dtype}"):
            write(tmp_path / "x", [[1, 2], tokens], dtype)
        assert os.listdir(tmp_path) == []


def test_fractions_and_float_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="whole numbers"):
        write(tmp_path / "x", [np.array([1.5])])
    with pytest.raises(ValueError, match="float32"):
        IndexedDatasetWriter(str(tmp_path / "x"), np.float32)


def test_an_error_while_writing_leaves_the_old_dataset(tmp_path):
    prefix = write(tmp_path / "x", [[7]], meta={"fingerprint": "a"})
    with pytest.raises(ValueError, match="does not fit"):
        write(prefix, [[8], [70000]])
    assert read(prefix) == [[7]] and len(os.listdir(tmp_path)) == 3


def test_a_crash_between_the_renames_never_shows_a_mixed_pair(tmp_path, monkeypatch):
    prefix = write(tmp_path / "x", [[7, 7]])
    real = os.replace

    def replace_all_but_the_index(source, target):
        if target.endswith(".idx"):
            raise OSError("power cut")
        real(source, target)

    writer = IndexedDatasetWriter(prefix, "uint16")
    writer.add_document([8, 9])  # as large as the old: the sizes alone would not tell
    monkeypatch.setattr(os, "replace", replace_all_but_the_index)
    with pytest.raises(OSError, match="power cut"):
        writer.end()
    with pytest.raises(ValueError, match="does not exist"):
        IndexedDataset(prefix)


def test_rewriting_without_meta_drops_the_old_meta(tmp_path):
    prefix = write(tmp_path / "x", [[7]], meta={"fingerprint": "a"})
    assert IndexedDataset(prefix).meta == {"fingerprint": "a", "documents": 1, "tokens": 1}
    write(prefix, [[8]])
    assert IndexedDataset(prefix).meta == {}


@pytest.mark.parametrize("vocab_size, dtype", [(257, np.uint16), (65499, np.uint16), (65500, np.int32), (200_000, np.int32)])
def test_best_dtype_follows_megatron(vocab_size, dtype):
    assert best_dtype(vocab_size) == dtype


def test_merge_equals_concatenation(tmp_path):
    parts = [[[1, 2], [3]], [], [[4, 5, 6], []]]
    prefixes = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    copied = []
    merge(prefixes, str(tmp_path / "merged"), copied.append)
    write(tmp_path / "at-once", [d for part in parts for d in part])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"at-once{suffix}").read_bytes()
    assert sum(copied) == 12


def test_merge_keeps_documents_of_several_sequences(tmp_path):
    prefix = str(tmp_path / "pairs")
    (tmp_path / "pairs.bin").write_bytes(GOLDEN_BIN)
    one_document = GOLDEN_IDX[:26] + struct.pack("<Q", 2) + GOLDEN_IDX[34:58] + struct.pack("<2q", 0, 2)
    (tmp_path / "pairs.idx").write_bytes(one_document)
    merge([prefix, prefix], str(tmp_path / "out"))
    out = IndexedDataset(str(tmp_path / "out"))
    assert out.document_indices.tolist() == [0, 2, 4] and out.sizes.tolist() == [3, 2, 3, 2]


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    a = write(tmp_path / "a", [[1]], meta={"fingerprint": "one"})
    b = write(tmp_path / "b", [[1]], meta={"fingerprint": "two"})
    wide = write(tmp_path / "wide", [[1]], "int32")
    out = str(tmp_path / "out")
    for prefixes, reason in (
        ([a, b], "different tokenizers"),
        ([a, wide], "int32"),
        ([], "nothing to merge"),
        ([a, out], "does not exist"),
    ):
        with pytest.raises(ValueError, match=reason):
            merge(prefixes, out)
    with pytest.raises(ValueError, match="also an input"):
        merge([a], a)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
    assert read(a) == [[1]]
