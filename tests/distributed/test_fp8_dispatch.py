"""--moe-fp8-dispatch: rows arrive as their quantised selves, gradients as they are, and the bytes are those that were promised."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity
from distributed import test_dispatchers as ways
from distributed.collectives import BytesSent
from megatron_moe.kernels.fp8 import dequantise_rows, quantise_rows
from megatron_moe.moe.dispatch import LocalDispatcher, build_dispatcher
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import build_mesh
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model

pytestmark = pytest.mark.distributed

K, COUNTS = 3, ways.TOKENS["unequal"]


def travelled(etp: int, chunks: int) -> dict:
    rank, ep = dist.get_rank(), dist.get_world_size() // etp
    mesh = build_mesh("cpu", 1, [ep], 0, etp=etp)
    group, slices = mesh.expert_group(ep), mesh.expert_tensor_group(ep)
    dispatcher = build_dispatcher("alltoall", ways.EXPERTS, K, group, slices=slices, chunks=chunks, fp8=True)
    x, ids, weights = ways.tokens_of(rank, COUNTS, K)
    experts = ways.FakeExperts(rank // etp * ways.EXPERTS // ep, (rank % etp + 1) / (etp * (etp + 1) / 2))
    plan = dispatcher.plan(ids)
    with BytesSent() as forward:
        y = dispatcher.through(experts, x, ids, weights, plan)
    with BytesSent() as backward:
        (y.square().sum() + y.sum()).backward()
    sent = {"forward": forward.of(group, slices), "backward": backward.of(group, slices), "plan": plan.sent_bytes}
    return {"y": y.detach(), "dx": x.grad, "dw": weights.grad, "rows": experts.rows} | sent


class Rounded(torch.autograd.Function):
    """Rows in FP8 and back; the gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return dequantise_rows(*quantise_rows(x), x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


def expected(world: int) -> dict:
    parts = [ways.tokens_of(r, COUNTS[:world], K) for r in range(world)]
    x, ids, weights = (torch.cat([p[i] for p in parts]).detach() for i in range(3))
    x.requires_grad_(), weights.requires_grad_()
    dispatcher, experts = LocalDispatcher(ways.EXPERTS), ways.FakeExperts(0)
    y = dispatcher.through(experts, Rounded.apply(x), ids, weights, dispatcher.plan(ids))
    (y.square().sum() + y.sum()).backward()
    return {"y": y.detach(), "dx": x.grad, "dw": weights.grad}


@pytest.mark.parametrize(("world", "etp", "chunks"), [(2, 1, 1), (4, 1, 3), pytest.param(4, 2, 1, marks=pytest.mark.matrix)])
def test_rows_arrive_rounded_and_gradients_exact(world, etp, chunks):
    found, want = run_distributed(travelled, world, etp, chunks), expected(world)
    for name, whole in want.items():
        torch.testing.assert_close(torch.cat([f[name] for f in found]), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_a_row_takes_a_byte_per_value_and_four_on_its_way_out(world):
    here = ways.EXPERTS // world
    routed = [ways.tokens_of(rank, COUNTS, K)[1].flatten().tolist() for rank in range(world)]
    pairs = [(source, e // here) for source, experts in enumerate(routed) for e in experts if e >= 0]
    row, weight, packed = ways.HIDDEN * 8, 8, ways.HIDDEN + 4
    for rank, found in enumerate(run_distributed(travelled, world, 1, 1)):
        out, back = sum(a == rank != b for a, b in pairs), sum(b == rank != a for a, b in pairs)
        forward = out * (packed + weight) + back * row
        backward = back * (row + weight) + out * row
        assert (found["forward"], found["backward"]) == found["plan"] == (forward, backward)


def fp8_of(flags: str) -> list[tuple[str, bool]]:
    c = parity.config("modern", flags)
    model = build_parallel_model(c, parity.VOCAB, build_parallel_mesh(c, "cpu"), torch.device("cpu"))
    return [(moe.dispatcher.name, moe.dispatcher.fp8) for moe in moe_layers(model)]


def test_the_flag_reaches_the_layers():
    assert run_distributed(fp8_of, 2, "--moe-expert-parallel-size 2 --moe-fp8-dispatch")[0] == [("alltoall", True)] * 2
    assert run_distributed(fp8_of, 2, "--moe-expert-parallel-size 2")[0] == [("alltoall", False)] * 2
