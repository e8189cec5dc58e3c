"""What each ZeRO stage sends and keeps, counted, against the table of docs/parallelism.md worked out by hand.

A step of several microbatches runs through `train_step`; collectives are counted per phase (forward 0, backward 0, forward 1, ...,
update), and memory is looked at behind each. Expected figures come from the widths of the model alone.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from distributed.collectives import CollectiveLog, LiveParameters, elements
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

# The "modern" model has no biases, and widths that every number of ranks here divides: nothing is padded.
HIDDEN, FFN, LAYERS, MOE_LAYERS, EXPERTS, VOCAB = 32, 48, 3, 2, 4, 64
ROOT = 2 * VOCAB * HIDDEN + HIDDEN  # embedding, head, last norm
BLOCK = 4 * HIDDEN * HIDDEN + 2 * HIDDEN  # attention and two norms
DENSE_BLOCK, MOE_BLOCK = BLOCK + 3 * HIDDEN * FFN, BLOCK + EXPERTS * HIDDEN  # an MLP, or a gate
DENSE = ROOT + (LAYERS - MOE_LAYERS) * DENSE_BLOCK + MOE_LAYERS * MOE_BLOCK
EXPERT = 3 * HIDDEN * FFN  # one
DENSE_UNITS, EXPERT_UNITS = 1 + LAYERS, MOE_LAYERS  # what FSDP gathers and reduces in one call


class Step(NamedTuple):
    """What one rank saw; elements of float32 by phase."""

    calls: dict[str, Counter]
    parameters: dict[str, int]
    gradients: dict[str, int]
    moments: int
    most_parameters: int  # at any moment of a forward
    total: int  # parameters of the model


def count_step(flags: str) -> Step:
    """The second step of a run: the first one has no optimizer state yet, and gathers nothing that an earlier one left."""
    c = parity.config("modern", flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, c.optimizer)
    total = sum(p.numel() for p in model.parameters())
    live, log = LiveParameters(model), CollectiveLog()
    calls, parameters, gradients = {}, {}, {}
    phases: list[str] = []

    def look(name: str) -> None:
        live.look()
        calls[name], parameters[name], gradients[name] = log.of(name), live.parameters(), live.gradients()

    def begin(*_) -> None:
        if phases:
            look(phases[-1])
        phases.append(f"forward {len(phases) // 2}")
        log.phase = phases[-1]

    def between(*_) -> None:
        look(phases[-1])
        phases.append(f"backward {len(phases) // 2}")
        log.phase = phases[-1]

    def update(*_) -> None:
        look(phases[-1])
        log.phase = "update"

    model.register_forward_pre_hook(begin, prepend=True)  # before FSDP gathers
    model.register_forward_hook(between)  # after FSDP frees
    optimizer.register_step_pre_hook(update)
    for step in range(2):
        phases.clear()
        log.phase = "begin"
        log.calls.clear()
        live.peak = 0
        batches = parity.microbatches(step, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
        with log:
            train_step(model, optimizer, batches, mesh, 1e-3, 1.0, parity.SEED, step)
        look("update")
        look("begin")
    moments = elements(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return Step(calls, parameters, gradients, moments, live.peak, total)


LAYOUTS = [  # ranks, expert-parallel degree: experts sharded over as many ranks as the rest, over none, over fewer
    (2, 1),
    (2, 2),
    (4, 2),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_stage_sends_and_keeps_what_its_definition_says(world, ep, stage):
    flags = f"--zero-stage {stage} --moe-expert-parallel-size {ep} --moe-token-dispatcher alltoall --micro-batch-size 1"
    found = run_distributed(count_step, world, flags)[0]
    experts = EXPERT * EXPERTS // ep  # of one layer, on this rank
    whole = DENSE + MOE_LAYERS * experts
    shard = DENSE // world + MOE_LAYERS * experts // (world // ep) if stage else whole
    assert found.total == DENSE + MOE_LAYERS * EXPERTS * EXPERT

    # FSDP's collectives: over the data ranks for the dense units, over the ranks that hold the same experts for the experts
    def of(kind: str, dense_units: int, dense: int) -> Counter:
        calls = Counter({(kind, world, "calls"): dense_units, (kind, world, "elements"): dense})
        if world > ep:
            calls += Counter({(kind, world // ep, "calls"): EXPERT_UNITS, (kind, world // ep, "elements"): MOE_LAYERS * experts})
        return calls

    nothing = Counter()
    gathered = of("all-gather", DENSE_UNITS, DENSE)
    gathered_again = of("all-gather", DENSE_UNITS - 1, DENSE - ROOT)  # the root stays: its backward begins at once
    reduced = of("reduce-scatter" if stage else "all-reduce", DENSE_UNITS, DENSE)
    scalar = Counter({("all-reduce", world, "calls"): 1, ("all-reduce", world, "elements"): 1})
    assert found.calls["begin"] == scalar  # how many tokens have a loss

    last = parity.SEQUENCES // world - 1
    assert last >= 1  # several microbatches
    for i in range(last + 1):
        forward, backward = f"forward {i}", f"backward {i}"
        is_last = i == last
        assert found.calls[forward] == (gathered if stage == 3 or (stage and i == 0) else nothing), forward
        expected = (gathered_again if stage == 3 else nothing) + (reduced if stage >= 2 or is_last else nothing)
        if is_last:
            expected += scalar + scalar  # loss and gradient norm
        assert found.calls[backward] == expected, backward
        # FSDP computes on a copy, also where there is nothing to gather (stage 0)
        kept = shard + (ROOT if stage == 3 else whole)
        assert found.parameters[forward] == kept, forward
        assert found.parameters[backward] == (shard if stage == 3 or is_last else kept), backward
        before = 0 if i == 0 else whole if stage < 2 else shard
        assert found.gradients[forward] == before, forward
        assert found.gradients[backward] == (shard if stage >= 2 or is_last else whole), backward
    assert found.most_parameters == shard + (ROOT + MOE_BLOCK + experts if stage == 3 else whole)

    # the update computes on shards, and leaves nothing gathered that the next forward could take for the new weights
    assert found.calls["update"] == nothing
    assert (found.parameters["update"], found.gradients["update"]) == (shard, 0)
    assert found.moments == 2 * shard
