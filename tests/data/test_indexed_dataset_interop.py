"""Our files and NVIDIA Megatron-Core's are the same files. Needs megatron-core beside torch; not a dependency."""

import importlib.util

import numpy as np
import pytest

from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_moe.data.megatron_order import MegatronDataset

DOCUMENTS = [[1, 2, 3], [65000], [4, 5], [0] * 50]


@pytest.fixture(scope="module")
def theirs():
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed")
    try:
        from megatron.core.datasets import indexed_dataset
    except Exception as error:  # it imports GPU libraries on the way
        pytest.skip(f"megatron-core cannot be imported here: {type(error).__name__}: {error}")
    return indexed_dataset


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_reads_what_we_write(theirs, tmp_path, dtype):
    prefix = str(tmp_path / "ours")
    with IndexedDatasetWriter(prefix, dtype, {"fingerprint": "ours"}) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    dataset = theirs.IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4] and dataset[0].dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_core_writes_and_the_bytes_are_equal(theirs, tmp_path, dtype):
    import torch

    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedDatasetWriter(str(tmp_path / "ours"), dtype) as writer:
        for document in DOCUMENTS:
            builder.add_document(torch.tensor(document), [len(document)])
            writer.add_document(document)
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(str(tmp_path / "theirs"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_we_read_multimodal_files_of_megatron_core(theirs, tmp_path):
    import torch

    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=0)
    builder.add_item(torch.tensor([3]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(str(tmp_path / "theirs"))
    assert [d.tolist() for d in (dataset[0], dataset[1])] == [[1, 2], [3]] and dataset.document_indices.tolist() == [0, 2]


@pytest.mark.parametrize("samples", [1, 30, 31, 55, 200])
def test_samples_in_megatrons_order_are_those_of_megatron_core(theirs, tmp_path, samples):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    with IndexedDatasetWriter(str(tmp_path / "x"), np.uint16) as writer:
        for d in range(40):
            writer.add_document(np.arange(d, d + (d * 7) % 13))  # 0 to 12 tokens, so empty ones too
    config = GPTDatasetConfig(
        random_seed=77, sequence_length=8, blend=([str(tmp_path / "x")], None), split="1", path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, tokenizer=_Tokenizer(),
    )  # fmt: skip
    documents = np.arange(3, 40, dtype=np.int32)
    peer = GPTDataset(theirs.IndexedDataset(str(tmp_path / "x")), str(tmp_path / "x"), documents, samples, Split.train, config)
    ours = MegatronDataset(IndexedDataset(str(tmp_path / "x")), (3, 40), 8, 77, "train", samples=samples)
    order = ours._order(0)
    for mine, other in zip(order, (peer.document_index, peer.sample_index, peer.shuffle_index)):
        assert mine.tolist() == other.tolist()
    for i in range(samples):
        text = ours[i]["text"]
        assert (text[:-1].tolist(), text[1:].tolist()) == (peer[i]["tokens"].tolist(), peer[i]["labels"].tolist())


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1.0] * 9, list(range(1, 14))])
def test_blends_choose_as_megatron_core_does(theirs, weights):
    from megatron.core.datasets import helpers

    share = np.array(weights, np.float64) / np.sum(weights)
    which, inner = np.zeros(3000, np.int16), np.zeros(3000, np.int64)
    helpers.build_blending_indices(which, inner, share, len(weights), 3000, False)
    mix = BlendedDataset([range(9)] * len(weights), weights)
    assert [mix.locate(i) for i in range(3000)] == list(zip(which.tolist(), inner.tolist()))


class _Tokenizer:
    """What their dataset asks of one."""

    unique_identifiers = {"name": "none"}
    vocab_size, eod, pad = 65002, 65000, 65001
