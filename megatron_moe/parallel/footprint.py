"""What one rank holds, counted on the model that it builds: the recipe itself is asked, not a formula beside it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.optimizer.groups import is_orthogonalised, owner_of
from megatron_moe.parallel.half import has_half_weights
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.parallel.zero import gathered_dtype

FSDP_AXES = {"dp_replicate", "dp_shard", "edp_replicate", "edp_shard"}


@dataclass(frozen=True)
class Footprint:
    """At rest: between two steps, when gradients are gone too. In bytes where it does not say parameters.

    gradients: after the backward. whole_gradients: what stages 0 and 1 add up in when a step has several micro-batches, and every
    stage under pipeline parallelism. gathered: copies in the compute type, beside the shards - of all parameters from forward to
    backward in stages 0 to 2; in stage 3 of the largest block and of what lies outside of the blocks, but under pipeline
    parallelism, where torch keeps them from a backward to the next forward, of all. One rank alone in float32 has neither (and in
    16 bits on a CPU no whole_gradients, which are counted all the same: who plans here may train on a GPU).
    """

    dense_parameters: int
    expert_parameters: int
    parameters: int
    gradients: int
    whole_gradients: int
    optimizer: int
    gathered: int

    @property
    def at_most(self) -> int:
        """Bytes of all of it, to compare ranks by."""
        return self.parameters + self.gradients + self.whole_gradients + self.optimizer + self.gathered


def footprint(model: GPT | PipelinedGPT, optimizer: OptimizerConfig, zero_stage: int, half: torch.dtype | None) -> Footprint:
    """Of a model that `parallelize` has been applied to; without memory will do."""
    elements: Counter[str] = Counter()
    shards = whole = states = 0
    gathered: Counter[str] = Counter()  # by block, '' outside
    for name, p in model.named_parameters():
        here, whole_here = local_elements(p), gathered_elements(p)
        elements["expert" if ".experts." in name else "dense"] += here
        shards += here * p.element_size()
        states += here * max(p.element_size(), 4) * moments(optimizer, model, name, p)  # never in 16 bits
        whole += whole_here * p.element_size()
        block = re.match(r"(layers|mtp)\.\d+|", name).group()
        gathered[block] += whole_here * gathered_dtype(name, p, half).itemsize
    outside = gathered.pop("", 0)
    blocks = gathered.values()
    is_wrapped = any(isinstance(module, FSDPModule) for module in model.modules())
    is_wrapped = is_wrapped or has_half_weights(model)
    frees_blocks = zero_stage == 3 and not isinstance(model, PipelinedGPT)  # there they stay from a backward to the next forward
    return Footprint(
        dense_parameters=elements["dense"],
        expert_parameters=elements["expert"],
        parameters=shards,
        gradients=shards,  # of the type of the parameters, also when computing in 16 bits
        whole_gradients=whole if is_wrapped else 0,
        optimizer=states,
        gathered=outside + (max(blocks) if frees_blocks else sum(blocks)) if is_wrapped else 0,
    )


def local_elements(p: nn.Parameter) -> int:
    return (p.to_local() if isinstance(p, DTensor) else p).numel()


def gathered_elements(p: nn.Parameter) -> int:
    """Elements here once FSDP has gathered: the parameter divided by what tensor and expert parallelism cut (evenly)."""
    if not isinstance(p, DTensor):
        return p.numel()
    cuts = 1
    for axis, (name, placement) in enumerate(zip(p.device_mesh.mesh_dim_names, p.placements)):
        if name not in FSDP_AXES and not placement.is_replicate():
            cuts *= p.device_mesh.size(axis)
    return p.numel() // cuts


def moments(config: OptimizerConfig, model: GPT, name: str, p: nn.Parameter) -> int:
    """Numbers that the optimizer keeps for each element of a parameter."""
    if config.optimizer == "sgd":
        return 1 if config.sgd_momentum else 0
    return 1 if config.optimizer == "muon" and is_orthogonalised(name, p, owner_of(model, name)) else 2
