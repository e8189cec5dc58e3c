"""Kill both ranks of a saving run with signal 9, many times; after each, the newest committed checkpoint must load.

Run by test_checkpoint_faults.py; with the argument `background` the ranks change their tensors while these are saved. Half of the kills
fall at a random moment, the others at a chosen step of the save.
Every rank writes its own tensor filled with the iteration, so a mixture of two checkpoints would show.
"""

import os
import random
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_moe.checkpoint import manager
from megatron_moe.checkpoint.background import BackgroundSave, Stager
from megatron_moe.checkpoint.files import iterations_in, leftovers_in, temporary_name
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager

RANDOM_KILLS = 8
KEEP_LAST = 2
# (rank, function of the save before which it stops): both ranks are then killed there. While rank 1 stops, rank 0 has written its part.
STOPS = [(0, "_check_visible"), (0, "dcp.save"), (0, "describe_file"), (0, "write_manifest"), (0, "sync_directory"), (0, "write_tracker"),
         (0, "remove_directory"), (1, "CountingWriter.write_data"), (1, "describe_file")]  # fmt: skip


IN_BACKGROUND = "background" in sys.argv[1:]
if IN_BACKGROUND:
    STOPS = [(0, "_check_visible"), (0, "describe_file"), (0, "write_manifest"), (0, "write_tracker"), (0, "remove_directory"),
             (1, "CountingWriter.write_data")]  # fmt: skip
    RANDOM_KILLS = 6


def content(iteration: float, ranks=(0, 1)) -> dict[str, torch.Tensor]:
    return {f"model.rank{rank}": torch.full((200, 1000), float(iteration)) for rank in ranks}


def run_rank(rank: int, directory: Path, store: Path, stop: tuple[int, str] | None) -> None:
    """Resume from the newest checkpoint and save without end, until killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
    group = dist.new_group(backend="gloo") if IN_BACKGROUND else None
    saves, stager = CheckpointManager(directory, group, keep_last=KEEP_LAST), Stager()
    iteration = find_checkpoint(directory).iteration if iterations_in(directory) else 0
    dist.barrier()
    while True:
        iteration += 1
        if stop and rank == stop[0] and len(iterations_in(directory)) >= KEEP_LAST:
            patch_stop(stop[1], flag_beside(store))
        tensors = content(iteration, [rank])
        if not IN_BACKGROUND:
            saves.save(iteration, tensors, {"iteration": iteration})
            continue
        save = BackgroundSave(saves, stager, iteration, tensors, {"iteration": iteration})
        while not save.is_over:  # a step
            for tensor in tensors.values():
                tensor.fill_(-2)
            time.sleep(0.001)
        save.conclude()


def flag_beside(store: Path) -> Path:
    return store.with_name(store.name + ".stopped")


def patch_stop(name: str, flag: Path) -> None:
    def stop(*_args, **_kwargs):
        time.sleep(0.2)  # for the other rank to do its part
        flag.touch()
        time.sleep(60)

    owner, _, function = name.rpartition(".")
    mock.patch.object(getattr(manager, owner) if owner else manager, function, stop).start()


def fork_rank(*args) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run_rank(*args)
        finally:
            os._exit(1)
    return pid


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited 30 s for {what}")
        time.sleep(0.005)


def kill_once(directory: Path, scratch: Path, stop: tuple[int, str] | None, delay: float) -> None:
    store = scratch / temporary_name("store")
    before = max(iterations_in(directory), default=0)
    pids = [fork_rank(rank, directory, store, stop) for rank in range(2)]
    try:
        if stop:
            wait_until(flag_beside(store).exists, f"the save to reach {stop}")
        else:
            wait_until(lambda: max(iterations_in(directory), default=0) > before, "a first save")
            time.sleep(delay)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def check(directory: Path) -> tuple[int, int]:
    """The newest directory is the one that loads, whole and of one iteration; returns it and the number of leftovers."""
    leftovers = leftovers_in(directory)
    found = find_checkpoint(directory)
    assert found.iteration == max(iterations_in(directory)), found
    assert all(note.startswith("latest_checkpointed_iteration.txt says") for note in found.notes), found.notes
    target = content(-1)
    load_tensors(found.path, target)
    assert all((tensor == found.iteration).all() for tensor in target.values()), found
    assert found.meta == {"iteration": found.iteration}
    CheckpointManager(directory)
    assert not leftovers_in(directory)
    return found.iteration, len(leftovers)


def main() -> None:
    torch.set_num_threads(1)
    moments = random.Random(0)
    newest = swept = 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        for stop in STOPS + [None] * RANDOM_KILLS:
            kill_once(directory, Path(scratch), stop, moments.uniform(0, 0.3))
            iteration, leftovers = check(directory)
            print(
                f"killed {'with rank {} at {}'.format(*stop) if stop else 'at random'}: resumed from {iteration}, {leftovers} leftovers swept",
                flush=True,
            )
            assert iteration >= newest, f"went back from {newest}"
            newest, swept = iteration, swept + leftovers
    assert swept > 0, "no kill fell into a save"


if __name__ == "__main__":
    main()
