"""Degrees of parallelism -> device meshes. All of them lay the same ranks out anew, each for what it shards:

    tokens   pp x dp x cp x tp                              who reads which samples, which part of a sequence
    dense    pp x dp_replicate x dp_shard x tp              dense parameters: the two data axes span dp x cp
    expert   pp x edp_replicate x edp_shard x ep x etp      one for each expert-parallel degree: all axes but pp span dp x cp x tp
    nodes    pp x edp x across x within x etp               ep taken apart, where rows travel in two stages (--moe-token-dispatcher hierarchical)

ZeRO 0 replicates over the data axes, every other stage shards over them; with --num-distributed-optimizer-instances R it shards
over each R-th part of them and replicates the parts (hybrid sharding). That is the only difference the meshes know.
TP varies fastest, then CP, DP, PP; EP blocks are consecutive ranks of a stage (docs/parallelism.md has the tables).

Worked example, 4 ranks, TP 2, EP 4: tp [0,1] [2,3]; dp [0,2] [1,3]; ep [0,1,2,3]; edp [0] [1] [2] [3] - expert
parallelism spans the tensor-parallel ranks, which are further data ranks for the experts.

The same ranks with ETP 2, EP 2: etp [0,1] [2,3] share each expert, ep [0,2] [1,3] have other experts. TP may be 1, 2 or 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_moe.config.parallel import split_over_nodes


@dataclass(frozen=True)
class ParallelMesh:
    """All meshes and groups of a run. Every rank builds all of them in the same order, whatever layers it keeps."""

    tokens: DeviceMesh
    dense: DeviceMesh
    experts: dict[int, DeviceMesh]  # by expert-parallel degree
    stages: DeviceMesh | None  # pp x all ranks of a stage; None without a pipeline, where that is the world
    zero_stage: int
    nodes: dict[int, DeviceMesh] = field(default_factory=dict)  # by degree, where a group spans several nodes

    @property
    def data(self) -> DeviceMesh:
        """Where FSDP shards the dense parameters: 1-D, or replicate x shard."""
        return _of_fsdp(self.dense, "dp", self.zero_stage)

    def expert_data(self, ep: int) -> DeviceMesh:
        """The same for experts of a layer with this expert-parallel degree."""
        return _of_fsdp(self.experts[ep], "edp", self.zero_stage)

    def expert_data_size(self, ep: int) -> int:
        """Ranks over which a layer's local experts are sharded (1 for ZeRO 0)."""
        return self.experts[ep]["edp_shard"].size()

    def group(self, axis: str) -> dist.ProcessGroup:
        """Process group of an axis of the tokens: pp, dp, cp, tp."""
        return self._groups[axis]

    @cached_property
    def _groups(self) -> dict[str, dist.ProcessGroup]:
        """Made once: torch computes a slice of a mesh anew each time, from tensors, and a step asks for several."""
        meshes = {"pp": self.dense, "dp": self.tokens, "cp": self.tokens, "tp": self.dense}  # pp and tp are the same in both
        return {axis: mesh[axis].get_group() for axis, mesh in meshes.items()}

    def rank(self, axis: str) -> int:
        return dist.get_rank(self.group(axis))

    def size(self, axis: str) -> int:
        return dist.get_world_size(self.group(axis))

    def sum(self, x: Tensor, *axes: str) -> Tensor:
        """In place, over all ranks of these axes of the tokens."""
        for axis in axes:
            if self.size(axis) > 1:
                dist.all_reduce(x, group=self.group(axis))
        return x

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """All ranks of this pipeline stage; None is the world."""
        return None if self.stages is None else self.stages.get_group("stage")

    def expert_group(self, ep: int) -> dist.ProcessGroup:
        return self.experts[ep]["ep"].get_group()

    def expert_tensor_group(self, ep: int) -> dist.ProcessGroup:
        """Ranks that share each expert of a layer with this expert-parallel degree."""
        return self.experts[ep]["etp"].get_group()

    def expert_tensor_size(self, ep: int) -> int:
        return self.experts[ep]["etp"].size()

    def expert_node_groups(self, ep: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
        """Of the ranks of `expert_group`: those on this node, and those of equal number on all nodes. None for one stage."""
        mesh = self.nodes.get(ep)
        return None if mesh is None else (mesh["within"].get_group(), mesh["across"].get_group())

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: all that hold a part of the same parameters."""
        return dist.get_world_size() // self.size("pp")


def _of_fsdp(mesh: DeviceMesh, axis: str, zero_stage: int) -> DeviceMesh:
    replicate, shard = f"{axis}_replicate", f"{axis}_shard"
    return mesh[replicate, shard] if zero_stage == 0 or mesh[replicate].size() > 1 else mesh[shard]


def build_mesh(
    device_type: str, tp: int, expert_degrees: Iterable[int], zero_stage: int, pp: int = 1, cp: int = 1, etp: int = 1, replicas: int = 1,
    node_size: int | None = None,
) -> ParallelMesh:  # fmt: skip
    """Collective: builds every process group. Sizes must divide the world size (RunConfig.world_problems says how).

    `replicas`: how often the sharded parameters are there (1 for plain ZeRO). Experts of which fewer copies would be sharded than
    that are replicated as often as divides. `node_size`: ranks of a node, where rows travel between nodes first and then within them."""
    world = dist.get_world_size()
    dp = world // (pp * cp * tp)
    assert pp * dp * cp * tp == world, f"{pp=} x {dp=} x {cp=} x {tp=} != {world=}"
    tokens = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
    names = ("pp", "dp_replicate", "dp_shard", "tp")
    dense = init_device_mesh(device_type, (pp, *_split(dp * cp, zero_stage, replicas), tp), mesh_dim_names=names)
    experts, nodes = {}, {}
    for ep in sorted(set(expert_degrees)):  # ascending: the same order of group creation on every rank
        edp = dp * cp * tp // (ep * etp)
        assert edp * ep * etp == dp * cp * tp, f"{ep=} x {etp=} does not divide the stage's {dp * cp * tp} ranks"
        split = _split(edp, zero_stage, math.gcd(replicas, edp))
        names = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
        experts[ep] = init_device_mesh(device_type, (pp, *split, ep, etp), mesh_dim_names=names)
        across, within = (1, ep) if node_size is None else split_over_nodes(ep, etp, node_size)
        if min(across, within) > 1:
            names = ("pp", "edp", "across", "within", "etp")
            nodes[ep] = init_device_mesh(device_type, (pp, edp, across, within, etp), mesh_dim_names=names)
    stages = init_device_mesh(device_type, (pp, world // pp), mesh_dim_names=("pp", "stage")) if pp > 1 else None
    return ParallelMesh(tokens, dense, experts, stages, zero_stage, nodes)


def _split(ranks: int, zero_stage: int, replicas: int) -> tuple[int, int]:
    """(replicate, shard)"""
    assert ranks % replicas == 0, f"{replicas=} does not divide the {ranks} data ranks"
    return (ranks, 1) if zero_stage == 0 else (replicas, ranks // replicas)
