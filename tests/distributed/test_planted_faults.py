"""Negative controls: with one ingredient left out, the parity check must see it. A check that cannot fail proves nothing."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed
from torch.distributed.tensor import DTensor

from distributed import parity

pytestmark = pytest.mark.distributed


@contextmanager
def fsdp_averages():
    """FSDP's own division: dense gradients world times too small, experts by another factor."""
    from torch.distributed.fsdp import FSDPModule

    with mock.patch.object(FSDPModule, "set_gradient_divide_factor"), mock.patch.object(FSDPModule, "set_force_sum_reduction_for_comms"):
        yield


@contextmanager
def router_gradient_not_partial():
    """Every tensor-parallel rank routes its own tokens, and the parts of the router's gradient are not added."""

    def plain(weight):
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with mock.patch("megatron_moe.moe.gate.local_weight", plain):
        yield


@contextmanager
def counts_not_shared():
    """The balance loss of each tensor-parallel slice instead of the microbatch's."""
    with mock.patch("megatron_moe.parallel.apply.share_microbatch_counts"):
        yield


@contextmanager
def gather_backward_sums():
    """The gradient of the gathered tokens reduce-scattered instead of sliced: TP times too large."""
    from megatron_moe.parallel import tensor

    def backward(ctx, grad):
        return grad[tensor._bounds(ctx.tokens, ctx.group)] * torch.distributed.get_world_size(ctx.group), None, None

    with mock.patch.object(tensor._Gather, "backward", staticmethod(backward)):
        yield


@contextmanager
def gate_weight_lost_on_the_way():
    """Rows arrive with the weights of other rows."""
    from megatron_moe.moe.dispatch import AllToAllDispatcher

    original = AllToAllDispatcher.dispatch

    def dispatch(self, *args):
        rows, offsets, weights, plan = original(self, *args)
        return rows, offsets, weights.flip(0), plan

    with mock.patch.object(AllToAllDispatcher, "dispatch", dispatch):
        yield


@contextmanager
def norm_counts_replicas():
    """Each rank's squares added up without regard to who holds the same element."""
    with mock.patch("distributed.parity.gradient_norm", lambda parameters, ranks: real_norm(parameters, 1)):
        yield


def real_norm(parameters, ranks):
    from megatron_moe.optimizer.clip import gradient_norm

    return gradient_norm(parameters, ranks)


FAULTS = {f.__name__: f for f in (fsdp_averages, router_gradient_not_partial, counts_not_shared, gather_backward_sums,
                                  gate_weight_lost_on_the_way, norm_counts_replicas)}  # fmt: skip


def layout_with(fault: str, model: str, flags: str):
    with FAULTS[fault]():
        return parity.layout(model, flags)


TP_EP = "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2"


@pytest.mark.parametrize(
    ("fault", "flags", "seen_in", "at_least"),
    [
        ("fsdp_averages", "--moe-expert-parallel-size 2", "gradient layers.1.mlp.fc1.weight", 0.4),
        ("router_gradient_not_partial", TP_EP, "gradient layers.3.moe.gate.weight", 0.05),
        ("counts_not_shared", TP_EP, "gradient layers.3.moe.gate.weight", 1e-3),
        ("gather_backward_sums", TP_EP, "gradient layers.3.moe.experts.w1", 0.4),
        ("gate_weight_lost_on_the_way", "--moe-expert-parallel-size 2 --moe-token-dispatcher alltoall", "loss 0", 1e-6),
        ("norm_counts_replicas", TP_EP, "ones", 0.1),
    ],
)
def test_planted_fault_is_seen(fault, flags, seen_in, at_least):
    found = run_distributed(layout_with, 2, fault, "pyramid", f"{parity.FP64} --zero-stage 1 {flags}")[0]
    seen = parity.errors(found, parity.reference("pyramid"))
    assert seen[seen_in] > at_least, f"{seen_in} is only {seen[seen_in]:.1e} off with {fault}"
