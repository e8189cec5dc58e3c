"""All layouts of a model on a number of devices: which are valid, which fit, which is fastest.

What is valid only the configuration says (Layout.problems). To ask it about every combination would take minutes, so it is asked about
three projections of a layout, with the other axes at values that ask for nothing, and about whole layouts before they are shown:

    stages      TP, SP, CP, PP, virtual stages, micro-batch     divisibility, sequence length, rounds of a schedule
    experts     TP, SP, CP, PP, EP, ETP                         the expert mesh
    sharding    TP, CP, PP, ZeRO, replicas                      hybrid sharding
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from megatron_moe.config.model import divisors
from megatron_moe.config.run import FIELDS, RunConfig
from megatron_moe.training.planning.layout import SETTINGS, Layout, exists, of_run
from megatron_moe.training.planning.machines import Assumptions, Machine
from megatron_moe.training.planning.memory import Memory, memory
from megatron_moe.training.planning.time import StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8)
DOES_NOT_FIT = "does not fit into the memory of a device"


@dataclass(frozen=True)
class Planned:
    """A layout with what it is predicted to need and take."""

    layout: Layout
    memory: Memory
    time: StepTime

    @property
    def order(self) -> tuple[float, float]:
        return self.time.total, self.memory.total


@dataclass
class Found:
    """`best`: fastest first. `left_out`: combinations by reason. `nearest`: the valid one that needs least memory."""

    best: list[Planned] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    tried: int = 0
    valid: int = 0
    fitting: int = 0
    nearest: Planned | None = None


@dataclass(frozen=True)
class Space:
    """Values of every axis. `fixed` axes have the one of the command."""

    devices: int
    devices_per_node: int
    num_layers: int
    start: Layout
    fixed: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()  # settings with a value in the command for which no flag says: none

    def values(self, axis: str, candidates: Iterable) -> list:
        """What does not exist has the value that it would have without being asked for."""
        if axis in self.fixed:
            return [getattr(self.start, axis)]
        return list(candidates) if exists(axis) else [getattr(Layout(1), axis)]

    def stages(self) -> Iterator[Layout]:
        """TP stays within a node, as each layer's exchanges are in everyone's way."""
        n = self.devices
        for tp in self.values("tp", (d for d in divisors(n) if d <= self.devices_per_node)):
            for cp, pp in itertools.product(self.values("cp", divisors(n)), self.values("pp", divisors(n))):
                if n % (tp * cp * pp):
                    continue
                virtual = [None, *divisors(max(self.num_layers // pp, 1))[:-1]] if pp > 1 else [None]
                virtual = [v for v in virtual if v is not None or pp == 1 or "virtual" not in self.given]
                for sp, v in itertools.product(self.values("sp", (False, True) if tp > 1 else (False,)), self.values("virtual", virtual)):
                    yield Layout(n, tp=tp, sp=sp, cp=cp, pp=pp, virtual=v)

    def micro_batches(self) -> list[int]:
        return self.values("micro_batch", MICRO_BATCHES)

    def experts(self, stage: Layout) -> Iterator[tuple[int, int]]:
        for etp in self.values("etp", (d for d in divisors(stage.stage_ranks) if d <= self.devices_per_node)):
            for ep in self.values("ep", divisors(stage.stage_ranks)):
                yield ep, etp

    def sharding(self, stage: Layout) -> Iterator[tuple[int, int]]:
        """(ZeRO, replicas): parts of a node, for hybrid sharding, or all in one."""
        in_node = max(self.devices_per_node // stage.tp, 1)
        parts = [1] + [stage.data_ranks // in_node] * (stage.data_ranks > in_node and stage.data_ranks % in_node == 0)
        for zero in self.values("zero", (0, 1, 2, 3)):
            for replicas in self.values("replicas", parts if zero else (1,)):
                yield zero, replicas

    def recompute(self) -> list[str | None]:
        kinds = (None, "selective", "full")
        return self.values("recompute", kinds[1:] if "recompute" in self.given else kinds)


class Judge:
    """Asks the configuration, and remembers. Counted are combinations of the projections that it refuses, by kind of reason."""

    def __init__(self, run: RunConfig):
        self.run, self.left_out, self.known = run, Counter(), {}

    def allows(self, layout: Layout) -> bool:
        if layout not in self.known:
            problems = layout.problems(self.run)
            self.known[layout] = not problems
            if problems:
                self.left_out[reason(problems[0])] += 1
        return self.known[layout]


def reason(problem: str) -> str:
    """A kind of problem: its sentence without numbers and what to do, so that it can be counted."""
    text = re.sub(r"\s*\([^)]*\)", "", problem.split(";")[0])
    return re.sub(r"\b\d+(, \d+)*\b", "N", text).strip()


def valid_layouts(run: RunConfig, space: Space, judge: Judge) -> Iterator[Layout]:
    """`run` has its global batch; see `pinned`."""
    zero, replicas = next(iter(space.sharding(Layout(space.devices))))
    for stage in space.stages():
        base = replace(stage, zero=zero if zero < 2 else 1, recompute=None)
        micro_batches = [b for b in space.micro_batches() if judge.allows(replace(base, micro_batch=b))]
        if not micro_batches:
            continue
        base = replace(base, micro_batch=micro_batches[0])
        experts = [(ep, etp) for ep, etp in space.experts(stage) if judge.allows(replace(base, ep=ep, etp=etp))]
        sharding = [(z, r) for z, r in space.sharding(stage) if judge.allows(replace(base, zero=z, replicas=r))]
        for b, (ep, etp), (z, r), how in itertools.product(micro_batches, experts, sharding, space.recompute()):
            yield replace(stage, micro_batch=b, ep=ep, etp=etp, zero=z, replicas=r, recompute=how)


def pinned(run: RunConfig, devices: int) -> RunConfig:
    """With the global batch of the command: layouts are compared at the same batch. Where it gives none, the number of devices, so that
    every layout has a micro-batch."""
    given = run.training.global_batch_size
    if given is None:
        steps = run.training.gradient_accumulation_steps or 1
        given = run.training.micro_batch_size * steps * max(run.data_parallel_size(devices), 1)
        given = -(-given // devices) * devices
    return replace(run, training=replace(run.training, global_batch_size=given, gradient_accumulation_steps=None))


def search(
    run: RunConfig, vocab_size: int, machine: Machine, devices: int, assumed: Assumptions, top: int = 10,
    fixed: frozenset[str] = frozenset(), progress: Callable[[int], None] = lambda n: None,
) -> Found:  # fmt: skip
    """`run` as the command says it. Every valid layout is weighed; the `top` fastest that fit come back."""
    space = space_of(run, machine, devices, fixed)
    run = pinned(run, devices)
    judge, found = Judge(run), Found()
    batch, room = run.training.global_batch_size, machine.memory_gb * 1e9 * (1 - assumed.memory_reserve)
    heap: list[tuple] = []
    plain = Layout(devices).applied(run)  # sizes are asked of this one: it does not change, so what is asked is remembered
    for number, layout in enumerate(valid_layouts(run, space, judge)):
        progress(number)
        need = memory(plain, layout, vocab_size, batch, assumed.load_skew, machine.is_cpu)
        found.valid += 1
        if found.nearest is None or need.total < found.nearest.memory.total:
            found.nearest = Planned(layout, need, step_time(plain, layout, vocab_size, batch, machine, assumed))
        if need.total > room:
            found.left_out[DOES_NOT_FIT] += 1
            continue
        found.fitting += 1
        planned = Planned(layout, need, step_time(plain, layout, vocab_size, batch, machine, assumed))
        heapq.heappush(heap, (-planned.time.total, -need.total, number, planned))
        if len(heap) > 4 * top:  # more than are shown: the whole layout may be refused below
            heapq.heappop(heap)
    for *_, planned in sorted(heap, key=lambda entry: entry[-1].order):
        if len(found.best) < top and judge.allows(planned.layout):
            found.best.append(planned)
    found.left_out += judge.left_out
    found.tried = found.valid + judge.left_out.total()
    return found


def space_of(run: RunConfig, machine: Machine, devices: int, fixed: frozenset[str] = frozenset()) -> Space:
    given = {axis for axis in ("virtual", "recompute") if getattr(_owner(run, axis), SETTINGS[axis], None) is not None}
    return Space(devices, machine.devices_per_node, run.model.num_layers, of_run(run, devices), fixed, frozenset(given))


def _owner(run: RunConfig, axis: str) -> object:
    return run.training if axis == "recompute" else run.parallel


def axis_of(flag: str) -> str | None:
    """tensor-model-parallel-size, --tensor_model_parallel_size or tp -> tp."""
    name = flag.lstrip("-").replace("-", "_")
    if name in SETTINGS:
        return name
    options = {option.lstrip("-").replace("-", "_"): axis for axis, s in SETTINGS.items() if s in FIELDS for option in FIELDS[s].options}
    return options.get(name)
