"""ZeRO through FSDP2. Also where the data axes have size 1: FSDP is what sums the partial gradients of router and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import MoELayer
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.expert import expert_degree
from megatron_moe.parallel.half import release


def apply_zero(
    model: GPT, mesh: ParallelMesh, half: torch.dtype | None, is_offloaded: bool = False, reduced_in: torch.dtype = torch.float32
) -> None:
    """Wrap experts over their own data mesh, then blocks, then the model. `half`: the 16-bit type to compute in, if any, and
    `reduced_in` that of the gradients then; `is_offloaded`: the shards live on the host.

    Stages: 0 replicate; 1 and 2 shard, parameters stay gathered between forward and backward; 3 gathers them again.
    (1 and 2 differ in when gradients are reduced: `sync_gradients`.) Gradients are summed, never averaged: the loss
    carries the one division, so expert and dense gradients need no factor of their own.
    """
    kind = unit_options(mesh.zero_stage, half, is_offloaded, reduced_in)
    for block in model.blocks:
        if block.moe is not None:
            shard_moe(block.moe, mesh, expert_degree(model, block.moe), half, kind)
        shard_unit(block, mesh.data, **kind)
    for module in model.mtp.values():
        shard_unit(module, mesh.data, **kind)
    shard_unit(model, mesh.data, **kind | {"reshard_after_forward": False})


def unit_options(
    zero_stage: int, half: torch.dtype | None, is_offloaded: bool = False, reduced_in: torch.dtype = torch.float32
) -> dict[str, Any]:
    """How each unit of a model is treated, by FSDP2 and by what reduces gradients on a CPU; arguments as of `apply_zero`."""
    # 16-bit compute from whatever the parameters are stored in
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduced_in) if half else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy() if is_offloaded else OffloadPolicy()
    return {
        "reshard_after_forward": zero_stage == 3, "mp_policy": policy, "offload_policy": offload, "reduction": _ReduceScatterByExchange(),
    }  # fmt: skip


def shard_moe(moe: MoELayer, mesh: ParallelMesh, ep: int, half: torch.dtype | None, kind: dict[str, Any]) -> None:
    """Units inside of a MoE layer: its experts, over their own data mesh, and in 16 bits its router, so that it keeps float32."""
    if half:
        shard_unit(moe.gate, mesh.data, **kind | {"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)})
    of_experts = dict(kind)
    if moe.num_experts // ep % mesh.expert_data_size(ep):
        of_experts["shard_placement_fn"] = _spare_dims(moe.experts, mesh.expert_data_size(ep))
    shard_unit(moe.experts, mesh.expert_data(ep), **of_experts)
    register_fsdp_forward_method(moe.experts, "in_one_call")


def shard_unit(module: nn.Module, mesh: DeviceMesh, reduction: Any, **kind: Any) -> None:
    """One FSDP unit, whose gradients are summed over `mesh`; `reduction` and `kind`: of `unit_options`."""
    unit = fully_shard(module, mesh=mesh, **kind)
    unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    if mesh.size() > 1:
        unit.set_gradient_divide_factor(1.0)
        if mesh.device_type == "cpu":
            unit.set_custom_reduce_scatter(reduction)
    else:  # nothing to divide by: torch would divide by 1 in a pass of its own
        unit.set_custom_reduce_scatter(_ReduceScatterOfOneRank())


class _ReduceScatterByExchange:
    """For gloo, on which torch's own copies all gradients, reduces all of them on every rank and keeps a part. Here parts are exchanged,
    half the bytes, and added up where they stay, ranks ascending, in at least float32.

    What is sent and what comes lies in memory that is kept: one pair for the largest unit of a model, since units are reduced one behind
    another. New memory would be had from the system for each unit, page by page, which took longer than the exchange.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._is_input_next = True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The input, and then the output, once per reduction. The output becomes the gradients."""
        is_input, self._is_input_next = self._is_input_next, not self._is_input_next
        return self._memory("sent", math.prod(size), dtype) if is_input else torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(
                "gradients are summed, and FSDP asked for another reduction (PREMUL_SUM, AVG): a unit is not made by shard_unit"
            )
        parts = self._memory("came", input_tensor.numel(), input_tensor.dtype)
        dist.all_to_all_single(parts, input_tensor, group=group)
        wide = torch.promote_types(parts.dtype, torch.float32)
        first, *others = parts.view(dist.get_world_size(group), -1).to(wide)
        output = output_tensor if output_tensor.dtype == wide else torch.empty_like(output_tensor, dtype=wide)
        torch.add(first, others[0], out=output)
        for other in others[1:]:
            output += other
        if output is not output_tensor:
            output_tensor.copy_(output)

    def _memory(self, use: str, numel: int, dtype: torch.dtype) -> Tensor:
        kept = self._kept.get((use, dtype))
        if kept is None or len(kept) < numel:
            self._kept[use, dtype] = kept = torch.empty(numel, dtype=dtype)
        return kept[:numel]


class _ReduceScatterOfOneRank:
    """Where there is nobody to share with: the output is the very tensor that the input is, so that torch's copy of one to the other
    does nothing. It asks for the input first and then for the output, once per reduction."""

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        kept, self._input = self._input, None
        if kept is not None:
            assert kept.shape == torch.Size(size) and kept.dtype == dtype, f"{kept.shape} {kept.dtype}, wanted {size} {dtype}"
            return kept
        self._input = torch.empty(size, dtype=dtype, device=device)
        return self._input

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        assert output_tensor is input_tensor


def _spare_dims(experts: nn.Module, ranks: int):
    """A dim of each stack that neither EP nor ETP cuts: for layers with fewer experts than ranks to shard them over.

    torch shards other dims than the first only when they divide; where there is none that does, some ranks hold no expert.
    """
    spare = {id(p): [i for i, dim in enumerate(experts.dims(name)) if dim not in "EF"] for name, p in experts.named_parameters()}
    return lambda p: Shard(next((i for i in spare[id(p)] if p.shape[i] % ranks == 0), 0))


def gathered_dtype(name: str, p: nn.Parameter, half: torch.dtype | None) -> torch.dtype:
    """What a parameter is while it is gathered: the 16-bit type that is computed in, if any, except for the router."""
    return half if half and not name.endswith("moe.gate.weight") else p.dtype


def sync_gradients(model: nn.Module, zero_stage: int, is_last_microbatch: bool) -> None:
    """Before each microbatch: stages 0 and 1 reduce whole gradients once per step, 2 and 3 after every microbatch; stage 3
    frees gathered parameters after every backward, the others keep them until the last one of the step. (One rank alone has no
    FSDP in float32, and none on a CPU.)"""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last_microbatch or zero_stage >= 2)
    if zero_stage >= 2:  # hybrid sharding: within each part after every microbatch, between the replicas once
        model.set_requires_all_reduce(is_last_microbatch)
    model.set_reshard_after_backward(is_last_microbatch or zero_stage == 3)
    model.set_is_last_backward(is_last_microbatch)


def reshard(model: nn.Module) -> None:
    """Free gathered parameters after a forward without backward. Until then `model.parameters()` are the gathered ones, which
    neither the optimizer nor a checkpoint knows."""
    release(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
