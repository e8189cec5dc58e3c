"""Our files and NVIDIA Megatron-Core's are the same files. Needs megatron-core beside torch; not a dependency."""

import importlib.util

import numpy as np
import pytest

from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

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
