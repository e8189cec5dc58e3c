"""Local views of sharded parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from megatron_moe.utils.compat import local_slices


def local_weight(weight: Tensor) -> Tensor:
    """The shard of `weight` that lives here, for code in which every rank works on tokens of its own.

    Along an axis on which the weight is replicated each rank sees other tokens, so its gradient is a part of the sum:
    it is declared Partial, and FSDP adds the parts. (`to_local()` alone would declare it replicated: silently wrong.)
    """
    if not isinstance(weight, DTensor):
        return weight
    placements = [Partial() if isinstance(p, Replicate) else p for p in weight.placements]
    return weight.to_local(grad_placements=placements)


def local_part(p: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What of a parameter is here, and where it lies in the whole: to read it or to fill it, without a gradient."""
    if isinstance(p, DTensor):
        return p.to_local(), local_slices(p)
    return p, tuple(slice(0, n) for n in p.shape)
