"""what a step waits for a checkpoint: --async-save, a save that waits, and a plain copy of as many bytes

A run of the product on one rank saves its whole state, by turns in the background and waiting for the disk; beside them, memory of the same
size is copied from one place to another. After each save in the background, steps go on until it has ended: they are compared with
steps by themselves. The disk is the one of the temporary folder ($TMPDIR); the ratio to the copy does not depend on it, the ratio to the save
that waits does. The first save in the background also allocates the memory that all later ones use, and is shown by itself.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.harness import Options, Report, say, spread, table
from benchmarks.product import Training, one_rank
from megatron_moe.checkpoint.background import BackgroundSave, Stager
from megatron_moe.checkpoint.files import iteration_name
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.training.saving import GROUP

PEERS: dict[str, str] = {}

FULL = "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-experts 8 --vocab-size 8192 --seq-length 256 --micro-batch-size 2"
QUICK = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-experts 4 --vocab-size 128 --seq-length 32 --micro-batch-size 2"
COMMON = (
    "--num-attention-heads 8 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 --expert-interval 1 --disable-moe-token-dropping --mock-data --num-workers 0 --train-iters 1000000 --lr 1e-3 "
    "--lr-decay-style constant"
)
ROUNDS = 9
COPY, BACKGROUND, WAITING = "plain copy", "--async-save", "waits for the disk"
ALONE, DURING = "a step alone", "a step during a save"


class Saves:
    """The systems that are compared; each method returns the seconds that it is about."""

    def __init__(self, training: Training, directory: Path):
        self.training, self.tensors = training, state_of(training)
        self.manager = CheckpointManager(directory, dist.new_group(backend="gloo", group_desc=GROUP), keep_last=1)
        self.stager, self.iteration = Stager(), 0
        local = [t.to_local() if isinstance(t, DTensor) else t for t in self.tensors.values()]
        self.bytes = sum(t.numel() * t.element_size() for t in local)
        self.source, self.target = torch.ones(2, self.bytes, dtype=torch.uint8)
        self.during: list[float] = []  # seconds of the steps that a save went on beside

    def copy(self) -> float:
        return seconds_of(lambda: self.target.copy_(self.source))

    def background(self) -> float:
        self.iteration += 1
        save = BackgroundSave(self.manager, self.stager, self.iteration, self.tensors, {})
        while not save.is_over:
            seconds = self.step()
            if not save.is_over:
                self.during.append(seconds)
        save.conclude()
        assert (self.manager.directory / iteration_name(self.iteration)).is_dir()
        return save.waited_seconds

    def waiting(self) -> float:
        self.iteration += 1
        return seconds_of(lambda: self.manager.save(self.iteration, self.tensors, {}))

    def step(self) -> float:
        return seconds_of(self.training.step)


def state_of(training: Training) -> dict[str, Tensor]:
    return model_state(training.model) | optimizer_state(training.model, training.optimizer)


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(options: Options) -> Report:
    flags, rounds = f"{QUICK if options.quick else FULL} {COMMON}", options.rounds_or(ROUNDS)
    report = Report("async_saving", {"flags": flags, "rounds": rounds, "threads": torch.get_num_threads()})
    with tempfile.TemporaryDirectory() as folder, one_rank(flags) as (world, mesh):
        saves = Saves(Training(flags, world, mesh), Path(folder))
        saves.step()
        first = saves.background()
        del saves.during[:]
        turns = {COPY: saves.copy, BACKGROUND: saves.background, WAITING: saves.waiting, ALONE: saves.step}
        for turn in turns.values():
            turn()
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            names = list(turns)
            for name in [*names[i % len(names) :], *names[: i % len(names)]]:
                seconds[name].append(turns[name]())
    conclude(report, seconds, saves.during, first, saves.bytes)
    return report


def conclude(report: Report, seconds: dict[str, list[float]], during: list[float], first: float, size: int) -> None:
    ratio = lambda a, b: spread(x / y for x, y in zip(seconds[a], seconds[b]))  # noqa: E731
    report.figures = {
        "bytes": size, "seconds": seconds | {DURING: during}, "first_in_the_background": first,
        "background_over_copy": ratio(BACKGROUND, COPY)._asdict(), "waiting_over_background": ratio(WAITING, BACKGROUND)._asdict(),
        "step_during_over_alone": spread(during).median / spread(seconds[ALONE]).median if during else None,
    }  # fmt: skip
    rows = []
    for name, values in (seconds | {DURING: during}).items():
        if values:
            s = spread(values)
            rows.append([name, f"{1e3 * s.min:.1f}", f"{1e3 * s.median:.1f}", f"{1e3 * s.low:.1f}-{1e3 * s.high:.1f}", str(len(values))])
    report.tables.append(f"{size / 1e6:.1f} MB\n" + table(["", "ms min", "median", "quartiles", "times"], rows))
    copy, disk = ratio(BACKGROUND, COPY), ratio(WAITING, BACKGROUND)
    lines = [
        f"--async-save takes a step {copy.median:.2f} ({copy.low:.2f}-{copy.high:.2f}) times a plain copy of the same bytes, "
        f"the first time {1e3 * first:.1f} ms",
        f"a save that waits takes it {disk.median:.0f} ({disk.low:.0f}-{disk.high:.0f}) times as long as that",
    ]
    if during:
        lines.append(f"a step beside a save takes {report.figures['step_during_over_alone']:.2f} times one alone (medians)")
    report.tables.append("\n".join(lines))
