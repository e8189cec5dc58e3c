"""Keys that travel around a ring: what one block computes, on every device. The rows `ring` of the parity tests have the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_pool import run_distributed

from megatron_moe.model.core import repeat_heads
from megatron_moe.parallel import ring
from megatron_moe.parallel.context import chunks_of


def tensors(dtype: torch.dtype, device: str = "cpu", length: int = 16) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output: 2 sequences, 4 heads of queries, 2 of keys."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).to(device, dtype) for heads in (4, 2, 2, 4)]


def expected(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Output and gradients of attention to all keys."""
    *inputs, grad = tensors(dtype, device)
    q, k, v = (t.requires_grad_() for t in inputs)
    out = F.scaled_dot_product_attention(q, repeat_heads(k, 4), repeat_heads(v, 4), is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_plain_block_is_the_fused_one(is_causal):
    q, k, v, grad = (repeat_heads(t, 4) for t in tensors(torch.float64))
    fused, plain = ring._flash_for_cpu(q, k, v, is_causal), ring._plain(q, k, v, is_causal)
    for found, wanted in zip(plain, fused):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    known = {"grad_out": grad, "query": q, "key": k, "value": v, "out": fused[0], "logsumexp": fused[1], "is_causal": is_causal}
    for found, wanted in zip(ring._plain_backward(**known), ring._flash_for_cpu_backward(**known)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def chunks_here(t_BHLh: torch.Tensor) -> torch.Tensor:
    parts = t_BHLh.chunk(2 * dist.get_world_size(), dim=2)
    return torch.cat([parts[i] for i in chunks_of(dist.group.WORLD)], dim=2).contiguous()


def of_a_rank(dtype: torch.dtype, is_plain: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients around the ring, and those of attention to all keys, both of the chunks here."""
    *inputs, grad = map(chunks_here, tensors(dtype))
    q, k, v = (t.requires_grad_() for t in inputs)
    kernels = ring.kernels_for
    ring.kernels_for = (lambda _: (ring._plain, ring._plain_backward)) if is_plain else kernels
    try:
        out = ring._Ring.apply(q, k, v, dist.group.WORLD)
        found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    finally:
        ring.kernels_for = kernels
    return found, [chunks_here(t) for t in expected(dtype)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("is_plain", "dtype", "error"),
    [(True, torch.float64, 1e-12), (False, torch.float64, 1e-12), (False, torch.float32, 1e-5), (False, torch.bfloat16, 0.03)],
)
@pytest.mark.parametrize("world", [2, 4])
def test_a_ring_attends_to_all_keys(world, is_plain, dtype, error):
    for found, wanted in run_distributed(of_a_rank, world, dtype, is_plain):
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=error, atol=error)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="needs an NVIDIA GPU of compute capability 9 or newer",
)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_a_ring_of_one_gpu_is_plain_attention(dtype, error, tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        *inputs, grad = tensors(dtype, "cuda")
        q, k, v = (t.requires_grad_() for t in inputs)
        out = ring._Ring.apply(q, k, v, dist.group.WORLD)
        for a, b in zip([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)], expected(dtype, "cuda")):
            torch.testing.assert_close(a, b, rtol=error, atol=error)
    finally:
        dist.destroy_process_group()
