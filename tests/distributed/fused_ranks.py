"""What the ranks of test_fused.py do, in Triton's interpreter. (Ranks do not import hypothesis.)"""
# T tokens of a rank, K experts per token, E experts, H row width, R rows

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from megatron_moe.kernels.fused import exchange as fused
from megatron_moe.kernels.fused.exchange import CHANNELS, Exchange
from megatron_moe.kernels.fused.memory import IpcMemory, ProcessMemory, SymmetricMemory, VirtualRanks
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.fused import FusedDispatcher, first_difference
from megatron_moe.moe.layer import moe_layers
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.fused import use_fused_dispatch
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.training.room import build_room
from megatron_moe.training.step import train_step
from tests.distributed import parity

SPINS = 200_000  # looks of the interpreter: more than any test waits, and an end


@dataclass(frozen=True)
class Case:
    """Of all ranks."""

    tokens: tuple[int, ...]  # of each
    k: int
    experts: int
    width: int
    kept: float = 0.8  # of the assignments
    busy: int | None = None  # experts that get any
    align: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.tokens)


def tokens_of(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of a rank: a function of its number."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    T, busy = case.tokens[rank], max(case.busy or case.experts, case.k)
    x = torch.randn(T, case.width, generator=generator).to(case.dtype)
    ids = torch.rand(T, busy, generator=generator).argsort(-1)[:, : case.k]
    ids = torch.where(torch.rand(T, case.k, generator=generator) < case.kept, ids, -1)
    weights = torch.rand(T, case.k, generator=generator, dtype=torch.promote_types(case.dtype, torch.float32))
    return x, ids, weights


@dataclass
class Layout:
    """Where every assignment of every rank belongs, by loops."""

    owner: list[Tensor]  # of each rank, int32 [T, K]: in the order of the choices
    row: list[Tensor]
    rows: list[list[tuple[int, int, int] | None]]  # of each rank: (source rank, token, choice) of each row, None for padding
    ends: list[list[int]]
    filled: list[list[int]]


def layout_of(case: Case) -> Layout:
    here = case.experts // case.ranks
    ids = [tokens_of(case, rank)[1] for rank in range(case.ranks)]
    layout = Layout([torch.full_like(i, -1) for i in ids], [torch.full_like(i, -1) for i in ids], [], [], [])
    for owner in range(case.ranks):
        rows, ends, filled = [], [], []
        for expert in range(owner * here, (owner + 1) * here):
            for source, of_source in enumerate(ids):
                for token, choice in (of_source == expert).nonzero().tolist():
                    layout.owner[source][token, choice], layout.row[source][token, choice] = owner, len(rows)
                    rows.append((source, token, choice))
            filled.append(len(rows))
            rows += [None] * (-len(rows) % case.align)
            ends.append(len(rows))
        layout.rows.append(rows)
        layout.ends.append(ends)
        layout.filled.append(filled)
    return layout


def sum_in_order(rows: list[tuple[int, int, Tensor]], wide: torch.dtype, width: int) -> Tensor:
    """(owner, expert's row there, row) of a token: by expert within a rank, then by rank."""
    total = torch.zeros(width, dtype=wide)
    for rank in sorted({owner for owner, _, _ in rows}):
        of_rank = torch.zeros(width, dtype=wide)
        for _, _, row in sorted((r for r in rows if r[0] == rank), key=lambda r: r[1]):
            of_rank = of_rank + row.to(wide)
        total = total + of_rank
    return total


# ---------------------------------------------------------------- one process: each kernel, as one of several ranks


def check_kernels_of_few_blocks(case: Case) -> None:
    """So that each has several tiles."""
    blocks, fused.BLOCKS = fused.BLOCKS, 2
    try:
        check_kernels(case)
    finally:
        fused.BLOCKS = blocks


def check_kernels(case: Case) -> None:
    """Every kernel of every rank, one after another: nobody waits, as nobody could come."""
    layout = layout_of(case)
    ranks = [
        Exchange(memory, case.experts, case.k, "worst", align=case.align, spins=0) for memory in VirtualRanks(case.ranks, "cpu").memories
    ]
    data = [tokens_of(case, rank) for rank in range(case.ranks)]
    for exchange in ranks:
        exchange.reserve(max(case.tokens))
    for exchange, (_, ids, _) in zip(ranks, data):
        exchange.plan(ids)  # with it everybody's counts are known
        exchange._epochs.zero_()
    plans = [exchange.plan(ids) for exchange, (_, ids, _) in zip(ranks, data)]
    for rank, plan in enumerate(plans):
        _check_plan(case, layout, rank, plan)
    for exchange, plan, (x, _, weights) in zip(ranks, plans, data):
        exchange.push(x, weights, plan)
    for rank, exchange in enumerate(ranks):  # what others have left behind, where nobody writes now
        buffers = exchange._buffers
        stale = [n for n in range(exchange.capacity) if n >= len(layout.rows[rank]) or layout.rows[rank][n] is None]
        buffers.received.tensor[stale] = buffers.received_weights.tensor[stale] = float("nan")
    pushed = [exchange.push(x, weights, plan) for exchange, plan, (x, _, weights) in zip(ranks, plans, data)]
    for rank, (rows, row_weights) in enumerate(pushed):
        expected = torch.zeros_like(rows), torch.zeros_like(row_weights)
        for number, source in enumerate(layout.rows[rank]):
            if source is not None:
                expected[0][number], expected[1][number] = data[source[0]][0][source[1]], data[source[0]][2][source[1:]]
        assert torch.equal(rows, expected[0]) and torch.equal(row_weights, expected[1])
    for exchange, plan, (rows, row_weights) in zip(ranks, plans, pushed):
        exchange.pull(rows * 3, row_weights, plan)
    for rank, exchange in enumerate(ranks):
        y, scalars = exchange.pull(pushed[rank][0] * 3, pushed[rank][1], plans[rank])
        x, ids, weights = data[rank]
        for token in range(len(x)):
            came = [
                (int(layout.owner[rank][token, c]), int(layout.row[rank][token, c]), x[token] * 3)
                for c in range(case.k)
                if ids[token, c] >= 0
            ]
            assert same(y[token], sum_in_order(came, weights.dtype, case.width).to(case.dtype))
        assert torch.equal(scalars, torch.where(ids >= 0, weights, 0))


def _check_plan(case: Case, layout: Layout, rank: int, plan) -> None:
    owners, rows, choices = (t.long() for t in (plan.owner_TK, plan.row_TK, plan.choice_TK))
    ids = tokens_of(case, rank)[1]
    by_expert = torch.where(ids < 0, case.experts, ids).argsort(dim=-1, stable=True)
    assert torch.equal(choices, by_expert)
    assert torch.equal(owners, layout.owner[rank].gather(1, by_expert))
    assert torch.equal(rows[owners >= 0], layout.row[rank].gather(1, by_expert)[owners >= 0])
    assert plan.ends_e.tolist() == layout.ends[rank] and plan.filled_e.tolist() == layout.filled[rank]
    sent = int((layout.owner[rank] >= 0).sum() - (layout.owner[rank] == rank).sum())
    came = sum(source is not None and source[0] != rank for source in layout.rows[rank])
    assert plan.info.tolist() == [len(layout.rows[rank]), max(map(len, layout.rows)), sent, came]


# ---------------------------------------------------------------- several processes


class Scaled:
    """Experts that are functions of expert and row; notes what comes."""

    def __init__(self, first_expert: int):
        self.first_expert = first_expert

    def __call__(self, rows: Tensor, offsets: Tensor, row_weights: Tensor, has_spare_rows: bool) -> Tensor:
        self.rows, self.offsets, self.row_weights = rows.detach(), offsets, row_weights.detach()
        sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).tolist()
        scale = torch.cat(
            [torch.full((n,), self.first_expert + e + 1.0, dtype=rows.dtype, device=rows.device) for e, n in enumerate(sizes)]
        )
        scale = torch.nn.functional.pad(scale, (0, len(rows) - len(scale)))
        # no sin: its last bit depends on how many rows there are
        return (rows * scale[:, None]).square() * row_weights[:, None].to(rows.dtype)


def build(case: Case, policy: str = "static", factor: float = 3.0, exchange: type[Exchange] = Exchange) -> FusedDispatcher:
    memory = ProcessMemory(dist.group.WORLD)
    return FusedDispatcher(case.experts, exchange(memory, case.experts, case.k, policy, factor, case.align, SPINS))


def through(case: Case, dispatcher, device: str = "cpu") -> dict[str, Tensor]:
    """To experts and back, forward and backward."""
    rank = dist.get_rank()
    x, ids, weights = (t.to(device) for t in tokens_of(case, rank))
    x.requires_grad_(), weights.requires_grad_()
    experts = Scaled(rank * case.experts // case.ranks)
    y = dispatcher.through(experts, x, ids, weights, dispatcher.plan(ids))
    (y.square().sum() + y.sum()).backward()
    end = int(experts.offsets[-1])
    plan = dispatcher.plan(ids)
    dispatcher.dispatch(x, ids, weights, plan)
    return {
        "rows": experts.rows[:end], "offsets": experts.offsets, "row_weights": experts.row_weights[:end],
        "y": y.detach(), "dx": x.grad, "dw": weights.grad,
        "sent": torch.tensor([int(n) for n in plan.sent_bytes]),
    }  # fmt: skip


@contextmanager
def exact_room() -> Iterator[None]:
    """Not rounded up: so few rows would always fit."""
    before, fused.ROUND_UP = fused.ROUND_UP, 1
    try:
        yield
    finally:
        fused.ROUND_UP = before


@exact_room()
def grown(case: Case) -> tuple[int, int, list[str]]:
    """Under `exact`: room before and after, and what is not as by the all-to-all."""
    dispatcher = build(case, "exact")
    dispatcher.exchange.reserve(max(case.tokens))
    before = dispatcher.exchange.capacity
    found, expected = through(case, dispatcher), through(case, AllToAllDispatcher(case.experts, dist.group.WORLD))
    return before, dispatcher.exchange.capacity, [name for name in expected if not same(found[name], expected[name])]


def differences(case: Case, policy: str = "static") -> list[str]:
    """What of a fused layer is not, bit by bit, that of the all-to-all."""
    dispatcher = build(case, policy)
    found, expected = through(case, dispatcher), through(case, AllToAllDispatcher(case.experts, dist.group.WORLD))
    assert dispatcher.exchange.overflow() == 0
    return [name for name in expected if not same(found[name], expected[name])]


def differences_on_gpu(case: Case, policy: str, kind: str) -> list[str]:
    """The same of ranks that share a GPU, with the all-to-all on the CPU."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    memory = {"symmetric": SymmetricMemory, "ipc": IpcMemory}[kind](dist.group.WORLD, "cuda:0")
    dispatcher = FusedDispatcher(case.experts, Exchange(memory, case.experts, case.k, policy, 3.0))
    found, expected = through(case, dispatcher, "cuda:0"), through(case, AllToAllDispatcher(case.experts, dist.group.WORLD))
    assert dispatcher.exchange.overflow() == 0
    # a square may be rounded otherwise there, and sums of hundreds of products are; what only travels is the same bit by bit
    exact = {"rows", "offsets", "row_weights", "sent"}
    near = {name: torch.allclose(found[name].cpu(), expected[name], rtol=1e-5, atol=1e-4) for name in expected}
    return [name for name in expected if not (torch.equal(found[name].cpu(), expected[name]) if name in exact else near[name])]


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit - but the interpreter cuts sums to bf16 where a GPU, and torch, round them."""
    if found.dtype != torch.bfloat16:
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=2**-5, atol=2**-5)


def dawdle() -> None:
    """Not at all, or for longer than the interpreter takes for a kernel: whoever hurries does overtake."""
    time.sleep(random.choice((0, 0.25)))


class Delayed(Exchange):
    """Ranks dawdle where others could overtake them. Planted: nobody waits at the meeting `without`."""

    without: str | None = None

    def land(self, *args):
        dawdle()
        return super().land(*args)

    def gather_sum(self, *args):
        dawdle()
        return super().gather_sum(*args)

    def _meet(self, channel: str) -> None:
        assert channel in CHANNELS
        if channel != self.without:
            super()._meet(channel)


def soak(case: Case, rounds: int, without: str | None = None) -> int:
    """Random delays and sizes; how many results came out wrong."""
    rank = dist.get_rank()
    random.seed(rank)
    exchange = Delayed(ProcessMemory(dist.group.WORLD), case.experts, case.k, "worst", align=case.align, spins=SPINS)
    exchange.without = without
    exchange.reserve(max(case.tokens))
    wrong = 0
    for number in range(rounds):
        x, ids, weights = tokens_of(Case(case.tokens, case.k, case.experts, case.width, seed=number), rank)
        T = random.choice((0, 1, len(x)))
        x, ids, weights = x[:T], ids[:T], weights[:T]
        dawdle()
        plan = exchange.plan(ids)
        rows, row_weights = exchange.push(x, weights, plan)
        y, _ = exchange.pull(rows * row_weights[:, None], None, plan)
        recomputed, _ = exchange.push(x, weights, plan)
        back, _ = exchange.push(y, None, plan)  # as a backward does
        dawdle()
        dx, scalars = exchange.pull(back, row_weights, plan)
        kept = weights * (ids >= 0)
        wrong += not torch.equal(recomputed, rows)
        wrong += not torch.allclose(y, x * kept.sum(1)[:, None], rtol=1e-5, atol=1e-5)
        wrong += not (torch.allclose(dx, y * (ids >= 0).sum(1)[:, None], rtol=1e-5, atol=1e-5) and torch.equal(scalars, kept))
    assert exchange.overflow() == 0
    return wrong


def wait_for_nobody() -> str:
    """Rank 1 stays away from a meeting."""
    exchange = Exchange(ProcessMemory(dist.group.WORLD), 4, 1, spins=20)
    if dist.get_rank() == 0:
        exchange._meet("staged")
        try:
            exchange.overflow()
        except RuntimeError as error:
            return str(error)
    return ""


def in_flight(case: Case) -> bool:
    """Two micro-batches forward before the first goes back, and one recomputed: the same numbers as one after another."""
    rank = dist.get_rank()
    dispatcher = build(case)

    def forward(seed: int, again: bool = False):
        x, ids, weights = tokens_of(Case(case.tokens, case.k, case.experts, case.width, seed=seed), rank)
        x.requires_grad_(), weights.requires_grad_()
        experts, plan = Scaled(rank * case.experts // case.ranks), dispatcher.plan(ids)
        work = lambda x, w: dispatcher.through(experts, x, ids, w, plan)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(work, x, weights, use_reentrant=False) if again else work(x, weights)
        return x, weights, y

    alone = []
    for seed in (1, 2):
        x, weights, y = forward(seed)
        y.square().sum().backward()
        alone.append((x.grad, weights.grad, y))
    together = [forward(1), forward(2, again=True)]
    for _, _, y in together:
        y.square().sum().backward()
    return all(torch.equal(a, b) for (x, w, y), expected in zip(together, alone) for a, b in zip((x.grad, w.grad, y), expected))


class LosesARow(Exchange):
    """Planted: rank 1 pushes the row of its token 5 twice as large."""

    def push(self, x_TD, weights_TK, where):
        if self.memory.rank == 1 and weights_TK is not None:
            x_TD = x_TD.clone()
            x_TD[5] *= 2
        return super().push(x_TD, weights_TK, where)


def differences_at_the_start(has_fault: bool) -> str | None:
    exchange = (LosesARow if has_fault else Exchange)(ProcessMemory(dist.group.WORLD), 4, 2, "worst", spins=SPINS)
    return first_difference(FusedDispatcher(4, exchange), AllToAllDispatcher(4, dist.group.WORLD), 8, torch.float32, tokens=9)


SMALL = (
    "--num-layers 2 --num-experts 1 4 --hidden-size 16 --num-attention-heads 2 --seq-length 5 --hidden-dropout 0.2 --moe-expert-parallel-size 2 "
    "--optimizer sgd"
)


def with_kernels(policy: str = "worst", factor: float = 1.0) -> Callable[..., Any]:
    """build_parallel_model, and the kernels in the place of the exchange."""

    def build(c, vocab_size, mesh, device, expert_factory=None):
        model = build_parallel_model(c, vocab_size, mesh, device, expert_factory)
        for stage in model.stages.values() if isinstance(model, PipelinedGPT) else [model]:
            use_fused_dispatch(
                stage,
                mesh,
                lambda moe, group: Exchange(ProcessMemory(group), moe.num_experts, moe.config.topk, policy, factor, spins=SPINS),
            )
        return model

    return build


@exact_room()
def trained(factors: tuple[float, ...]) -> list[tuple[list[Tensor], int]]:
    """Of a small model with so much room for an even share of rows: its weights after two steps, and how many steps were done again."""
    c, done = parity.config("noisy", SMALL), []
    for factor in factors:
        mesh = build_parallel_mesh(c, "cpu")
        model = with_kernels("static", factor)(c, parity.VOCAB, mesh, torch.device("cpu"))
        optimizer, room = build_optimizer(model, c.optimizer), build_room(model, torch.device("cpu"))
        for step in range(2):
            batches = parity.microbatches(step, mesh.rank("dp"), mesh.size("dp"), 2, c)
            train_step(model, optimizer, batches, mesh, 0.5, 1.0, parity.SEED, step, room=room)
            assert all(isinstance(moe.dispatcher, FusedDispatcher) for moe in moe_layers(model))
        done.append(([parity.whole(p) for p in model.parameters()], room.repeats))
    return done


def layout(model: str, flags: str) -> dict[str, Tensor] | None:
    """parity.layout, with the kernels."""
    build, parity.build_parallel_model = parity.build_parallel_model, with_kernels()
    try:
        return parity.layout(model, flags)
    finally:
        parity.build_parallel_model = build
