"""Exchanges that are under way while something is computed: in the forward and in the backward, on the clock, and under FSDP."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity
from distributed import test_dispatchers as ways
from distributed.collectives import CollectiveLog, LiveParameters
from megatron_moe.data.batch import Batch
from megatron_moe.moe.dispatch import exchange
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2 --moe-token-dispatcher alltoall"


# ---------------------------------------------------------------- one exchange


def exchanged():
    """Rank r sends r + 1 rows to rank 0 and one row to rank 1; row values name sender and number."""
    rank = dist.get_rank()
    send = [rank + 1, 1]
    receive = [1, 2] if rank == 0 else [1, 1]
    x = torch.tensor([[10.0 * rank + i] for i in range(sum(send))], requires_grad=True)
    y = exchange.exchange_rows(x, receive, send, dist.group.WORLD)
    # weights by arrival, so that the gradient tells where each row went
    (y * torch.tensor([[100.0 * rank + i] for i in range(len(y))])).sum().backward()
    return y.flatten().tolist(), x.grad.flatten().tolist()


def test_rows_are_exchanged_in_unequal_numbers_and_gradients_go_back():
    assert run_distributed(exchanged, 2) == [
        ([0.0, 10.0, 11.0], [0.0, 100.0]),
        ([1.0, 12.0], [1.0, 2.0, 101.0]),
    ]


class _Watch(torch.autograd.Function):
    """Beside the way of the rows: waits, and then looks whether they have arrived although nobody asked for them."""

    @staticmethod
    def forward(ctx, x, link, seen):
        ctx.link, ctx.seen = link, seen
        time.sleep(1.0)
        seen.append(link.under_way[0].is_completed())
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(1.0)
        ctx.seen.append(ctx.link.under_way[0].is_completed())
        return grad, None, None


def watched() -> list[bool]:
    x, seen = torch.ones(20000, 64, requires_grad=True), []
    flight = exchange.launch(x, [10000] * 2, [10000] * 2, dist.group.WORLD)
    beside = _Watch.apply(torch.ones(1, requires_grad=True), flight._link, seen)
    (flight.land().sum() + beside.sum()).backward()
    return seen


def test_rows_arrive_while_nobody_waits_for_them():
    """5 MB over gloo, forward and backward: complete after a second of something else."""
    assert run_distributed(watched, 2) == [[True, True]] * 2


# ---------------------------------------------------------------- what runs while rows travel


class Diary:
    """Notes when exchanges start and are waited for, and when experts begin and end to compute, in the order in which it happens."""

    def __init__(self, delay: float = 0.0):
        self.events: list[str] = []
        self.delay = delay
        self.start, self.wait = exchange._Link.start, exchange._Link.wait
        self.numbers: dict[int, int] = {}
        self.kept: list[exchange._Link] = []  # so that no id is used twice
        self.free_at: dict[str, float] = {}

    def number(self, link) -> int:
        self.kept.append(link)
        return self.numbers.setdefault(id(link), len(self.numbers))

    def patches(self):
        def start(link, x, *sizes):
            self.events.append(f"start {self.number(link)}")
            y = self.start(link, x, *sizes)
            line = link.group.group_name  # carries one exchange after another
            link.lands_at = max(time.monotonic(), self.free_at.get(line, 0.0)) + self.delay * (x.shape[1:] == (ways.HIDDEN,))
            self.free_at[line] = link.lands_at
            return y

        def wait(link):
            self.events.append(f"wait {self.number(link)}")
            time.sleep(max(link.lands_at - time.monotonic(), 0.0))  # the wire is slow, and busy with nothing else
            self.wait(link)

        return mock.patch.object(exchange._Link, "start", start), mock.patch.object(exchange._Link, "wait", wait)


class SlowExperts(ways.FakeExperts):
    """They take a while, forward and backward."""

    def __init__(self, first_expert: int, diary: Diary, seconds: float):
        super().__init__(first_expert)
        self.diary, self.seconds = diary, seconds

    def __call__(self, *args):
        return _Work.apply(super().__call__(*args), self)

    def work(self) -> None:
        self.diary.events.append("compute")
        time.sleep(self.seconds)


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, experts):
        ctx.experts = experts
        experts.work()
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        ctx.experts.work()
        return grad, None


def timed(kind: str, chunks: int, wire: float, work: float) -> dict:
    """A forward and a backward in which an exchange of rows takes `wire` seconds, and the experts `work` seconds in all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dispatcher = ways.build(kind, 1, chunks)
    x, ids, weights = ways.tokens_of(rank, (12,) * world, 2)
    plan = dispatcher.plan(ids)
    diary = Diary(wire)
    experts = SlowExperts(rank * ways.EXPERTS // world, diary, work / chunks)
    patches = diary.patches()
    for patch in patches:
        patch.start()
    try:
        dist.barrier()
        began = time.monotonic()
        y = dispatcher.through(experts, x, ids, weights, plan)
        forward, diary.events = diary.events, []
        half = time.monotonic()
        y.sum().backward()
        return {"forward": forward, "backward": diary.events, "seconds": (half - began, time.monotonic() - half)}
    finally:
        mock.patch.stopall()


def test_the_next_part_is_under_way_while_one_is_computed_and_its_result_with_the_one_after():
    """Two exchanges for each part, of rows and of weights, and one back: 0 1 and 2 3 go out, 4 is the result of the first, ..."""
    for found in run_distributed(timed, 2, "alltoall", 3, 0.0, 0.0):
        assert found["forward"] == [
            *("start 0", "start 1"),
            *("start 2", "start 3", "wait 0", "wait 1", "compute", "start 4"),
            *("start 5", "start 6", "wait 2", "wait 3", "compute", "start 7"),
            *("wait 5", "wait 6", "compute", "start 8"),
            *("wait 4", "wait 7", "wait 8"),
        ]  # fmt: skip
        order = found["backward"]
        computes = [i for i, event in enumerate(order) if event == "compute"]
        assert order[:3] == ["start 8", "start 7", "start 4"]  # gradients of all results set off before anything is computed
        for result, before in zip((8, 7, 4), computes):
            assert order.index(f"wait {result}") < before
        for out, after in zip(((5, 6), (2, 3), (0, 1)), computes):  # gradients of a part set off when it is computed ...
            assert all(order.index(f"start {n}") > after for n in out)
        assert all(order.index(f"wait {n}") > computes[1] for n in (5, 6))  # ... and are waited for after the next part
        assert all(order.index(f"wait {n}") > computes[2] for n in (2, 3))


@pytest.mark.parametrize(("kind", "world", "legs"), [("alltoall", 2, 1), ("hierarchical", 4, 2)])
def test_the_clock_sees_the_overlap_in_both_directions(kind, world, legs):
    """Rows are 0.3 s on the wire, each way, and experts work for 0.6 s. In one part: there, compute, back = 1.2 s. In four parts: 0.075 s
    until the first is there, 0.6 s of work behind which the others hide, 0.075 s for the last to come back = 0.75 s. (With two legs
    the one within the node is not hidden.)"""
    whole = run_distributed(timed, world, kind, 1, 0.3, 0.6)
    parts = run_distributed(timed, world, kind, 4, 0.075, 0.6)
    for way in (0, 1):
        one, four = (max(f["seconds"][way] for f in found) for found in (whole, parts))
        assert one > 0.6 + 2 * 0.3 * legs
        assert four < one - 0.25, (one, four)


# ---------------------------------------------------------------- the dense branch in the gap


class _Noted(torch.autograd.Function):
    """The end of the dense branch in the forward, and its beginning in the backward."""

    @staticmethod
    def forward(ctx, y, events):
        ctx.events = events
        events.append("dense")
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append("dense")
        return grad, None


def events_of_a_step(model_name: str, flags: str) -> dict[str, list[str]]:
    """What happens in the only layer of a model with several experts, in a forward and in its backward."""
    c = parity.config(model_name, f"{EP} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    block = [block for block in model.blocks if block.moe is not None][-1]
    diary, through, branch = Diary(), block.moe.dispatcher.through, block._branch
    is_mine: list[bool] = []

    def noting(*args):
        is_mine.append(True)
        try:
            return through(*args)
        finally:
            is_mine.clear()

    start, wait = exchange._Link.start, exchange._Link.wait
    links: dict[int, str] = {}

    def starts(link, *args):
        if is_mine:
            links[id(link)] = str(len(links))
            diary.kept.append(link)
        if id(link) in links:
            diary.events.append(f"start {links[id(link)]}")
        return start(link, *args)

    def waits(link):
        if id(link) in links:
            diary.events.append(f"wait {links[id(link)]}")
        return wait(link)

    block.moe.dispatcher.through, block._branch = noting, lambda h: _Noted.apply(branch(h), diary.events)
    with mock.patch.object(exchange._Link, "start", starts), mock.patch.object(exchange._Link, "wait", waits):
        batch = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)[:1]
        ends = {}
        with mock.patch.object(torch.Tensor, "backward", _noting_the_half(diary, ends)):
            forward_backward(model, batch, count_loss_tokens(batch, mesh), mesh, parity.SEED, 0)
    return {"forward": diary.events[: ends["forward"]], "backward": diary.events[ends["forward"] :]}


def _noting_the_half(diary: Diary, ends: dict[str, int]):
    original = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        ends.setdefault("forward", len(diary.events))
        return original(self, *args, **kwargs)

    return backward


@pytest.mark.parametrize(("model", "zero"), [("shared", 1), ("pyramid", 3), ("latent", 0)])
def test_the_dense_branch_is_computed_while_rows_travel_and_its_backward_while_their_gradients_do(model, zero):
    """0 and 1 are rows and weights on their way out, 2 is the way back: launch, dense, land - in the backward too."""
    for found in run_distributed(events_of_a_step, 2, model, f"--zero-stage {zero}"):
        assert found["forward"] == ["start 0", "start 1", "dense", "wait 0", "wait 1", "start 2", "wait 2"]
        assert found["backward"][:2] == ["start 2", "wait 2"]
        assert found["backward"][2:5] in (["start 1", "start 0", "dense"], ["start 0", "start 1", "dense"])
        assert sorted(found["backward"][5:]) == ["wait 0", "wait 1"]


def test_behind_the_first_of_several_parts_comes_the_dense_branch():
    for found in run_distributed(events_of_a_step, 2, "shared", "--moe-overlap-chunks 2"):
        assert found["forward"][:5] == ["start 0", "start 1", "dense", "start 2", "start 3"]
        assert found["backward"].index("dense") > max(found["backward"].index(f"start {n}") for n in range(4))


def test_a_branch_that_is_recomputed_waits_for_the_experts():
    for found in run_distributed(events_of_a_step, 2, "shared", "--recompute-granularity full"):
        assert found["forward"].index("dense") > found["forward"].index("wait 2")


# ---------------------------------------------------------------- under FSDP


def collectives(flags: str) -> dict[str, object]:
    """Of FSDP in a step, and how many elements of parameters are in memory behind it."""
    c = parity.config("modern", f"{flags} --zero-stage 3")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    divisor, live = count_loss_tokens(batches, mesh), LiveParameters(model)
    with CollectiveLog() as log:
        forward_backward(model, batches, divisor, mesh, parity.SEED, 0)
    live.look()
    return {"calls": log.of(""), "behind": live.parameters()}


def test_parameters_are_gathered_and_gradients_reduced_as_often_as_without_parts():
    plain = run_distributed(collectives, 4, EP)
    assert run_distributed(collectives, 4, f"{EP} --moe-overlap-chunks 3") == plain
    recomputed = run_distributed(collectives, 4, f"{EP} --recompute-granularity full")
    assert run_distributed(collectives, 4, f"{EP} --moe-overlap-chunks 3 --recompute-granularity full") == recomputed


# ---------------------------------------------------------------- parts without tokens


def losses_of_short_batches(flags: str) -> tuple[float, float]:
    """Rank 0 evaluates one sequence of one token, rank 1 two: fewer tokens than parts."""
    c = parity.config("pyramid", f"{parity.FP64} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    whole = parity.microbatches(0, 0, 1, 4)[0]
    mine = [slice(0, 1), slice(1, 3)][dist.get_rank()] if mesh.size("dp") == 2 else slice(0, 3)
    batch = Batch(*(None if t is None else t[mine][:, :1] if t.ndim == 2 else t[mine] for t in whole))
    return evaluate(model, [batch], mesh, torch.device("cpu")).lm_loss, len(moe_layers(model))


def test_parts_may_have_no_tokens():
    found = run_distributed(losses_of_short_batches, 2, f"{EP} --moe-overlap-chunks 4")
    alone = run_distributed(losses_of_short_batches, 1, "")[0]
    assert [loss for loss, _ in found] == pytest.approx([alone[0]] * 2, abs=1e-10)
