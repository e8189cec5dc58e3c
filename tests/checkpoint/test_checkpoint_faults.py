"""Damage, failing writers, full stops: nothing wrong is loaded, nothing right is lost, no rank waits for ever."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.checkpoint import files, manager
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.lock import DirectoryLock
from megatron_moe.checkpoint.manager import CheckpointManager

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory):
    """Checkpoints of iterations 5 and 10."""
    directory = tmp_path_factory.mktemp("sound")
    saves = CheckpointManager(directory)
    for iteration in (5, 10):
        saves.save(iteration, {"model.w": torch.full((64, 8), float(iteration))}, {"iteration": iteration})
    return directory


@pytest.fixture
def run(sound_run, tmp_path):
    return Path(shutil.copytree(sound_run, tmp_path / "run"))


# ---------------------------------------------------------------- damage on disk


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


DAMAGE = [
    ("__0_0.distcp", flip_bit, r"CRC-32 mismatch \([0-9a-f]{8} found, [0-9a-f]{8} expected\)"),
    ("__0_0.distcp", cut, r"size mismatch \(\d+ bytes found, \d+ expected\)"),
    ("__0_0.distcp", os.remove, r"missing \(\d+ bytes expected\)"),
    (".metadata", flip_bit, "CRC-32 mismatch"),
    (".metadata", empty, r"size mismatch \(0 bytes found"),
    ("manifest.json", lambda path: os.truncate(path, 50), "cut off or damaged"),
    ("manifest.json", os.remove, "missing, so this is not a checkpoint"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace('"iteration": 10', '"iteration": 11')), "its own CRC-32"),
    ("manifest.json", lambda path: path.write_text("[]"), "not a checkpoint manifest"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\x00"), "cut off or damaged"),
]


@pytest.mark.parametrize("name, damage, what", DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, name, damage, what):
    damage(run / "iter_0000010" / name)
    found = find_checkpoint(run)
    assert (found.iteration, found.meta) == (5, {"iteration": 5})
    (note,) = found.notes
    assert note.startswith(f"iter_0000010/{name}: ")
    assert note.endswith("; falling back to iter_0000005; pass --ckpt-step 10 --ckpt-verify off to insist")
    assert re.search(what, note)
    with pytest.raises(CheckpointError, match=what):
        find_checkpoint(run, step=10)


def test_explicit_step_does_not_fall_back_and_lists_what_there_is(run):
    assert find_checkpoint(run, step=5).iteration == 5
    with pytest.raises(CheckpointError, match=r"no checkpoint of iteration 7 in .*; there are 5, 10"):
        find_checkpoint(run, step=7)


def test_all_damaged_is_an_error_that_names_each(run):
    for iteration in (5, 10):
        flip_bit(run / files.iteration_name(iteration) / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(run)
    assert "iter_0000010/__0_0.distcp: CRC-32" in str(caught.value) and "iter_0000005/__0_0.distcp: CRC-32" in str(caught.value)


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            find_checkpoint(directory)


def test_verify_size_sees_lengths_and_verify_off_nothing(run):
    flip_bit(run / "iter_0000010" / "__0_0.distcp")
    assert find_checkpoint(run, verify="size").iteration == 10
    cut(run / "iter_0000010" / "__0_0.distcp")
    assert find_checkpoint(run, verify="size").iteration == 5
    assert find_checkpoint(run, verify="off").iteration == 10


def test_renamed_directory_is_not_taken_for_another_iteration(run):
    os.rename(run / "iter_0000010", run / "iter_0000020")
    found = find_checkpoint(run)
    assert found.iteration == 5 and "belongs to iter_0000010" in " ".join(found.notes)


def test_checkpoint_of_a_newer_format_says_so(run):
    with mock.patch.object(files, "FORMAT_VERSION", 2):
        manifest = files.read_manifest(run / "iter_0000010")
        files.write_manifest(run / "iter_0000010", manifest)
    with pytest.raises(CheckpointError, match="format 2 is newer than the 1 this version reads"):
        find_checkpoint(run, step=10)


@pytest.mark.parametrize("content", [b"5", b"15", b"garbage", b"\xff\xfe", b"", None])  # stale, dangling, torn, gone
def test_tracker_is_only_a_hint(run, content):
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.unlink() if content is None else tracker.write_bytes(content)
    found = find_checkpoint(run)
    assert found.iteration == 10
    assert "latest_checkpointed_iteration.txt" in found.notes[0]


def _find_on_a_rank(directory):
    return find_checkpoint(directory)


@pytest.mark.distributed
def test_all_ranks_find_the_same_checkpoint(run):
    flip_bit(run / "iter_0000010" / "__0_0.distcp")
    first, second = run_distributed(_find_on_a_rank, 2, run)
    assert first == second and first.iteration == 5


# ---------------------------------------------------------------- failing while saving


def _save_with(directory, rank, target, error):
    """Both ranks save; on one of them `target` fails. What each rank has seen."""
    patch = mock.patch(target, side_effect=error) if dist.get_rank() == rank else mock.MagicMock()
    saves = CheckpointManager(directory)
    try:
        with patch:
            saves.save(10, {"model.w": torch.zeros(8), f"model.own{dist.get_rank()}": torch.zeros(4)}, {})
    except CheckpointError as error:
        return str(error)


FAILURES = [
    (1, "torch.distributed.checkpoint.filesystem._write_item", OSError(5, "Input/output error"), "rank 1: OSError: .*Input/output error"),
    (1, "megatron_moe.checkpoint.manager.describe_file", OSError(5, "Input/output error"), "failed on rank 1: OSError"),
    (1, "megatron_moe.checkpoint.manager._check_visible", CheckpointError("is not there"), "failed on rank 1: is not there"),
    (0, "pathlib.Path.mkdir", PermissionError(13, "Permission denied"), "saving iter_0000010 failed: PermissionError: .*Permission denied"),
    (0, "megatron_moe.checkpoint.manager.write_manifest", OSError(28, "No space left on device"), "No space left"),
    (0, "os.rename", OSError(5, "Input/output error"), "saving iter_0000010 failed|rank 0: OSError"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("rank, target, error, what", FAILURES)
def test_failure_on_one_rank_is_raised_on_both_and_publishes_nothing(run, rank, target, error, what):
    shutil.rmtree(run / "iter_0000010")
    files.write_tracker(run, 5)
    before = sorted(os.listdir(run))
    first, second = run_distributed(_save_with, 2, run, rank, target, error, timeout=60)
    assert first == second and first is not None
    assert re.search(what, first), first
    assert sorted(os.listdir(run)) == before
    assert find_checkpoint(run).iteration == 5


def test_tracker_that_cannot_be_written_leaves_a_complete_checkpoint(run):
    with mock.patch.object(manager, "write_tracker", side_effect=OSError(5, "Input/output error")):
        with pytest.raises(CheckpointError):
            CheckpointManager(run).save(20, {"model.w": torch.zeros(1)}, {})
    assert find_checkpoint(run).iteration == 20


def test_leftovers_of_killed_saves_are_swept_and_reported(run, caplog):
    for name in ("iter_0000020.tmp-0123abcd", "iter_0000004.tmp-del-0123abcd"):
        (run / name).mkdir()
        (run / name / "__0_0.distcp").write_bytes(b"half")
    (run / "latest_checkpointed_iteration.txt.tmp-0123abcd").write_text("20")
    (run / "iter_0000020.tmp-mine").mkdir()  # not one of ours
    CheckpointManager(run)
    assert sorted(os.listdir(run)) == ["iter_0000005", "iter_0000010", "iter_0000020.tmp-mine", "latest_checkpointed_iteration.txt"]
    assert caplog.text.count("left behind by a save that was interrupted") == 3


# ---------------------------------------------------------------- a disk that is really full

ROOM = 3 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A directory that takes ROOM bytes: a file system of its own, or, for an ordinary user, a limit on the size of a file."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", directory], check=False, capture_output=True)
    yield directory, mounted.returncode == 0
    if mounted.returncode == 0:
        subprocess.run(["umount", directory], check=True)


def _save_twice(directory, is_mounted):
    """The first fits. Then the disk is as full as it is, though the look at it before promises room: somebody else was faster."""
    import resource

    saves = CheckpointManager(directory)
    saves.save(5, {f"model.own{dist.get_rank()}": torch.ones(ROOM // 16)}, {})
    roomy = mock.Mock(return_value=mock.Mock(free=1 << 40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM // 4, limits[1]))
        with mock.patch.object(manager.shutil, "disk_usage", roomy):
            saves.save(10, {f"model.own{dist.get_rank()}": torch.ones(ROOM // 8)}, {})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.distributed
def test_disk_that_fills_up_while_saving_is_named_on_all_ranks_and_the_old_checkpoint_stays(small_disk):
    directory, is_mounted = small_disk
    first, second = run_distributed(_save_twice, 2, directory, is_mounted)
    assert first == second and f"the disk of {directory} is full" in first and "--keep-last" in first, first
    assert sorted(os.listdir(directory)) == ["iter_0000005", "latest_checkpointed_iteration.txt"]
    assert find_checkpoint(directory).iteration == 5


# ---------------------------------------------------------------- two jobs

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_moe.checkpoint.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
worker = os.fork()  # as a data worker
if worker:
    print(worker, flush=True)
time.sleep(100)
"""


def test_second_job_in_one_directory_is_refused_until_the_first_is_dead(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(CheckpointError) as caught:
            DirectoryLock(tmp_path)
        assert f"--save {tmp_path} is in use by host {socket.gethostname()}, pid {holder.pid}; " in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    try:
        DirectoryLock(tmp_path).close()  # though the file is still there, and a process that was forked from the dead one
    finally:
        os.kill(worker, signal.SIGKILL)


def test_file_system_without_locks_is_a_warning(tmp_path, caplog):
    with mock.patch("fcntl.lockf", side_effect=OSError(37, "No locks available")):
        DirectoryLock(tmp_path).close()
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text


# ---------------------------------------------------------------- kill -9


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "background"])
def test_killing_all_ranks_at_any_moment_loses_nothing_that_was_committed(how):
    """In a process of its own, because ranks are forked from one that has imported torch and done nothing else."""
    script = Path(__file__).with_name("kill_during_save.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, *how.split()],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"did not end in time\n{output}")
    assert process.returncode == 0, output
