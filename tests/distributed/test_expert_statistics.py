"""What is logged about the experts of a layout: bytes as they are sent, and the same loads as in one process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.moe import dispatch
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2"


class Wire:
    """Counts bytes to other ranks where they leave, forward and backward: in the three functions that move rows."""

    def __init__(self):
        self.sent, self.originals = 0, {n: getattr(dispatch, n) for n in ("all_to_all_rows", "all_gather_rows", "reduce_scatter_rows")}

    def patches(self):
        return [mock.patch.object(dispatch, name, getattr(self, name)) for name in self.originals]

    def _count(self, name, out: int, back: int, *args):
        """`out` elements leave now; of the gradient of what arrives, `back`."""
        y = self.originals[name](*args)
        self.sent += out * y.element_size()
        if y.requires_grad:
            y.register_hook(lambda g: setattr(self, "sent", self.sent + back * g.element_size()))
        return y

    def all_to_all_rows(self, x, receive, send, group):
        rank, width = dist.get_rank(group), x[0].numel() if len(x) else x.shape[1:].numel()
        out, back = ((sum(n) - n[rank]) * width for n in (send, receive))
        return self._count("all_to_all_rows", out, back, x, receive, send, group)

    def all_gather_rows(self, x, group):
        others = dist.get_world_size(group) - 1
        if not x.is_floating_point():  # ids, of the plan
            return self.originals["all_gather_rows"](x, group)
        return self._count("all_gather_rows", others * x.numel(), others * x.numel(), x, group)

    def reduce_scatter_rows(self, x, group):
        ranks = dist.get_world_size(group)
        return self._count("reduce_scatter_rows", x.numel() // ranks * (ranks - 1), x.numel() // ranks * (ranks - 1), x, group)


def bytes_of_a_step(model_name: str, flags: str) -> tuple[int, int]:
    """Sent by this rank in one step: as the statistics have it, and on the wire."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    batches, wire = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size), Wire()
    divisor = count_loss_tokens(batches, mesh)
    for patch in wire.patches():
        patch.start()
    try:
        forward_backward(model, batches, divisor, mesh, parity.SEED, 0)
    finally:
        mock.patch.stopall()
    return sum(moe.stats.sent_bytes for moe in moe_layers(model)), wire.sent


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("pyramid", f"{EP} --moe-token-dispatcher alltoall"),
        ("pyramid", f"{EP} --moe-token-dispatcher alltoall --recompute-granularity full --bf16"),
        ("dropping", f"{EP} --moe-token-dispatcher alltoall --zero-stage 3"),
        ("dropping", f"{EP} --moe-pad-expert-input-to-capacity"),
        ("latent", f"{EP} --moe-pad-expert-input-to-capacity --recompute-granularity full"),
        ("pyramid", f"{EP} --moe-token-dispatcher allgather --recompute-granularity selective"),
        ("pyramid", f"{EP} --moe-token-dispatcher allgather --tensor-model-parallel-size 2 --recompute-granularity full"),
    ],
)
def test_bytes_sent_are_those_on_the_wire(model, flags):
    found = run_distributed(bytes_of_a_step, 2, model, flags)
    for counted, on_the_wire in found:
        assert counted == on_the_wire > 0


def test_nothing_is_sent_where_all_experts_are_local():
    assert run_distributed(bytes_of_a_step, 2, "pyramid", "") == [(0, 0), (0, 0)]
