"""pretrain_gpt_moe.py with one fault planted in it, the one that $FAULT names. The file $REACHED<rank> says that a rank is there.

Started by test_sudden_death.py and test_stopping.py in place of the program; the product itself has no hooks for this.
"""

import itertools
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_gpt_moe
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.training import pretrain

RANK = int(os.environ.get("RANK", "0"))


def reached() -> None:
    Path(os.environ["REACHED"] + str(RANK)).touch()


def on_rank_1_at_step_3(fault):
    """The training step, with `fault` in place of the fourth on rank 1."""
    step = pretrain.train_step

    def train_step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest):
        if RANK == 1 and iteration == 3:
            return fault()
        return step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest)

    return mock.patch.object(pretrain, "train_step", train_step)


def broken():
    raise OSError(5, "Input/output error", "/data/shard_7.bin")


def hanging():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else torchrun waits 30 s before it kills
    time.sleep(600)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def endless_evaluation():
    evaluate = pretrain.evaluate

    def evaluate_for_ever(model, batches, *args):
        reached()
        return evaluate(model, itertools.cycle([next(iter(batches))]), *args)

    return mock.patch.object(pretrain, "evaluate", evaluate_for_ever)


def slow_save():
    write = CheckpointManager._write

    def write_slowly(self, *args):
        reached()
        time.sleep(2)
        write(self, *args)

    return mock.patch.object(CheckpointManager, "_write", write_slowly)


def slow_background_save():
    """The files are written, and looked at two seconds later."""
    written = CheckpointManager._written

    def look_slowly(self, building):
        if threading.current_thread() is not threading.main_thread():
            reached()
            time.sleep(2)
        return written(self, building)

    return mock.patch.object(CheckpointManager, "_written", look_slowly)


@contextmanager
def raises_during_a_save():
    with slow_background_save(), on_rank_1_at_step_3(broken):
        yield


FAULTS = {
    "raises": lambda: on_rank_1_at_step_3(broken),
    "raises during a save": raises_during_a_save,
    "hangs": lambda: on_rank_1_at_step_3(hanging),
    "stopped": lambda: on_rank_1_at_step_3(stopped),
    "killed": lambda: on_rank_1_at_step_3(killed),
    "endless evaluation": endless_evaluation,
    "slow save": slow_save,
    "slow background save": slow_background_save,
}

if __name__ == "__main__":
    with FAULTS[os.environ["FAULT"]]():
        pretrain_gpt_moe.main()
