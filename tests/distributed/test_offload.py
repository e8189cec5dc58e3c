"""Activations that wait on the host: which ones, and that nothing else changes; on a CPU both kinds of offload change nothing.

The host of these tests is a list: what is packed is copied into it, as it is into pinned memory beside a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.offload import SMALLEST, is_offloaded, offload_warnings, offloaded
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed


def gradients(flags: str, has_host: bool) -> tuple[dict[str, torch.Tensor], list[torch.Size]]:
    """All gradients of a step, and the shapes of what went to the host."""
    c = parity.config("modern", flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    moved: list[torch.Size] = []

    def pack(t: torch.Tensor):
        moved.append(t.shape)
        return t.device, t.clone()

    host = SimpleNamespace(pack_hook=pack, unpack_hook=lambda packed: packed[1])
    for block in model.layers.values() if has_host else ():
        block.forward = offloaded(block.forward, block, host, smallest=1)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, 0)
    return {n: parity.whole(p.grad) for n, p in model.named_parameters()}, moved


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (2, "--zero-stage 3 --moe-expert-parallel-size 2"),
        (2, "--zero-stage 1 --tensor-model-parallel-size 2 --bf16"),
        (2, "--zero-stage 3 --recompute-granularity selective --recompute-modules moe"),
    ],
)
def test_gradients_are_bit_equal_and_no_parameter_is_moved(world, flags):
    plain, _ = run_distributed(gradients, world, flags, False)[0]
    found, moved = run_distributed(gradients, world, flags, True)[0]
    assert [n for n, g in plain.items() if not torch.equal(g, found[n])] == []
    tokens = parity.LENGTH * 2  # of a micro-batch
    assert any(tokens in shape or parity.LENGTH in shape for shape in moved)
    of_parameters = {g.shape for g in plain.values()} | {g.t().shape for g in plain.values() if g.ndim == 2}
    assert not {shape for shape in moved if len(shape) > 1} & of_parameters


def test_small_tensors_stay():
    assert SMALLEST == 1 << 16
    packed = []
    host = SimpleNamespace(pack_hook=lambda t: packed.append(t.nbytes) or t.clone(), unpack_hook=lambda t: t)
    small, large = torch.randn(8, requires_grad=True), torch.randn(1 << 15, requires_grad=True)
    offloaded(lambda: small.exp().sum() + large.exp().sum(), torch.nn.Module(), host)().backward()
    assert packed == [large.nbytes]
    torch.testing.assert_close(large.grad, large.detach().exp())


def test_on_a_cpu_both_flags_warn_and_change_nothing():
    c = parity.config("pyramid", "--cpu-optimizer --cpu-offloading")
    warnings = list(offload_warnings(c, "cpu"))
    assert [w.split()[0] for w in warnings] == ["--cpu-offloading", "--cpu-optimizer"]
    assert all("has no effect on a CPU" in w for w in warnings)
    assert list(offload_warnings(c, "cuda")) == []
    assert is_offloaded(c, "cuda") and not is_offloaded(c, "cpu")
