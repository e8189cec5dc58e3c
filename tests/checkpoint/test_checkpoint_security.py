"""A checkpoint from a stranger: nothing in it is executed, whatever the environment says."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_moe.checkpoint.files import CheckpointError, read_manifest, write_manifest
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.safe_reader import SafePlanner, SafeReader


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.fixture(params=["", "1"], ids=["default", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"])
def environment(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", request.param)


@pytest.fixture
def checkpoint(tmp_path):
    return CheckpointManager(tmp_path / "run").save(1, {"model.w": torch.ones(3)}, {})


def test_the_attack_works_on_plain_torch(tmp_path):
    """Otherwise the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "flag")))
    assert (tmp_path / "flag").exists()


@pytest.mark.usefixtures("environment")
def test_evil_metadata_is_refused_by_name_and_not_executed(tmp_path, checkpoint):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "flag")))
    with pytest.raises(CheckpointError, match=r"would import posix\.system"):
        load_tensors(checkpoint, {"model.w": torch.zeros(3)})
    assert not (tmp_path / "flag").exists()


@pytest.mark.usefixtures("environment")
def test_evil_tensor_entry_is_refused_and_not_executed(tmp_path, checkpoint):
    """The slice that should hold a tensor holds another pickle."""
    metadata = SafeReader(checkpoint).read_metadata()
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "flag"), evil)
    (checkpoint / "__0_0.distcp").write_bytes(evil.getvalue())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(evil.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="damaged, or are not a tensor; nothing was executed"):
        load_tensors(checkpoint, {"model.w": torch.zeros(3)})
    assert not (tmp_path / "flag").exists()


@pytest.mark.usefixtures("environment")
def test_evil_object_entry_is_refused_before_and_while_reading(tmp_path):
    path = tmp_path / "iter_0000001"
    dcp.save({"model.w": Evil(tmp_path / "flag")}, storage_writer=FileSystemWriter(path), no_dist=True)
    with pytest.raises(CheckpointError, match=r"kind +model\.w: a pickled object in the checkpoint, a tensor now"):
        load_tensors(path, {"model.w": torch.zeros(3)})
    assert isinstance(SafeReader(path).read_metadata().state_dict_metadata["model.w"], BytesStorageMetadata)
    with pytest.raises(BaseException, match="is a pickled object, not a tensor"):  # the second line of defence
        dcp.load({"model.w": torch.zeros(3)}, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)
    assert not (tmp_path / "flag").exists()


def test_files_outside_the_checkpoint_are_not_read(checkpoint):
    metadata = SafeReader(checkpoint).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        load_tensors(checkpoint, {"model.w": torch.zeros(3)})


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps([1, 2])], ids=["empty", "cut", "a list"])
def test_damaged_metadata_is_an_error_of_ours(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: (cut off or damaged|holds a list)"):
        load_tensors(checkpoint, {"model.w": torch.zeros(3)})


def test_checkpoints_of_every_common_dtype_pass_the_allowlist(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    saved = {f"model.{i}": torch.ones(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    path = CheckpointManager(tmp_path).save(1, saved, {})
    target = {name: torch.zeros(2, 3).to(tensor.dtype) for name, tensor in saved.items()}
    load_tensors(path, target)
    assert all(torch.equal(target[name].double(), tensor.double()) for name, tensor in saved.items())


def test_forged_manifest_names_stay_inside_the_directory(checkpoint):
    manifest = read_manifest(checkpoint)
    manifest.files["../other"] = {"size": 1, "crc32": 0}
    write_manifest(checkpoint, manifest)
    with pytest.raises(CheckpointError, match="outside the checkpoint directory"):
        read_manifest(checkpoint)
