"""fused all-to-all on one GPU: virtual ranks against the all-to-all's rows, and its kernels against a copy

Ranks of one process have a stream each, and signal each other as those of several GPUs do; nothing crosses a link, so times are those of
memory alone. Bytes: a push reads a token once and writes its k rows; a pull reads k rows and writes a token. The copy of as many bytes
is the floor. Each row: median and quartiles over rounds, in which the systems take turns.

Several processes on one GPU, over symmetric memory and CUDA IPC: python -m pytest tests/distributed/test_fused_on_gpu.py
"""
# T tokens, D hidden, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.harness import Options, Report, say, spread, table
from megatron_moe.kernels.fused.exchange import SPINS, Exchange, RowMap
from megatron_moe.kernels.fused.memory import VirtualRanks
from megatron_moe.moe.dispatch.base import LocalDispatcher

PEERS: dict[str, str] = {}

SHAPES = ((8192, 2048, 8, 64), (32768, 2048, 8, 64), (8192, 4096, 2, 8), (32768, 4096, 8, 64))  # T, D, K, E
PROGRAMS = (32, 64, 132, 264, 528)  # of a push, to find the fewest that a copy's rate needs
NO_GPU = "torch sees no GPU here, and the interpreter's time says nothing about a GPU's"


def run(options: Options) -> Report:
    shapes, rounds = (((512, 256, 2, 8),), options.rounds_or(3)) if options.quick else (SHAPES, options.rounds_or(20))
    report = Report("fused", {"shapes T,D,K,E": shapes, "rounds": rounds, "dtype": "bfloat16"})
    if not torch.cuda.is_available():
        report.skipped["everything"] = NO_GPU
        return report
    report.parameters["device"] = torch.cuda.get_device_name()
    right = {ranks: virtual_ranks_are_right(ranks) for ranks in (1, 2, 4, 8)}
    report.figures["virtual ranks are right"] = right
    if not all(right.values()):
        report.tables.append(f"virtual ranks, of which the rows or sums are wrong: {[ranks for ranks, ok in right.items() if not ok]}")
        return report  # the speed of what is wrong is of no use
    for shape in shapes:
        report.figures[",".join(map(str, shape))] = rates = speed(shape, rounds)
        report.tables.append(
            f"T, D, K, E = {shape}\n" + table(["", "us", "quartiles", "GB/s", "of the copy"], [[name, *row] for name, row in _rows(rates)])
        )
    return report


def _rows(rates: dict[str, dict]) -> Iterator[tuple[str, list[str]]]:
    copy = rates["copy"]
    for name, r in rates.items():
        share = f"{r['GB/s'] / copy['GB/s']:.2f}" if r["GB/s"] else ""
        yield name, [f"{r['us']:.0f}", f"{r['low']:.0f} to {r['high']:.0f}", f"{r['GB/s']:.0f}" if r["GB/s"] else "", share]


# ---------------------------------------------------------------- right


def inputs(rank: int, T: int, D: int, K: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of a rank."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(T, D, generator=generator).to("cuda", torch.bfloat16)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K].contiguous()
    return x_TD, ids_TK.cuda(), torch.rand(T, K, generator=generator).cuda()


@contextmanager
def exchanges(ranks: int, T: int, D: int, K: int, E: int) -> Iterator[list[tuple[Exchange, torch.cuda.Stream]]]:
    """Of virtual ranks. Every kernel has been loaded, and all memory is there: either may wait for the whole device, on which another
    rank may be waiting for this one."""
    made = [(Exchange(memory, E, K, "worst", spins=0), torch.cuda.Stream()) for memory in VirtualRanks(ranks, "cuda").memories]
    for exchange, stream in made:
        exchange.reserve(T)
        exchange.programs = min(exchange.programs, 512 // ranks)  # all ranks' programs fit on the device at once
        with torch.cuda.stream(stream):
            there_and_back(exchange, *inputs(0, T, D, K, E))
        torch.cuda.synchronize()
    for exchange, _ in made:
        for t in (exchange._epochs, exchange._signals.tensor, exchange._error):
            t.zero_()
        exchange.spins = SPINS
    torch.cuda.synchronize()
    yield made


def there_and_back(exchange: Exchange, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, RowMap]:
    """Experts that do nothing but weight: (rows, their weights, results)."""
    where = exchange.plan(ids_TK)
    rows_RD, weights_R = exchange.push(x_TD, weights_TK, where)
    y_TD, _ = exchange.pull(rows_RD * weights_R[:, None].to(rows_RD.dtype), weights_R, where)
    return rows_RD, weights_R, y_TD, where


def virtual_ranks_are_right(ranks: int, T: int = 1024, D: int = 2048, K: int = 8, E: int = 64) -> bool:
    """The ranks' rows one after another are those of all their tokens sorted by expert, and their sums those of the tokens."""
    say(f"{ranks} virtual ranks")
    data = [inputs(rank, T, D, K, E) for rank in range(ranks)]
    with exchanges(ranks, T, D, K, E) as made:
        found = []
        for (exchange, stream), (x_TD, ids_TK, weights_TK) in zip(made, data):
            with torch.cuda.stream(stream):
                found.append(there_and_back(exchange, x_TD, ids_TK, weights_TK))
        torch.cuda.synchronize()
        for exchange, _ in made:
            exchange.overflow()
    x_TD, ids_TK, weights_TK = (torch.cat(parts) for parts in zip(*data))
    local = LocalDispatcher(E)
    rows_RD, _, weights_R, _ = local.dispatch(x_TD, ids_TK, weights_TK, local.plan(ids_TK))
    is_right = torch.equal(torch.cat([f[0][: f[3].ends_e[-1]] for f in found]), rows_RD)
    is_right &= torch.equal(torch.cat([f[1][: f[3].ends_e[-1]] for f in found]), weights_R)
    sums_TD = x_TD.float() * weights_TK.sum(1, keepdim=True)
    return is_right and torch.allclose(torch.cat([f[2] for f in found]).float(), sums_TD, rtol=2e-2, atol=5e-2)


# ---------------------------------------------------------------- fast


def speed(shape: tuple[int, int, int, int], rounds: int) -> dict[str, dict]:
    """Microseconds of each system on one rank, and GB/s of those that move rows."""
    T, D, K, E = shape
    say(f"T, D, K, E = {shape}")
    with exchanges(1, T, D, K, E) as ((exchange, _),):
        x_TD, ids_TK, weights_TK = inputs(0, T, D, K, E)
        rows_RD, weights_R, _, where = there_and_back(exchange, x_TD, ids_TK, weights_TK)
        order_R = ids_TK.flatten().argsort(stable=True)
        moved = (1 + K) * T * D * 2  # bytes
        source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))

        def push(programs: int) -> Callable[[], object]:
            def work() -> None:
                exchange.programs = programs
                exchange.send(x_TD, weights_TK, where)

            return work

        systems: dict[str, tuple[Callable[[], object], int]] = {"copy": (lambda: target.copy_(source), moved)}
        systems |= {f"send, {programs} programs": (push(programs), moved) for programs in PROGRAMS}
        systems |= {
            "push (send, land)": (lambda: exchange.push(x_TD, weights_TK, where), 0),
            "gather and sum": (lambda: exchange.gather_sum(None, where, D, x_TD.dtype), moved),
            "pull (stage, meet, gather and sum)": (lambda: exchange.pull(rows_RD, None, where), 0),
            "plan": (lambda: exchange.plan(ids_TK), 0),
            "torch: index_select": (lambda: x_TD.index_select(0, order_R // K), moved),
            "torch: stable argsort": (lambda: ids_TK.flatten().argsort(stable=True), 0),
        }
        times: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(rounds + 2):
            for name, (work, _) in systems.items():
                seconds = on_device(work)
                if turn >= 2:  # the first are warm-ups
                    times[name].append(seconds * 1e6)
        exchange.overflow()
    rates = {}
    for name, (_, size) in systems.items():
        s = spread(times[name])
        rates[name] = {"us": s.median, "low": s.low, "high": s.high, "GB/s": size / s.median / 1e3}
    return rates


def on_device(work: Callable[[], object]) -> float:
    """Seconds, of ten in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4
