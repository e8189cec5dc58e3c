"""Model-parallel unit: process groups under the names that Megatron users know.

The getters answer for the default mesh, which `set_default_mesh` installs once per run; library code is handed its mesh.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_moe.mpu.mesh import ParallelMesh, build_mesh

__all__ = [
    "ParallelMesh",
    "build_mesh",
    "get_context_parallel_group",
    "get_context_parallel_rank",
    "get_context_parallel_world_size",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_default_mesh",
    "get_expert_data_parallel_group",
    "get_expert_data_parallel_world_size",
    "get_expert_model_parallel_group",
    "get_expert_model_parallel_rank",
    "get_expert_model_parallel_world_size",
    "get_expert_tensor_parallel_group",
    "get_expert_tensor_parallel_rank",
    "get_expert_tensor_parallel_world_size",
    "get_inter_distributed_optimizer_instance_group",
    "get_intra_distributed_optimizer_instance_group",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "model_parallel_is_initialized",
    "set_default_mesh",
]

_default: list[ParallelMesh] = []


def set_default_mesh(mesh: ParallelMesh | None) -> None:
    _default[:] = [] if mesh is None else [mesh]


def model_parallel_is_initialized() -> bool:
    return bool(_default)


def _mesh() -> ParallelMesh:
    if not _default:
        raise ValueError("process groups are not initialised: call mpu.set_default_mesh(build_mesh(...)) first, as training.setup does")
    return _default[0]


def get_default_mesh() -> ParallelMesh:
    """For code that is handed none, as DeepSpeed's names are."""
    return _mesh()


def get_tensor_model_parallel_group() -> dist.ProcessGroup:
    return _mesh().group("tp")


def get_tensor_model_parallel_rank() -> int:
    return _mesh().rank("tp")


def get_tensor_model_parallel_world_size() -> int:
    return _mesh().size("tp")


def get_data_parallel_group(with_context_parallel: bool = False) -> dist.ProcessGroup:
    """Ranks that read different samples; with context parallelism those that have different tokens, over which ZeRO shards."""
    return _only(_mesh().dense, "dp") if with_context_parallel else _mesh().group("dp")


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    return dist.get_rank(get_data_parallel_group(with_context_parallel))


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    return _mesh().size("dp") * (_mesh().size("cp") if with_context_parallel else 1)


def get_intra_distributed_optimizer_instance_group() -> dist.ProcessGroup:
    """Ranks over which ZeRO shards the dense parameters: one replica of them (--num-distributed-optimizer-instances)."""
    return _mesh().dense["dp_shard"].get_group()


def get_inter_distributed_optimizer_instance_group() -> dist.ProcessGroup:
    """Ranks that hold the same shard of the dense parameters."""
    return _mesh().dense["dp_replicate"].get_group()


def get_pipeline_model_parallel_group() -> dist.ProcessGroup:
    return _mesh().group("pp")


def get_pipeline_model_parallel_rank() -> int:
    return _mesh().rank("pp")


def get_pipeline_model_parallel_world_size() -> int:
    return _mesh().size("pp")


def get_context_parallel_group() -> dist.ProcessGroup:
    return _mesh().group("cp")


def get_context_parallel_rank() -> int:
    return _mesh().rank("cp")


def get_context_parallel_world_size() -> int:
    return _mesh().size("cp")


def _largest(ep: int | None) -> int:
    """A pyramid has several expert-parallel degrees; without one given, the largest is meant."""
    degrees = _mesh().experts
    if ep is None and degrees:
        return max(degrees)
    if ep not in degrees:
        raise ValueError(f"no layer has expert-parallel degree {ep}; this run has {sorted(degrees) or 'none'}")
    return ep


def get_expert_model_parallel_group(ep: int | None = None) -> dist.ProcessGroup:
    return _mesh().expert_group(_largest(ep))


def get_expert_model_parallel_rank(ep: int | None = None) -> int:
    return dist.get_rank(get_expert_model_parallel_group(ep))


def get_expert_model_parallel_world_size(ep: int | None = None) -> int:
    return _largest(ep)


def get_expert_tensor_parallel_group(ep: int | None = None) -> dist.ProcessGroup:
    return _mesh().expert_tensor_group(_largest(ep))


def get_expert_tensor_parallel_rank(ep: int | None = None) -> int:
    return dist.get_rank(get_expert_tensor_parallel_group(ep))


def get_expert_tensor_parallel_world_size(ep: int | None = None) -> int:
    return dist.get_world_size(get_expert_tensor_parallel_group(ep))


def get_expert_data_parallel_group(ep: int | None = None) -> dist.ProcessGroup:
    return _only(_mesh().experts[_largest(ep)], "edp")


def get_expert_data_parallel_world_size(ep: int | None = None) -> int:
    mesh = _mesh().experts[_largest(ep)]
    return mesh["edp_shard"].size() * mesh["edp_replicate"].size()


def _only(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The group of an axis that has one part alone: shards, or replicas."""
    sharded, replicated = mesh[f"{axis}_shard"], mesh[f"{axis}_replicate"]
    if min(sharded.size(), replicated.size()) > 1:
        raise ValueError(
            f"with --num-distributed-optimizer-instances {replicated.size()} there is no one group of the {axis} ranks: parameters are "
            f"sharded over {sharded.size()} and replicated over {replicated.size()}; ask the mesh for each"
        )
    return (replicated if sharded.size() == 1 else sharded).get_group()
