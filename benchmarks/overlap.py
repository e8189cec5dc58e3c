"""what part of the exchange of rows is hidden behind compute: one part and several, with and without a dense branch, on 2 gloo ranks

gloo on one machine is faster than the experts, and shows nothing. So the wire is simulated: an exchange lands no sooner than its bytes to
the other rank take at `BANDWIDTH`, one behind another in each direction; until then a rank that waits sleeps. Hidden is the share of that
time in which the rank had something else to do. A layer of 8 experts, with a dense MLP of half of their width beside it.
"""
# T tokens, D hidden

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Times, clocks, spread, table
from megatron_moe.moe.dispatch import build_dispatcher, exchange
from megatron_moe.moe.experts import Experts
from megatron_moe.utils.groups import end_groups

PEERS: dict[str, str] = {}

EXPERTS, TOPK, TOKENS, HIDDEN, FFN = 8, 2, 1024, 256, 1024
BANDWIDTH = 50e6  # bytes per second and direction: about as long as the experts compute
ROUNDS = 9
WAYS = {  # parts, whether the dense branch is computed in the gap
    "one part": (1, False),
    "one part, dense branch in the gap": (1, True),
    "4 parts": (4, False),
    "4 parts, dense branch in the gap": (4, True),
}


class Wire:
    """Seconds that exchanges took, and those in which a rank waited for them."""

    def __init__(self, bandwidth: float):
        self.bandwidth, self.free_at = bandwidth, 0.0
        self.took = self.waited = 0.0

    @contextmanager
    def between_ranks(self) -> Iterator[None]:
        start, wait = exchange._Link.start, exchange._Link.wait

        def slow_start(link: Any, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
            rank = dist.get_rank(link.group)
            rows = max(sum(send) - send[rank], sum(receive) - receive[rank])
            seconds = rows * (x[:1].numel() * x.element_size()) / self.bandwidth if len(x) else 0.0
            link.lands_at = max(time.perf_counter(), self.free_at) + seconds
            self.free_at = link.lands_at
            self.took += seconds
            return start(link, x, receive, send)

        def slow_wait(link: Any) -> Tensor:
            left = max(link.lands_at - time.perf_counter(), 0.0)
            self.waited += left
            time.sleep(left)
            return wait(link)

        with mock.patch.object(exchange._Link, "start", slow_start), mock.patch.object(exchange._Link, "wait", slow_wait):
            yield

    def hidden(self) -> float:
        """Share, since the last time."""
        share = 1 - self.waited / self.took
        self.took = self.waited = 0.0
        return share


def run(options: Options) -> Report:
    rounds = 1 if options.quick else options.rounds or ROUNDS
    tokens = 64 if options.quick else TOKENS
    shape = {"experts": EXPERTS, "topk": TOPK, "tokens_per_rank": tokens, "hidden": HIDDEN, "ffn": FFN, "bytes_per_second": BANDWIDTH}
    report = Report("overlap", shape | {"rounds": rounds, "ranks": 2})
    found = on_two_ranks(measure, tokens, rounds)[0]
    rows = []
    for name, turns in found.items():
        report.samples[name] = {way: [Times(*t) for t in turns[way]] for way in ("forward", "backward")}
        hidden = {way: spread(turns[f"hidden {way}"]) for way in ("forward", "backward")}
        report.figures[name] = {way: hidden[way]._asdict() for way in hidden}
        cells = [f"{hidden[way].median:.0%} ({hidden[way].low:.0%} to {hidden[way].high:.0%})" for way in hidden]
        wall = [f"{1e3 * spread(t.wall for t in report.samples[name][way]).median:.0f} ms" for way in hidden]
        rows.append([name, cells[0], cells[1], *wall])
    report.tables.append(table(["", "hidden, forward", "hidden, backward", "forward", "backward"], rows))
    return report


def measure(tokens: int, rounds: int) -> dict[str, dict[str, list[Any]]]:
    """On each rank; the ways take turns."""
    steps = {name: step_of(tokens, *way) for name, way in WAYS.items()}
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in WAYS}
    for number in range(rounds + 1):
        for name, step in steps.items():
            for key, value in step().items():
                if number:  # the first one warms up
                    found[name].setdefault(key, []).append(value)
    return found


def step_of(tokens: int, chunks: int, in_gap: bool) -> Callable[[], dict[str, Any]]:
    """A function that does a forward and a backward, and says how long they took and what was hidden."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x_TD = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    ids_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOPK]
    weights_TK = torch.rand(tokens, TOPK, generator=generator)
    dispatcher = build_dispatcher("alltoall", EXPERTS, TOPK, dist.group.WORLD, chunks=chunks)
    experts = Experts(EXPERTS // dist.get_world_size(), HIDDEN, FFN, bias=False)
    dense = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
    wire = Wire(BANDWIDTH)

    def forward() -> Tensor:
        branch: list[Tensor] = []

        def compute_branch() -> None:
            branch.append(dense(x_TD))

        meanwhile = (compute_branch,) if in_gap else ()
        y_TD = dispatcher.through(experts, x_TD, ids_TK, weights_TK, dispatcher.plan(ids_TK), *meanwhile)
        if not in_gap:
            compute_branch()
        return y_TD + branch[0]

    def step() -> dict[str, Any]:
        with wire.between_ranks():
            dist.barrier()
            begin = clocks()
            y_TD = forward()
            half, first = clocks(), wire.hidden()
            y_TD.square().mean().backward()
            end, second = clocks(), wire.hidden()
        times = {"forward": _between(begin, half), "backward": _between(half, end)}
        return times | {"hidden forward": first, "hidden backward": second}

    return step


def _between(begin: Times, end: Times) -> tuple[float, float]:
    return end.wall - begin.wall, end.cpu - begin.cpu


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Its results on both, in processes of their own with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        return pool.starmap(_on_rank, [(rank, port, function, args) for rank in range(2)], chunksize=1)


def _on_rank(rank: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        return function(*args)
    finally:
        end_groups()
