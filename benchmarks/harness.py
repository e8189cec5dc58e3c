"""What the benchmarks share: interleaved timing, statistics, a table, and a JSON file with everything that was measured.

    systems -> interleave -> samples -> Report: print_report, write_report

Systems take turns within one run (A B C, B C A, C A B, ...), so that a machine that slows down slows all of them, and are
compared by the ratio within each round. CPU time is that of all threads and of child processes that have ended: on a shared
machine it is what can be compared. It does not see a core that stood idle; wall time does.

Worked example, 3 rounds, ours 1 2 3 s, theirs 2 3 4 s: medians 2 and 3 s; the ratios of the rounds are 1/2, 2/3 and 3/4, so
ours / theirs is 0.67 (their median) with quartiles 0.58 and 0.71.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_moe.config.flags import checked, flag

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "tokenizers", "transformers", "gigatoken", "megatron-core")


@dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    quick: bool = flag(False, "the smallest sizes and one round: shows that it runs, not how fast it is")
    rounds: int | None = flag(None, "turns of every system; the benchmark's own number when not given", minimum=1)
    out: str = flag(str(RESULTS), "folder of the JSON file; made when it is not there", metavar="DIR")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            yield f"--out {self.out} is a file; name a folder"

    def rounds_or(self, default: int) -> int:
        return self.rounds or (1 if self.quick else default)


# ---------------------------------------------------------------- timing


class Times(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class System:
    """One of those that are compared; `run` does one turn of work."""

    name: str
    run: Callable[[], object]

    def turn(self) -> Times:
        return timed(self.run)


Build = Callable[[], contextlib.AbstractContextManager[Callable[..., float]]]


class Apart:
    """A system in a process of its own, which waits while the others run; or in several, the ranks of one world.

    Systems that share a process share its memory: who comes last gets what pages the first ones have left, and a step of the same
    code took up to 1.3 times as long. `build` (picklable) is a context over there: the callable that does one turn and returns a number.
    With `ranks` there are so many processes, each with the environment that torchrun would give it; a turn is over when all are
    done, takes the wall time of the slowest and the CPU time of all, and its number is that of rank 0.
    """

    def __init__(self, name: str, build: Build, ranks: int | None = None):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for environment in [{}] if ranks is None else environments(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(build, there, environment), daemon=True)
            process.start()
            there.close()  # so that the pipe ends when the process does
            self._pipes.append(here)
            self._processes.append(process)

    def run(self) -> float:
        return self.results()[0]

    def turn(self) -> Times:
        times = [times for _, times in self._ask()]
        return Times(max(t.wall for t in times), sum(t.cpu for t in times))

    def results(self, *args: Any) -> list[Any]:
        """What the callable returns for these arguments, by rank."""
        return [result for result, _ in self._ask(*args)]

    def _ask(self, *args: Any) -> list[tuple[Any, Times]]:
        replies: dict[Connection, tuple[Any, Times]] = {}
        try:
            for pipe in self._pipes:
                pipe.send(args)
            while left := [pipe for pipe in self._pipes if pipe not in replies]:
                for pipe in connection.wait(left):
                    replies[pipe] = pipe.recv()
        except (EOFError, OSError):
            lost = self._processes[self._pipes.index(pipe)]
            lost.join()
            for process in self._processes:
                process.kill()  # the others wait for it
            raise RuntimeError(f"{self.name} ended with code {lost.exitcode}; what went wrong is above") from None
        return [replies[pipe] for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # the end of its loop
        for process in self._processes:
            process.join()


def environments(ranks: int) -> list[dict[str, str]]:
    """Of torchrun's processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _serve(build: Build, pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with build() as run, contextlib.suppress(EOFError):
        while True:
            args = pipe.recv()
            before = clocks()
            result = run(*args)
            after = clocks()
            pipe.send((result, Times(after.wall - before.wall, after.cpu - before.cpu)))


def clocks() -> Times:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Times(time.perf_counter(), time.process_time() + ended.ru_utime + ended.ru_stime)


def timed(run: Callable[[], object]) -> Times:
    before = clocks()
    run()
    after = clocks()
    return Times(after.wall - before.wall, after.cpu - before.cpu)


def interleave(systems: Sequence[System | Apart], rounds: int, warmups: int = 1) -> dict[str, list[Times]]:
    """`rounds` turns of every system, after `warmups` that are not counted. Each round begins with another system."""
    assert len({s.name for s in systems}) == len(systems), f"names must differ: {[s.name for s in systems]}"
    for system in systems:
        for _ in range(warmups):
            say(f"warm-up: {system.name}")
            system.run()
    samples: dict[str, list[Times]] = {s.name: [] for s in systems}
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        first = i % len(systems)
        for system in [*systems[first:], *systems[:first]]:
            samples[system.name].append(system.turn())
    return samples


def say(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"  {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- statistics


class Spread(NamedTuple):
    """Of a few values: the quartiles are what the middle half of them lies between."""

    min: float
    low: float  # first quartile
    median: float
    high: float  # third quartile


def spread(values: Iterable[float]) -> Spread:
    values = np.asarray(list(values), float)
    return Spread(float(values.min()), *(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))


def paired_ratio(samples: dict[str, list[Times]], name: str, base: str, clock: str = "cpu") -> Spread:
    """`name` over `base`, round by round."""
    return spread(getattr(a, clock) / getattr(b, clock) for a, b in zip(samples[name], samples[base]))


# ---------------------------------------------------------------- report


@dataclass
class Report:
    """All that a benchmark has found. `tables` are printed; everything goes into the JSON file."""

    benchmark: str
    parameters: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # peer -> why
    samples: dict[str, dict[str, list[Times]]] = field(default_factory=dict)  # case -> system -> turns
    figures: dict[str, Any] = field(default_factory=dict)  # what the benchmark concludes, by name
    tables: list[str] = field(default_factory=list)
    started: datetime = field(default_factory=datetime.now)
    load_at_start: tuple[float, ...] = field(default_factory=os.getloadavg)

    def to_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now() - self.started).total_seconds(), 1),
            "machine": machine() | {"load_at_start": list(self.load_at_start), "load_at_end": list(os.getloadavg())},
            "versions": versions(),
            "parameters": self.parameters,
            "skipped": self.skipped,
            "figures": self.figures,
            "samples": {
                case: {name: {"wall": [t.wall for t in turns], "cpu": [t.cpu for t in turns]} for name, turns in systems.items()}
                for case, systems in self.samples.items()
            },
        }


def timing_table(samples: dict[str, list[Times]], base: str, extra: dict[str, Callable[[str], str]] | None = None) -> str:
    """One line per system, fastest CPU median first; ratios are to `base`. `extra`: further columns, header -> cell of a system."""
    rows = []
    for name in sorted(samples, key=lambda n: spread(t.cpu for t in samples[n]).median):
        wall, cpu = (spread(getattr(t, c) for t in samples[name]) for c in Times._fields)
        ratio = paired_ratio(samples, name, base)
        rows.append([
            name, f"{cpu.min:.3f}", f"{cpu.median:.3f}", f"{cpu.low:.3f}-{cpu.high:.3f}", f"{wall.min:.3f}", f"{wall.median:.3f}",
            f"{wall.low:.3f}-{wall.high:.3f}", f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
            *(cell(name) for cell in (extra or {}).values()),
        ])  # fmt: skip
    header = ["system", "cpu s min", "median", "quartiles", "wall s min", "median", "quartiles", f"cpu / {base}", *(extra or {})]
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text; the first one is left-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in lines)


def print_report(report: Report) -> None:
    m = machine()
    load = " ".join(f"{x:.2f}" for x in (report.load_at_start[0], os.getloadavg()[0]))
    print(f"{report.benchmark}: {m['cpu']}, {m['cores']} cores, load at start and end {load}; {_said(versions())}")
    print(f"  {_said(report.parameters)}")
    for peer, reason in report.skipped.items():
        print(f"  skipped: {peer}: {reason}")
    for text in report.tables:
        print("\n" + text)


def _said(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def write_report(report: Report, folder: str | Path) -> Path:
    """NAME-DATE-MACHINE.json in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    m = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{m['cpu']} {m['cores']} cores".lower()).strip("-")
    path = folder / f"{report.benchmark}-{report.started:%Y-%m-%d-%H%M%S}-{name}.json"
    path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- where it ran


def machine() -> dict[str, Any]:
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform(terse=True)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing(peers: dict[str, str]) -> dict[str, str]:
    """Of {package: what it is for}, those that cannot be imported, with the reason."""
    return {name: f"not installed ({use}); pip install {name}" for name, use in peers.items() if not _is_there(name)}


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that `name` is part of
        return False
