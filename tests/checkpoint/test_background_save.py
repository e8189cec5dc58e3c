"""Saving in the background: what is written is what was there when the save began, and nothing of a save that failed stays."""

import os
import threading
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.checkpoint import FileSystemWriter, filesystem
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_moe.checkpoint import files
from megatron_moe.checkpoint.background import BackgroundSave, Stager
from megatron_moe.checkpoint.files import CheckpointError, read_manifest
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager

pytestmark = pytest.mark.distributed


def group_of_saves() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", group_desc="checkpoint saves")


def state_of_a_rank() -> dict[str, torch.Tensor]:
    """Sharded, unevenly sharded, replicated, of this rank alone, scalar, transposed; of every dtype that training has."""
    mesh, rank = dist.init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    whole = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    return {
        "model.sharded": distribute_tensor(whole.clone(), mesh, [Shard(0)]),
        "model.bf16": distribute_tensor(whole.bfloat16(), mesh, [Shard(1)]),
        "model.fp16": distribute_tensor(whole.half(), mesh, [Replicate()]),
        "model.transposed": whole.double().t().clone(memory_format=torch.preserve_format),
        f"model.of_rank{rank}": torch.full((5,), float(rank)),
        "optimizer.step.sharded": torch.tensor(3.0),
    }


def values_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


class Disk:
    """Writes nothing before it is told to."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()
        write = FileSystemWriter.write_data

        def write_data(writer, plan, planner):
            self.reached.set()
            assert self.go.wait(60), "nobody has let the disk go on"
            return write(writer, plan, planner)

        self.patch = mock.patch.object(FileSystemWriter, "write_data", write_data)


def _train_during_a_save(directory) -> tuple[bool, bool, dict, dict]:
    """Steps that overwrite every tensor, and collectives of their own, while the disk stands still."""
    tensors = state_of_a_rank()
    before, disk = values_of(tensors), Disk()
    CheckpointManager(directory / "sync").save(10, tensors, {"n": 1})
    manager = CheckpointManager(directory / "async", group_of_saves())
    stager = Stager()
    with disk.patch:
        save = BackgroundSave(manager, stager, 10, tensors, {"n": 1})
        assert disk.reached.wait(60)
        for _ in range(5):
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
            dist.all_reduce(torch.ones(1))
        was_over = save.is_over
        disk.go.set()
        save.conclude()
    loaded = state_of_a_rank()
    load_tensors(find_checkpoint(directory / "async").path, loaded)
    after = values_of(loaded)
    BackgroundSave(manager, stager, 15, tensors, {"n": 2}).conclude()  # the stager's memory is used again
    load_tensors(find_checkpoint(directory / "async").path, loaded)
    is_second_right = all(torch.equal(t, values_of(tensors)[name]) for name, t in values_of(loaded).items())
    manifests = [read_manifest(directory / kind / "iter_0000010") for kind in ("sync", "async")]
    return was_over, is_second_right, {n: torch.equal(t, before[n]) for n, t in after.items()}, [vars(m) for m in manifests]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_written_is_what_was_there_and_steps_go_on_while_the_disk_stands_still(tmp_path, ranks):
    for was_over, is_second_right, is_equal, (sync, in_background) in run_distributed(_train_during_a_save, ranks, tmp_path):
        assert not was_over and is_second_right
        assert len(is_equal) == 6 and all(is_equal.values()), is_equal
        assert {k: v for k, v in sync.items() if k != "files"} == {k: v for k, v in in_background.items() if k != "files"}
        shards = lambda manifest: {name: entry for name, entry in manifest["files"].items() if name != ".metadata"}  # noqa: E731
        assert shards(sync) == shards(in_background), "not the same bytes as a save that waits"
        assert len(shards(sync)) == ranks


# ---------------------------------------------------------------- failures

_DISK_FULL = OSError(28, "No space left on device")
FAILURES = [
    (1, "torch.distributed.checkpoint.filesystem._write_item", _DISK_FULL, "the disk of "),
    (1, "torch.distributed.checkpoint.filesystem._write_item", OSError(5, "Input/output error"), "rank 1: OSError: "),
    (1, "megatron_moe.checkpoint.manager.describe_file", OSError(5, "Input/output error"), "failed on rank 1: OSError"),
    (1, "megatron_moe.checkpoint.manager._check_visible", CheckpointError("is not there"), "failed on rank 1: is not there"),
    (1, "megatron_moe.checkpoint.background.Stager._copy", MemoryError("no room for the copy"), "rank 1: MemoryError: no room"),
    (0, "pathlib.Path.mkdir", PermissionError(13, "Permission denied"), "PermissionError: "),
    (0, "megatron_moe.checkpoint.manager.write_manifest", _DISK_FULL, "No space left"),
    (0, "os.rename", OSError(5, "Input/output error"), "OSError: "),
]


def _fail_in_every_way(directory) -> list[tuple[str | None, list[str]]]:
    """Each failure on its rank, one save after the other, and a save that works at the end."""
    manager, stager, told = CheckpointManager(directory, group_of_saves()), Stager(), []
    manager.save(5, {"model.w": torch.zeros(8)}, {})
    for rank, target, error, _ in [*FAILURES, (0, "", None, "")]:
        dist.barrier()
        with ExitStack() as patched:
            if target and rank == dist.get_rank():
                patched.enter_context(mock.patch(target, side_effect=error))
            try:
                BackgroundSave(manager, stager, 10, {"model.w": torch.ones(8), f"model.own{dist.get_rank()}": torch.ones(4)}, {}).conclude()
                told.append(("", sorted(os.listdir(directory))))
            except CheckpointError as error:
                dist.barrier()  # rank 0 removes what there is of it
                told.append((str(error), sorted(os.listdir(directory))))
    return told


@pytest.mark.fault
def test_failure_on_one_rank_is_raised_on_both_publishes_nothing_and_the_next_save_works(tmp_path):
    first, second = run_distributed(_fail_in_every_way, 2, tmp_path, timeout=60)
    assert [text for text, _ in first] == [text for text, _ in second]
    for (text, left), (*_, what) in zip(first, FAILURES):
        assert what in text, text
        assert left == ["iter_0000005", files.TRACKER], f"{text} left {left}"
    assert first[-1] == ("", ["iter_0000005", "iter_0000010", files.TRACKER])
    assert find_checkpoint(tmp_path).iteration == 10


def _save_the_same_twice(directory) -> list[str]:
    """The last exception is of a checkpoint of other tensors."""
    manager, stager, tensors = CheckpointManager(directory, group_of_saves()), Stager(), {"model.w": torch.zeros(8)}
    for _ in range(2):
        BackgroundSave(manager, stager, 10, tensors, {}).conclude()
    try:
        BackgroundSave(manager, stager, 10, {"model.other": torch.zeros(8)}, {}).conclude()
    except CheckpointError as error:
        return [str(error), *sorted(os.listdir(directory))]


def test_iteration_that_is_there_is_kept_and_never_replaced_by_another(tmp_path):
    for text, *left in run_distributed(_save_the_same_twice, 2, tmp_path):
        assert "holds a checkpoint of other tensors" in text and left == ["iter_0000010", files.TRACKER]


# ---------------------------------------------------------------- the copy


def _save_beside_a_device(directory) -> None:
    """As torch does it where there is a GPU, without one."""
    stream = mock.Mock(side_effect=AssertionError("what is written lies on the host: no stream is asked for"))
    with mock.patch.object(torch.cuda, "is_available", return_value=True), mock.patch.object(filesystem, "_OverlappingCpuLoader", stream):
        BackgroundSave(CheckpointManager(directory, group_of_saves()), Stager(), 10, {"model.w": torch.ones(8)}, {}).conclude()


def test_nothing_is_asked_of_a_device_in_the_background(tmp_path):
    run_distributed(_save_beside_a_device, 1, tmp_path)
    assert find_checkpoint(tmp_path).iteration == 10


def test_copy_is_made_once_and_its_memory_used_again():
    stager, w = Stager(), torch.nn.Parameter(torch.ones(3, 4).t())
    first = stager.stage({"w": w})["w"]
    assert first.data_ptr() != w.data_ptr() and torch.equal(first, w) and not first.requires_grad and first.stride() == w.stride()
    with torch.no_grad():
        w.add_(1)
    assert first[0, 0] == 1
    assert stager.stage({"w": w})["w"] is first and first[0, 0] == 2
    longer = stager.stage({"w": torch.ones(5)})["w"]
    assert longer.shape == (5,)
    stager.close()
    assert not stager._buffers


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="needs an NVIDIA GPU of compute capability 9 or newer",
)
def test_copy_of_a_device_is_pinned_and_whole_when_the_next_step_begins():
    stager, w = Stager(), torch.ones(1 << 24, device="cuda")
    for value in (1.0, 3.0):
        copy = stager.stage({"w": w})["w"]
        w.add_(2)
        assert copy.is_pinned() and (copy == value).all()
