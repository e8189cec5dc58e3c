"""Between two log lines the loop waits for nothing, and the fused all-to-all for what it says it waits for."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed
from host_syncs import HostSyncs
from training.runs import train_here

from megatron_moe.data.batch import Batch
from megatron_moe.training import pretrain

pytestmark = pytest.mark.distributed

QUIET = "--mock-data --train-iters 6 --log-interval 3 --eval-iters 0 --no-exit-signal-handler"


def waits_of_a_run(flags: str, fault: str | None = None) -> list[str]:
    """What the steps of a run wait for where it does not log; the first one, which makes things, is not looked at. (Without the signal
    handler, whose answer the ranks agree on over gloo, in tensors of the host.)"""
    syncs, steps = HostSyncs(), []

    def unseen(function):
        def called(*args, **kwargs):
            before = len(syncs.seen)
            try:
                return function(*args, **kwargs)
            finally:
                del syncs.seen[before:]

        return called

    def step(*args, **kwargs):
        result = original(*args, **kwargs)
        steps.append(len(args[2]))
        if len(steps) == 1:
            syncs.seen.clear()
        return result

    def to(batch, device, non_blocking=False):
        return move(batch, device)

    original, move, train = pretrain.train_step, Batch.to, pretrain.train

    def looked_at(run):
        with syncs:
            train(run)

    faults = {"batch": mock.patch.object(Batch, "to", to), "step": mock.patch.object(pretrain, "tell_repeats", lambda run: float(run.model.norm.weight.sum()))}  # fmt: skip
    with (
        mock.patch.object(pretrain, "log_step", unseen(pretrain.log_step)),
        mock.patch.object(pretrain, "train_step", step),
        mock.patch("training.runs.train", looked_at),
        faults.get(fault, mock.MagicMock()),
    ):
        train_here(f"{QUIET} {flags}")
    assert len(steps) == 6
    return syncs.seen


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (1, "--fp16"),
        (1, "--fp16 --fp16-master-weights-and-grads"),
        (1, "--optimizer muon"),
        (2, "--moe-expert-parallel-size 2 --moe-token-dispatcher allgather --global-batch-size 8"),
    ],
    ids=["one process", "with a loss scale", "weights in fp16", "muon", "allgather"],
)
def test_a_run_waits_for_nothing_between_two_log_lines(world, flags):
    assert run_distributed(waits_of_a_run, world, flags) == [[]] * world


@pytest.mark.parametrize(("fault", "seen"), [("batch", "to the CPU in batch.py"), ("step", "_local_scalar_dense in pretrain.py")])
def test_a_planted_wait_of_the_loop_is_seen(fault, seen):
    (found,) = run_distributed(waits_of_a_run, 1, "", fault)
    assert seen in {re.sub(r":\d+", "", s) for s in found}


# ---------------------------------------------------------------- the fused all-to-all

interpreted = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton and memfd_create are of Linux"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def counted(seen: list[str]) -> dict[str, int]:
    return dict(Counter(re.sub(r":\d+", "", s) for s in seen))


def waits_of_a_layer(policy: str, tokens: tuple[int, ...]) -> dict[str, int]:
    """Of the second of two rounds to the experts and back, forward and backward."""
    import torch.distributed as dist

    from tests.distributed.fused_ranks import Case, build, tokens_of

    case = Case(tokens, 2, 4, 8)
    dispatcher = build(case, policy)
    x, ids, weights = tokens_of(case, dist.get_rank())
    x.requires_grad_(), weights.requires_grad_()
    for _ in range(2):
        with HostSyncs() as syncs:
            y = dispatcher.through(lambda rows, ends, w, spare: rows * w[:, None], x, ids, weights, dispatcher.plan(ids))
            y.square().sum().backward()
    return counted(syncs.seen)


class TestFused:
    pytestmark = interpreted

    @pytest.mark.parametrize("tokens", [(9,), (5, 8)], ids=["one rank", "two ranks"])
    @pytest.mark.parametrize(("policy", "allowed"), [("static", {}), ("worst", {}), ("exact", {"tolist in exchange.py": 1})])
    def test_a_layer_waits_only_where_its_room_is_exact(self, policy, allowed, tokens):
        assert run_distributed(waits_of_a_layer, len(tokens), policy, tokens, interpret=True) == [allowed] * len(tokens)

    def test_a_step_asks_once_whether_all_rows_had_room(self):
        """However many layers and micro-batches: the exchange for what was wanted, and all ranks for whether any lacked room."""
        for found in run_distributed(waits_of_a_fused_step, 2, interpret=True):
            assert found == {"tolist in exchange.py": 1, "tensor to the device in room.py": 1, "_local_scalar_dense in room.py": 1}


def waits_of_a_fused_step() -> dict[str, int]:
    from megatron_moe.optimizer.groups import build_optimizer
    from megatron_moe.parallel.apply import build_parallel_mesh
    from megatron_moe.training.room import build_room
    from megatron_moe.training.step import train_step
    from tests.distributed import parity
    from tests.distributed.fused_ranks import SMALL, with_kernels

    c = parity.config("noisy", SMALL)
    mesh = build_parallel_mesh(c, "cpu")
    model = with_kernels("static", 4.0)(c, parity.VOCAB, mesh, torch.device("cpu"))
    optimizer, room = build_optimizer(model, c.optimizer), build_room(model, torch.device("cpu"))
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2, c)
    for i in range(2):
        with HostSyncs() as syncs:
            train_step(model, optimizer, batches, mesh, 0.5, 1.0, parity.SEED, i, room=room)
    assert room.repeats == 0 and len(batches) > 1
    return counted(syncs.seen)
