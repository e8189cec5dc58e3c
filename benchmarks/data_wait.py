"""how long a training step waits for its data: --num-workers 0, 1 and 2, as a share of the step

A Mixtral of 4 layers, 256 wide, 8 experts, top-2, reads micro-batches of 4 x 512 tokens, two a step, from a file in the page cache, as the training loop
does. The wait is the wall time of taking them from the loader; on a CPU there is no copy to a device behind it. The three runs take
turns, step by step, in one process; workers read ahead in processes of their own while any of them computes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.data_reading import write
from benchmarks.harness import Options, Report, Times, clocks, spread, table
from benchmarks.product import Training, one_rank
from benchmarks.step import FLAGS, QUICK

PEERS: dict[str, str] = {}

WORKERS = (0, 1, 2)


class Turn(NamedTuple):
    """A step, its beginning that went into waiting for data, and its loss."""

    wait: Times
    step: Times
    loss: float


def run(options: Options) -> Report:
    torch.set_num_threads(1)
    flags = (QUICK if options.quick else FLAGS)["mixtral"]
    micro_batch = int(flags.split("--micro-batch-size ")[1].split()[0])
    data = f"--data-path TEXT --split 100,0,0 --global-batch-size {2 * micro_batch}"
    flags = flags.replace("--mock-data --num-workers 0", data)
    report = Report("data_wait", {"flags": flags, "threads": 1, "micro-batches a step": 2})
    with tempfile.TemporaryDirectory() as folder:
        measure(report, flags, Path(folder), options.rounds_or(9))
    return report


def measure(report: Report, flags: str, folder: Path, rounds: int) -> None:
    write(folder / "text", 200_000, 0, 120)
    flags = flags.replace("TEXT", str(folder / "text"))
    with one_rank(flags) as (world, mesh):
        runs = {name_of(n): Training(f"{flags} --num-workers {n}", world, mesh) for n in WORKERS}
        turns = take_turns(runs, rounds)
    check_equal(turns)
    report.samples["steps"] = {name: [t.step for t in of_run] for name, of_run in turns.items()}
    report.samples["waits"] = {name: [t.wait for t in of_run] for name, of_run in turns.items()}
    waits = {name: spread(t.wait.wall * 1e6 for t in of_run) for name, of_run in turns.items()}
    shares = {name: spread(t.wait.wall / t.step.wall for t in of_run) for name, of_run in turns.items()}
    report.figures |= {
        "wait in microseconds": {name: w._asdict() for name, w in waits.items()},
        "share of the step": {name: s._asdict() for name, s in shares.items()},
    }
    report.tables.append(table(["", "wait us", "quartiles", "step ms", "share of the step", "quartiles"], [
        [name, f"{waits[name].median:.0f}", f"{waits[name].low:.0f}-{waits[name].high:.0f}", f"{spread(t.step.wall for t in turns[name]).median * 1e3:.0f}",
         f"{shares[name].median:.4%}", f"{shares[name].low:.4%}-{shares[name].high:.4%}"] for name in turns
    ]))  # fmt: skip


def name_of(workers: int) -> str:
    return f"--num-workers {workers}"


def take_turns(runs: dict[str, Training], rounds: int) -> dict[str, list[Turn]]:
    """The first round, in which kernels and workers are made, is not among them."""
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turn = step_of(runs[name])
            if number:
                turns[name].append(turn)
    return turns


def step_of(training: Training) -> Turn:
    begin = clocks()
    batches = training.next_batches()
    got = clocks()
    loss = float(training.step(batches).lm_loss)
    ended = clocks()
    return Turn(*(Times(c.wall - begin.wall, c.cpu - begin.cpu) for c in (got, ended)), loss)


def check_equal(turns: dict[str, list[Turn]]) -> None:
    """All read the same samples in the same order, or they did not do the same work."""
    first = next(iter(turns))
    for name, of_run in turns.items():
        for number, (a, b) in enumerate(zip(of_run, turns[first])):
            assert a.loss == b.loss, f"step {number}: the loss of {name} is {a.loss}, that of {first} {b.loss}"
