"""The global gradient norm over parameters that live on different meshes, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from megatron_moe.kernels.blocks import row_blocks


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], stage_ranks: int) -> Tensor:
    """sqrt(sum of squares over the distinct elements of all gradients), the same 0-dim tensor on every rank.

    Each local square is weighted by 1 / (ranks of the stage that hold the same element), then one all-reduce over the world
    adds everything up; so dense parameters and experts of any degree count once each. (torch's get_total_norm refuses two
    meshes.) All gradients 1 give sqrt(number of parameters) under every layout.
    """
    whole: dict[int, list[Tensor]] = {}  # by how many ranks share one out
    for p in parameters:
        if p.grad is None:
            continue
        grad, distinct = p.grad, 1
        if isinstance(grad, DTensor):
            for axis, placement in enumerate(grad.placements):
                assert not isinstance(placement, Partial), f"gradient not reduced yet: {grad.placements}"
                if not placement.is_replicate():  # Shard, and the strided shard of FSDP over EP or TP
                    distinct *= grad.device_mesh.size(axis)
            grad = grad.to_local()
        whole.setdefault(distinct, []).append(grad.reshape(-1))
    squares = [sum_of_squares(grads) * (distinct / stage_ranks) for distinct, grads in whole.items()]
    assert squares, "no parameter has a gradient"
    total = sum(squares[1:], squares[0])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


SMALL = 1 << 14  # elements, below which a call takes longer than a copy


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of flat tensors, one or more, 0-dim, float32 or wider, without a copy of the whole: they are gone through block by block, small ones
    put together first, by type. (torch's foreach_norm is faster, and on a CPU 1 % off at 25 million elements: it adds them up in
    one go.)"""
    large, small = [], {}
    for x_N in tensors:
        if x_N.numel() < SMALL:
            small.setdefault((x_N.dtype, x_N.device), []).append(x_N)
        else:
            large.append(x_N)
    large += [torch.cat(alike) for alike in small.values()]
    squares = [_square(x_N[block]) for x_N in large for block in row_blocks(max(x_N.numel(), 1), 1, x_N.device)]
    return sum(squares[1:], squares[0])


def _square(x_N: Tensor) -> Tensor:
    return x_N.to(torch.promote_types(x_N.dtype, torch.float32)).square().sum()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float, loss_scale: Tensor | None = None) -> None:
    """Multiply all gradients by `gradient_factor`; no host sync."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, gradient_factor(norm, max_norm, loss_scale).to(grads[0].dtype))


def gradient_factor(norm: Tensor, max_norm: float, loss_scale: Tensor | None = None) -> Tensor:
    """min(1, max_norm / norm), where there is a maximum. With a loss scale divided by it: `norm` is that of the gradients without it."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return factor if loss_scale is None else factor / beside(loss_scale, factor)


def beside(x: Tensor, other: Tensor) -> Tensor:
    """`x` on the device of `other`: another one than its own only where the shards live on the host (--cpu-optimizer)."""
    return x if x.device == other.device else x.to(other.device)
