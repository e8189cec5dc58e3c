"""Attention under tensor parallelism: every rank has the projections of its own heads, and whole what all heads share.

A vector that several ranks compute alike and each widens to its own heads has a gradient that is a part of a sum. It stays one through
everything linear in the gradient - the narrow projections of latent attention and their norms - down to the input of the module, where
the plan adds it up once.
"""
# B batch, S sequence, W channels of all heads, w of those here

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.linear import linear
from megatron_moe.parallel.replicated import of_own_tokens, replicate_parameter
from megatron_moe.utils.dtensor import local_weight


def head_plan(config: ModelConfig, ranks: int) -> dict[str, ParallelStyle]:
    """Styles of the parts of an attention between its input and `out_proj`, by name; not every attention has all of them."""
    if config.multi_latent_attention:
        narrow = {name: WholeLinear() for name in ("q_down_proj", "kv_down_proj")}
        return narrow | {name: OwnTokens() for name in ("q_norm", "kv_norm")} | {name: OwnColumns() for name in ("q_up_proj", "kv_up_proj")}
    copies = max(ranks // config.key_value_heads, 1)  # ranks that share a key/value head
    key_value = ColwiseParallel() if copies == 1 else SharedHeads(config)
    plan = {"k_proj": key_value, "v_proj": key_value}
    if config.qk_layernorm_scope == "head":
        return plan | {"q_norm": OwnTokens(), "k_norm": OwnTokens()}
    return plan | {"q_norm": NormOverRanks(1), "k_norm": NormOverRanks(copies)}


def own_share(x: Tensor) -> Tensor:
    """The whole input of the module, whose gradient here is this rank's part of the sum."""
    return x.to_local(grad_placements=[Partial()]) if isinstance(x, DTensor) else x


class OwnTokens(ParallelStyle):
    """A module that is whole on every rank, applied to what the rank has."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        of_own_tokens(module, device_mesh)
        return module


class WholeLinear(ParallelStyle):
    """A projection whose weight is whole on every rank, and whose output each rank uses for heads of its own."""

    def rows(self, mesh: DeviceMesh) -> slice:
        return slice(None)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rows = self.rows(device_mesh)
        for name, _ in list(module.named_parameters()):
            replicate_parameter(module, name, device_mesh)

        def forward(x: Tensor) -> Tensor:
            bias = None if module.bias is None else local_weight(module.bias)[rows]
            return linear(own_share(x), local_weight(module.weight)[rows], bias)

        module.forward = forward
        return module


class SharedHeads(WholeLinear):
    """Keys or values of fewer heads than there are ranks: each rank computes the one head that its queries look at.

    The weight is whole on all of them, which costs G heads instead of one; the gradient of a head is the sum over the ranks that share it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.width = config.key_value_heads, config.head_dim

    def rows(self, mesh: DeviceMesh) -> slice:
        head = mesh.get_local_rank() * self.heads // mesh.size()
        return slice(head * self.width, (head + 1) * self.width)


class OwnColumns(ParallelStyle):
    """A projection to the heads here, of an input that every rank has and whose gradient stays a part of a sum (`ColwiseParallel` would
    add it up)."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shard_rows(module, device_mesh)
        module.forward = lambda x: linear(x, local_weight(module.weight), None if module.bias is None else local_weight(module.bias))
        return module


def shard_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    for name, p in list(module.named_parameters()):
        module.register_parameter(name, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)], src_data_rank=None)))


class NormOverRanks(ParallelStyle):
    """A norm over the channels of all heads, of which every rank has some: mean squares (and means) are summed over the ranks.

    `copies`: ranks that have the same head, each of which adds its share of it.
    """

    def __init__(self, copies: int):
        super().__init__()
        self.copies = copies

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group, width, copies = device_mesh.get_group(), module.normalized_shape[0], self.copies
        rows = slice(None)
        if copies == 1:
            shard_rows(module, device_mesh)
        else:
            each = width * copies // device_mesh.size()
            first = device_mesh.get_local_rank() // copies * each
            rows = slice(first, first + each)
            for name, _ in list(module.named_parameters()):
                replicate_parameter(module, name, device_mesh)

        def mean(x_BSw: Tensor) -> Tensor:
            return _Sum.apply(x_BSw.sum(-1, keepdim=True), group) / (width * copies)

        def forward(x_BSw: Tensor) -> Tensor:
            wide = x_BSw.to(torch.promote_types(x_BSw.dtype, torch.float32))
            if isinstance(module, nn.LayerNorm):
                wide = wide - mean(wide)
            wide = wide * (mean(wide.square()) + module.eps).rsqrt() * local_weight(module.weight)[rows]
            if isinstance(module, nn.LayerNorm):
                wide = wide + local_weight(module.bias)[rows]
            return wide.to(x_BSw.dtype)

        module.forward = forward
        return module


class _Sum(torch.autograd.Function):
    """Sum over the ranks; what it leads to differs between them, so the gradient is summed too."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
