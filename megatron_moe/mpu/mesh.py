"""Degrees of parallelism -> device meshes: one for the dense parameters, one per expert-parallel degree for the experts.

    dense    pp x dp_replicate x dp_shard x cp x tp            ("dp" is dp_replicate x dp_shard)
    expert   pp x edp_replicate x edp_shard x ep x etp         the same ranks, folded anew for each distinct degree

ZeRO 0 replicates over the data axis, every other stage shards over it; that is the only difference the meshes know.
TP varies fastest, then CP, DP, PP; EP blocks are consecutive ranks of a stage (docs/parallelism.md has the tables).

Worked example, 4 ranks, TP 2, EP 4: tp [0,1] [2,3]; dp [0,2] [1,3]; ep [0,1,2,3]; edp [0] [1] [2] [3] - expert
parallelism spans the tensor-parallel ranks, which are further data ranks for the experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelMesh:
    """All meshes and groups of a run. Every rank builds all of them in the same order, whatever layers it keeps."""

    dense: DeviceMesh
    experts: dict[int, DeviceMesh]  # by expert-parallel degree
    zero_stage: int

    @property
    def data(self) -> DeviceMesh:
        """Where FSDP shards the dense parameters: 1-D, or replicate x shard for ZeRO 0."""
        return self.dense["dp_replicate", "dp_shard"] if self.zero_stage == 0 else self.dense["dp_shard"]

    def expert_data(self, ep: int) -> DeviceMesh:
        """The same for experts of a layer with this expert-parallel degree."""
        mesh = self.experts[ep]
        return mesh["edp_replicate", "edp_shard"] if self.zero_stage == 0 else mesh["edp_shard"]

    def expert_data_size(self, ep: int) -> int:
        """Ranks over which a layer's local experts are sharded (1 for ZeRO 0)."""
        return self.experts[ep]["edp_shard"].size()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Process group of a dense axis: pp, dp, cp, tp."""
        return self._groups[axis]

    @cached_property
    def _groups(self) -> dict[str, dist.ProcessGroup]:
        """Made once: torch computes a slice of a mesh anew each time, from tensors, and a step asks for several."""
        dp = "dp_replicate" if self.zero_stage == 0 else "dp_shard"  # the other one has size 1
        return {axis: self.dense[dp if axis == "dp" else axis].get_group() for axis in ("pp", "dp", "cp", "tp")}

    def rank(self, axis: str) -> int:
        return dist.get_rank(self.group(axis))

    def size(self, axis: str) -> int:
        return dist.get_world_size(self.group(axis))

    def expert_group(self, ep: int) -> dist.ProcessGroup:
        return self.experts[ep]["ep"].get_group()

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: all that hold a part of the same parameters."""
        return dist.get_world_size() // self.size("pp")


def build_mesh(device_type: str, tp: int, expert_degrees: Iterable[int], zero_stage: int, pp: int = 1, cp: int = 1) -> ParallelMesh:
    """Collective: builds every process group. Sizes must divide the world size (RunConfig.world_problems says how)."""
    world = dist.get_world_size()
    dp = world // (pp * cp * tp)
    assert pp * dp * cp * tp == world, f"{pp=} x {dp=} x {cp=} x {tp=} != {world=}"
    split = (dp, 1) if zero_stage == 0 else (1, dp)
    dense = init_device_mesh(device_type, (pp, *split, cp, tp), mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    experts = {}
    for ep in sorted(set(expert_degrees)):  # ascending: the same order of group creation on every rank
        edp = dp * cp * tp // ep
        assert edp * ep == dp * cp * tp, f"{ep=} does not divide the stage's {dp * cp * tp} ranks"
        split = (edp, 1) if zero_stage == 0 else (1, edp)
        names = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
        experts[ep] = init_device_mesh(device_type, (pp, *split, ep, 1), mesh_dim_names=names)
    return ParallelMesh(dense, experts, zero_stage)
