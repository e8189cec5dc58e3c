"""Local views of sharded parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def local_weight(weight: Tensor) -> Tensor:
    """The shard of `weight` that lives here, for code in which every rank works on tokens of its own.

    Along an axis on which the weight is replicated each rank sees other tokens, so its gradient is a part of the sum:
    it is declared Partial, and FSDP adds the parts. (`to_local()` alone would declare it replicated: silently wrong.)
    """
    if not isinstance(weight, DTensor):
        return weight
    placements = [Partial() if isinstance(p, Replicate) else p for p in weight.placements]
    return weight.to_local(grad_placements=placements)
