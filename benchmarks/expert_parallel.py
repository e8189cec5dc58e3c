"""a training step, and a MoE layer, with experts over 2 and 4 gloo ranks of one thread against one process with a thread per core, wall time

The model, the flags and the global batch of `step`: 4 x 512 tokens, which the ranks share out; and a layer of `moe_layer`, forward and backward: 4096
tokens, 8 experts, top-2, GELU. Every system is of its own processes, which wait while others run; before anything is timed each takes three
steps, whose losses have to agree (of the layer: the squares of outputs and gradients), and 20 more.

Where the time of a rank goes is measured in turns of their own, which are not compared. There the ranks meet before every collective, and
it is waited for at once: what passes until they have met is "waiting", for ranks that had more to do; the collective itself moves bytes,
of rows or of weights, and nothing else runs meanwhile. "packing" is sorting, gathering and adding up rows, "sharding" the copies of FSDP, "update"
norm, clip and AdamW, "compute" all else. Bytes are those that a rank has to send at least.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from benchmarks import harness
from benchmarks.harness import Apart, Report, interleave, paired_ratio, say, spread, table, timing_table
from benchmarks.moe_layer import Case, Made
from benchmarks.product import Training, one_rank
from benchmarks.step import CHECKED_STEPS, FLAGS, QUICK
from megatron_moe.config.flags import flag
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.moe.dispatch import AllToAllDispatcher, base, build_dispatcher
from megatron_moe.moe.layer import moe_layers
from megatron_moe.training import step as training_step
from megatron_moe.training.distributed import init_distributed
from megatron_moe.utils.groups import end_groups

PEERS: dict[str, str] = {}

# Before anything is timed: until then oneDNN compiles kernels for numbers of rows that it has not seen, and the heap grows.
ROUNDS, WARMUPS, SPLIT_TURNS = 9, 20, 5
ONE = "one process"
COMPUTE, PACKING, SHARDING, UPDATE, ROWS, WEIGHTS, WAITING = (
    "compute",
    "packing",
    "sharding",
    "update",
    "rows move",
    "weights move",
    "waiting",
)
PARTS = (COMPUTE, PACKING, SHARDING, UPDATE, ROWS, WEIGHTS, WAITING)


@dataclass(frozen=True)
class Options(harness.Options):
    """Options of this benchmark."""

    what: tuple[Literal["step", "layer"], ...] = flag(("step", "layer"), "cases: a whole training step, a MoE layer")
    dtype: tuple[Literal["fp32", "bf16"], ...] = flag(("fp32", "bf16"), "cases: --bf16 or not")
    ranks: tuple[int, ...] = flag((2, 4), "cases: ranks that share the experts out; each must divide 4", minimum=2)
    routing: tuple[Literal["learned", "balanced"], ...] = flag(
        ("learned", "balanced"), "cases of a step: as its router decides, or all experts alike: then no rank waits for another one's rows"
    )


def run(options: Options) -> Report:
    cores = len(os.sched_getaffinity(0))
    dtypes, worlds = (("fp32",), (2,)) if options.quick else (options.dtype, options.ranks)
    flags = f"{(QUICK if options.quick else FLAGS)['mixtral']} --distributed-backend gloo"
    report = Report(
        "expert_parallel", {"flags": flags, "threads_of_one_process": cores, "threads_of_a_rank": 1, "rounds": options.rounds_or(ROUNDS)}
    )
    steps = [("step", *case) for case in itertools.product(dtypes, options.routing)] if "step" in options.what else []
    for what, dtype, *routing in steps + [("layer", dtype) for dtype in dtypes if "layer" in options.what]:
        if what == "layer":
            build = partial(layer_system, layer_case(dtype, options.quick))
        else:
            build = partial(step_system, f"{flags} --moe-router-policy balanced" if routing == ["balanced"] else flags, dtype)
        systems = {ONE: Apart(ONE, partial(build, 1, cores))}
        for ranks in worlds:
            systems[f"EP {ranks}"] = Apart(f"EP {ranks}", partial(build, ranks, 1), ranks)
        try:
            # a step's balanced choice goes by the place in the micro-batch, which is another one where ranks share the batch out
            is_other = dtype == "bf16" or routing == ["balanced"]
            measure(report, ", ".join([what, dtype, *routing]), systems, 2e-2 if is_other else 1e-4, options)
        finally:
            for each in systems.values():
                each.close()
    return report


def layer_case(dtype: str, is_small: bool) -> Case:
    return Case(8, 2, "gelu", dtype, "balanced", *((64, 32, 48) if is_small else ()))


def shared_out(flags: str, ranks: int) -> str:
    """The flags of each of `ranks`, which have a part of the batch and of the experts."""
    if ranks == 1:
        return flags
    words = flags.split()
    place = words.index("--micro-batch-size") + 1
    words[place] = str(int(words[place]) // ranks)
    return " ".join([*words, "--moe-expert-parallel-size", str(ranks)])


def measure(report: Report, case: str, systems: dict[str, Apart], tolerance: float, options: Options) -> None:
    losses = {name: first_steps(each) for name, each in systems.items()}
    check_equal(losses, tolerance)
    samples = interleave(list(systems.values()), options.rounds_or(ROUNDS), warmups=0 if options.quick else WARMUPS)
    report.samples[case] = samples
    wall = {name: paired_ratio(samples, name, ONE, "wall") for name in samples}
    splits = {name: split_of(each, 1 if options.quick else SPLIT_TURNS) for name, each in systems.items()}
    report.figures[case] = {
        "losses_of_the_first_steps": losses, "split_in_seconds": splits, "wall_over_one_process": {n: r._asdict() for n, r in wall.items()},
    }  # fmt: skip
    ratios = {f"wall / {ONE}": lambda name: f"{wall[name].median:.2f} ({wall[name].low:.2f}-{wall[name].high:.2f})"}
    report.tables.append(f"{case}\n" + timing_table(samples, ONE, ratios))
    report.tables.append(f"{case}: where the time of a rank goes, milliseconds, each collective by itself\n" + split_table(splits))


def first_steps(each: Apart) -> list[float]:
    say(f"first steps: {each.name}")
    return [each.results("check")[0] for _ in range(CHECKED_STEPS)]


def check_equal(losses: dict[str, list[float]], tolerance: float) -> None:
    for name, found in losses.items():
        for a, b in zip(found, losses[ONE]):
            assert abs(a - b) < tolerance * abs(b), f"{name} and {ONE} do not do the same: losses {found} and {losses[ONE]}"


def split_of(each: Apart, turns: int) -> list[dict[str, float]]:
    """Medians, of each rank."""
    found = [each.results("take apart") for _ in range(turns)]
    return [{key: spread(turn[rank][key] for turn in found).median for key in found[0][rank]} for rank in range(len(found[0]))]


def split_table(splits: dict[str, list[dict[str, float]]]) -> str:
    rows = []
    for name, ranks in splits.items():
        for rank, parts in enumerate(ranks):
            total = sum(parts[part] for part in PARTS)
            cells = [f"{1e3 * seconds:.1f}" for seconds in (total, *(parts[part] for part in PARTS))]
            rows.append([f"{name}, rank {rank}", *cells, f"{parts['bytes of rows'] / 1e6:.1f}", f"{parts['bytes of weights'] / 1e6:.1f}"])
    return table(["", "step", *PARTS, "MB of rows", "MB of weights"], rows)


# ---------------------------------------------------------------- in the processes


@contextlib.contextmanager
def step_system(flags: str, dtype: str, ranks: int, threads: int) -> Iterator[Callable[..., Any]]:
    """A step on the same batch each time, and its loss."""
    torch.set_num_threads(threads)
    flags = f"{flags} --bf16" if dtype == "bf16" else flags
    with one_rank(shared_out(flags, ranks), ranks) as (world, mesh):
        training = Training(shared_out(flags, ranks), world, mesh)
        batches = training.next_batches()
        assert ranks == 1 or isinstance(moe_layers(training.model)[0].dispatcher, AllToAllDispatcher)
        yield turns(lambda _: float(training.step(batches).lm_loss))


@contextlib.contextmanager
def layer_system(case: Case, ranks: int, threads: int) -> Iterator[Callable[..., Any]]:
    """Forward and backward of a layer without anything around it: gradients of router and tokens stay on their rank."""
    torch.set_num_threads(threads)
    world = init_distributed(ParallelConfig(distributed_backend="gloo"))
    try:
        torch.manual_seed(0)
        made = Made(case)
        layer, own = made.layer, slice(world.rank * case.tokens // ranks, (world.rank + 1) * case.tokens // ranks)
        if ranks > 1:
            layer.dispatcher = build_dispatcher("alltoall", case.experts, case.k, dist.group.WORLD)
            for name, p in list(layer.experts.named_parameters()):
                setattr(layer.experts, name, nn.Parameter(p.detach().chunk(ranks)[world.rank].clone()))
        x_TD, upstream_TD = made.x_TD.detach()[own].clone().requires_grad_(), made.upstream_TD[own]

        def turn(is_checked: bool) -> float:
            layer.begin_step(1.0 / case.tokens)
            y_TD = layer(x_TD)
            y_TD.backward(upstream_TD)
            found = [y_TD, x_TD.grad, *(p.grad for p in layer.experts.parameters())] if is_checked else []
            squares = [dist_sum(t.detach().double().square().sum()) for t in found]
            for t in (x_TD, *layer.parameters()):
                t.grad = None
            return sum(float(s) / float(squares[0]) for s in squares) + float(squares[0]) if squares else 0.0

        yield turns(turn)
    finally:
        end_groups()


def dist_sum(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def turns(turn: Callable[[bool], float]) -> Callable[..., Any]:
    """What a process is asked for: a turn; its numbers, to be compared; or where its time went."""

    def asked(what: str = "") -> Any:
        if what != "take apart":
            return turn(what == "check")
        split = Split()
        with split.watching():
            turn(False)
        return split.found()

    return asked


class Split:
    """Seconds of a step by what this rank did, and bytes by what they were."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self._inside, self._since = [COMPUTE], time.perf_counter()

    def found(self) -> dict[str, float]:
        self._book()
        sent = {f"bytes of {what}": self.bytes[part] for what, part in (("rows", ROWS), ("weights", WEIGHTS))}
        return {part: self.seconds[part] for part in PARTS} | sent

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside of it counts for it, unless it is in a part of its own."""
        self._book()
        self._inside.append(name)
        try:
            yield
        finally:
            self._book()
            self._inside.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for owner, names, part in (
                (AllToAllDispatcher, ("plans", "depart", "arrive", "depart_back", "arrive_back"), PACKING),
                *((function, ("backward",), PACKING) for function in (base._Gather, base._Sum, base._Reorder)),
                (_fsdp_param_group.FSDPParamGroup, ("unshard", "wait_for_unshard", "post_backward"), SHARDING),
                (training_step, ("update",), UPDATE),
            ):
                for name in names:
                    inside = self._inside_of(part, getattr(owner, name))
                    patches.enter_context(
                        mock.patch.object(owner, name, staticmethod(inside) if part is PACKING and name == "backward" else inside)
                    )
            for name, part, share in COLLECTIVES:
                if hasattr(dist, name):
                    patches.enter_context(mock.patch.object(dist, name, self._by_itself(getattr(dist, name), part, share)))
            yield

    def _inside_of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return timed

    def _by_itself(self, collective: Callable[..., Any], part: str, share: Callable[[int], float]) -> Callable[..., Any]:
        def alone(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            ranks, moved, sends = dist.get_world_size(group), part, share
            if part is ROWS and len(args) == 2:  # in equal parts: counts of rows, or gradients on their way to be added up
                moved, sends = WEIGHTS if args[1].is_floating_point() else ROWS, lambda ranks: (ranks - 1) / ranks
            with self.part(WAITING):
                dist.barrier(group=group)
            with self.part(moved):
                work = collective(*args, **kwargs)
                if work is not None:
                    work.wait()
            self.bytes[moved] += sent_bytes(args, kwargs) * sends(ranks)
            return work

        return alone


# Name in torch.distributed, of any version; what it moves; what a rank sends of its input.
COLLECTIVES = (
    ("all_to_all_single", ROWS, lambda ranks: 1.0),  # with a size for each rank: others' alone are counted
    ("all_gather_into_tensor", WEIGHTS, lambda ranks: ranks - 1.0),
    ("all_gather_single", WEIGHTS, lambda ranks: ranks - 1.0),
    ("reduce_scatter_tensor", WEIGHTS, lambda ranks: (ranks - 1) / ranks),
    ("reduce_scatter_single", WEIGHTS, lambda ranks: (ranks - 1) / ranks),
    ("all_reduce", WEIGHTS, lambda ranks: 2 * (ranks - 1) / ranks),
)


def sent_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of the input of a collective; where each rank has a size of its own (output, input, receive, send), without what stays here."""
    x: Tensor = kwargs.get("input", kwargs.get("input_tensor", args[-1] if len(args) == 1 else args[1] if args else None))
    if len(args) < 4:
        return x.numel() * x.element_size()
    here = dist.get_rank(kwargs.get("group"))
    return sum(rows for rank, rows in enumerate(args[3]) if rank != here) * x[:1].numel() * x.element_size()
