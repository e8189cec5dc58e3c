"""Saving and loading: what comes back, what is refused, what is deleted when."""

import json
import os
import shutil
from collections import namedtuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.checkpoint import files, load, manager
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager


def tensors(value=1.0):
    return {"model.w": torch.full((4, 3), value), "model.b": torch.arange(3.0) * value, "optimizer.step.w": torch.tensor(value)}


def names_in(directory):
    return sorted(os.listdir(directory))


# ---------------------------------------------------------------- round trips


def test_one_process_without_a_group_saves_and_loads(tmp_path):
    path = CheckpointManager(tmp_path).save(100, tensors(2.0), {"consumed_samples": 800})
    assert names_in(tmp_path) == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "100"
    found = find_checkpoint(tmp_path)
    assert (found.path, found.iteration, found.meta, found.notes) == (path, 100, {"consumed_samples": 800}, ())
    target = tensors(0.0)
    assert load_tensors(path, target) == 3
    assert all(torch.equal(target[name], saved) for name, saved in tensors(2.0).items())


def test_manifest_lists_tensors_and_files(tmp_path):
    path = CheckpointManager(tmp_path).save(7, tensors(), {"note": "x"})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and manifest["iteration"] == 7 and manifest["world_size"] == 1
    assert manifest["tensors"]["model.w"] == {"shape": [4, 3], "dtype": "float32"}
    assert manifest["tensors"]["optimizer.step.w"] == {"shape": [], "dtype": "float32"}
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp"]
    assert manifest["files"][".metadata"]["size"] == (path / ".metadata").stat().st_size


def _save_and_load_on_two_ranks(directory):
    rank = dist.get_rank()
    mine = {"model.shared": torch.full((5,), 3.0), f"model.stage{rank}": torch.full((2,), float(rank))}
    path = CheckpointManager(directory).save(10, mine, {"rank": rank})
    target = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    found = find_checkpoint(directory)
    load_tensors(found.path, target)
    return found.meta, found.path == path, all(torch.equal(target[name], mine[name]) for name in mine)


@pytest.mark.distributed
def test_two_ranks_with_tensors_of_their_own_save_and_load(tmp_path):
    assert run_distributed(_save_and_load_on_two_ranks, 2, tmp_path) == [({"rank": 0}, True, True)] * 2
    manifest = files.read_manifest(tmp_path / "iter_0000010")
    assert manifest.world_size == 2
    assert sorted(manifest.tensors) == ["model.shared", "model.stage0", "model.stage1"]
    assert sorted(manifest.files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def _ranks_disagree(directory):
    try:
        CheckpointManager(directory).save(1, {"model.w": torch.zeros(2 + dist.get_rank())}, {})
    except CheckpointError as error:
        return str(error)


@pytest.mark.distributed
def test_one_name_with_two_shapes_is_refused_on_every_rank(tmp_path):
    first, second = run_distributed(_ranks_disagree, 2, tmp_path)
    assert first == second and "model.w is {'shape': [3]" in first
    assert names_in(tmp_path) == []


def test_only_tensors_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.lr is a float; a checkpoint holds tensors"):
        CheckpointManager(tmp_path).save(1, {"model.lr": 0.1}, {})


def test_meta_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        CheckpointManager(tmp_path / "run").save(1, tensors(), {"dtype": torch.float32})
    assert names_in(tmp_path) == []


# ---------------------------------------------------------------- what does not fit


def test_missing_extra_shape_and_dtype_are_listed_together_and_nothing_is_read(tmp_path):
    path = CheckpointManager(tmp_path).save(1, tensors() | {"model.old": torch.zeros(1), "model.h": torch.zeros(2)}, {})
    target = {"model.w": torch.zeros(4, 2), "model.b": torch.zeros(3), "model.h": torch.zeros(2).bfloat16(), "model.new": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_tensors(path, target)
    lines = str(caught.value).splitlines()
    assert lines[0] == "iter_0000001 does not fit, nothing was loaded:"
    assert lines[1:] == [
        "  shape    model.w: [4, 3] in the checkpoint, [4, 2] now",
        "  dtype    model.h: float32 in the checkpoint, bfloat16 now",
        "  missing  model.new: not in the checkpoint",
        "  extra    model.old: in the checkpoint, not in this model",
    ]
    assert target["model.b"].sum() == 0


def test_long_lists_of_differences_are_cut_at_ten(tmp_path):
    path = CheckpointManager(tmp_path).save(1, tensors(), {})
    with pytest.raises(CheckpointError, match=r"\.\.\. and 5 more"):
        load_tensors(path, tensors() | {f"model.n{i}": torch.zeros(1) for i in range(15)})


def test_optimizer_may_be_left_alone_but_a_part_of_the_model_may_not(tmp_path):
    path = CheckpointManager(tmp_path).save(1, tensors(), {})
    assert load_tensors(path, {"model.w": torch.zeros(4, 3), "model.b": torch.zeros(3)}) == 2
    with pytest.raises(CheckpointError, match=r"extra    model\.b"):
        load_tensors(path, {"model.w": torch.zeros(4, 3)})
    assert load_tensors(path, {"model.w": torch.zeros(4, 3)}, complete=()) == 1


def test_tensors_that_were_not_restored_are_counted(tmp_path):
    path = CheckpointManager(tmp_path).save(1, tensors(), {})
    with mock.patch.object(load.dcp, "load"):  # a load that returns and has done nothing
        with pytest.raises(CheckpointError, match="restored 0 of 3 tensors"):
            load_tensors(path, tensors())


# ---------------------------------------------------------------- the same iteration again


def test_saving_the_same_iteration_again_keeps_the_first(tmp_path, caplog):
    saves = CheckpointManager(tmp_path)
    path = saves.save(5, tensors(1.0), {})
    before = (path / "__0_0.distcp").stat()
    assert saves.save(5, tensors(2.0), {}) == path
    assert (path / "__0_0.distcp").stat() == before
    assert "exists and is intact: kept" in caplog.text


def test_other_tensors_under_the_same_iteration_are_an_error(tmp_path):
    saves = CheckpointManager(tmp_path)
    path = saves.save(5, tensors(), {})
    with pytest.raises(CheckpointError, match=f"{path.name} holds a checkpoint of other tensors and is not overwritten"):
        saves.save(5, {"model.w": torch.zeros(9)}, {})
    assert load_tensors(path, tensors()) == 3


def test_damaged_checkpoint_is_moved_aside_when_its_iteration_is_reached_again(tmp_path):
    saves = CheckpointManager(tmp_path)
    path = saves.save(5, tensors(1.0), {})
    os.truncate(path / "__0_0.distcp", 100)
    saves.save(5, tensors(2.0), {})
    target = tensors(0.0)
    load_tensors(find_checkpoint(tmp_path).path, target)
    assert target["model.w"][0, 0] == 2.0
    assert any(".damaged-" in name for name in names_in(tmp_path))


# ---------------------------------------------------------------- keeping the last ones


@pytest.mark.parametrize("keep_last", [1, 2])
def test_keep_last_counts_the_new_one(tmp_path, keep_last):
    saves = CheckpointManager(tmp_path, keep_last=keep_last)
    for iteration in (10, 20, 30):
        saves.save(iteration, tensors(), {})
    assert files.iterations_in(tmp_path) == [10, 20, 30][-keep_last:]


def test_older_ones_are_deleted_only_after_the_commit(tmp_path):
    saves = CheckpointManager(tmp_path, keep_last=1)
    saves.save(10, tensors(), {})
    with mock.patch.object(manager, "write_manifest", side_effect=OSError(5, "Input/output error")):
        with pytest.raises(CheckpointError, match="Input/output error"):
            saves.save(20, tensors(), {})
    assert names_in(tmp_path) == ["iter_0000010", "latest_checkpointed_iteration.txt"]
    with mock.patch.object(manager, "remove_directory", side_effect=lambda path: order.append(find_checkpoint(tmp_path).iteration)):
        order = []
        saves.save(30, tensors(), {})
    assert order == [30]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saves = CheckpointManager(tmp_path, keep_last=2)
    saves.save(10, tensors(), {})
    os.truncate(saves.save(20, tensors(), {}) / "__0_0.distcp", 10)
    saves.save(30, tensors(), {})
    assert files.iterations_in(tmp_path) == [10, 20, 30]


def test_going_back_in_iterations_never_deletes_what_was_just_written(tmp_path):
    CheckpointManager(tmp_path).save(50, tensors(), {})
    CheckpointManager(tmp_path, keep_last=1).save(20, tensors(), {})
    assert files.iterations_in(tmp_path) == [20]


# ---------------------------------------------------------------- the disk


def test_too_little_space_is_said_before_writing(tmp_path):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 5_000_000)
    big = {"model.w": torch.zeros(2_000_000)}  # 8 MB
    with mock.patch.object(shutil, "disk_usage", return_value=usage), pytest.raises(CheckpointError) as caught:
        CheckpointManager(tmp_path).save(1, big, {})
    assert "is full: 0.005 GB free, the checkpoint needs 0.009 GB" in str(caught.value)
    assert names_in(tmp_path) == []


@pytest.mark.fault
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("enforce fail: unexpected pos 704 vs 598")])
def test_disk_full_while_writing_is_translated(tmp_path, error):
    saves = CheckpointManager(tmp_path)
    saves.save(1, tensors(), {})
    with mock.patch("torch.distributed.checkpoint.filesystem._write_item", side_effect=error):
        with pytest.raises(CheckpointError, match=r"the disk of .* is full: .* GB free, the checkpoint needs 0.001 GB"):
            saves.save(2, tensors(), {})
    assert files.iterations_in(tmp_path) == [1]
    assert not files.leftovers_in(tmp_path)
