"""Parameters that are whole on every rank of an axis, while each rank applies them to vectors of its own.

Their gradients are then parts of a sum: they are declared Partial, and FSDP adds them up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from megatron_moe.kernels.linear import Linear, linear
from megatron_moe.utils.dtensor import local_weight


def replicate_parameter(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Declare a parameter replicated over `mesh`; `local_weight` then declares its gradient partial (each rank, own tokens)."""
    whole = getattr(module, name).data
    module.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)))


def of_own_tokens(module: nn.Module, mesh: DeviceMesh) -> None:
    """A module of which every rank applies the whole, each to tokens, or heads, of its own."""
    for name, _ in list(module.named_parameters(recurse=False)):
        replicate_parameter(module, name, mesh)
    forward = FORWARDS[type(module)]
    module.forward = lambda x: forward(module, x)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, local_weight(norm.weight), local_weight(norm.bias), norm.eps)


def _rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, local_weight(norm.weight), norm.eps)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, local_weight(module.weight), None if module.bias is None else local_weight(module.bias))


def _embedding(embedding: nn.Embedding, x: Tensor) -> Tensor:
    return F.embedding(x, local_weight(embedding.weight))


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Linear: _linear,
    Linear: _linear,
    nn.Embedding: _embedding,
}
