"""Process groups by DeepSpeed's names: the default expert-parallel degree, and getters.

    deepspeed.init_distributed()
    groups.initialize(ep_size=2)                            # or ep_size=2 in each MoE
    model = Net()                                           # MoE(hidden_size=84, expert=..., num_experts=8)
    engine, *_ = deepspeed.initialize(model=model, ...)     # makes the groups, for the degrees that its layers have

The getters answer for the mesh of that engine (mpu/). Those of the data ranks also answer before: without an engine all ranks are that.
"""

from __future__ import annotations

import re
from typing import Any

import torch.distributed as dist

from megatron_moe import mpu
from megatron_moe.config.model import divisors

# What `initialize` was given. A global, as DeepSpeed's own word for it is a function that returns nothing.
_degree: list[int] = []


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """From now on MoE layers that are given no `ep_size` share their experts out over so many ranks. Before or after init_distributed."""
    if mpu is not None:
        raise ValueError(
            f"groups.initialize(mpu={type(mpu).__name__}): tensor-parallel groups of another framework are not used here, every rank is a data "
            f"rank; leave mpu out, or train GPT with pretrain_gpt_moe.py --tensor-model-parallel-size"
        )
    if not isinstance(ep_size, int) or ep_size < 1:
        raise ValueError(f"groups.initialize: ep_size ({ep_size!r}) must be a whole number of at least 1")
    if dist.is_initialized():
        check_ranks(ep_size, dist.get_world_size())
    _degree[:] = [ep_size]


def check_ranks(ep_size: int, ranks: int) -> None:
    """ValueError where so many ranks do not make whole expert-parallel groups."""
    if ranks % ep_size:
        legal = ", ".join(map(str, divisors(ranks)))
        raise ValueError(
            f"the number of ranks ({ranks}) must be divisible by ep_size ({ep_size}); use one of {legal}, or start other ranks"
        )


def default_ep_size() -> int:
    """Of `initialize`; 1 without it."""
    return _degree[0] if _degree else 1


# ---------------------------------------------------------------- data ranks


def get_data_parallel_group() -> dist.ProcessGroup | None:
    """None without torch.distributed."""
    if mpu.model_parallel_is_initialized():
        return mpu.get_data_parallel_group()
    return dist.group.WORLD if dist.is_initialized() else None


def get_data_parallel_world_size() -> int:
    return dist.get_world_size(get_data_parallel_group()) if dist.is_initialized() else 1


def get_data_parallel_rank() -> int:
    return dist.get_rank(get_data_parallel_group()) if dist.is_initialized() else 0


def get_model_parallel_world_size() -> int:
    return mpu.get_tensor_model_parallel_world_size() if mpu.model_parallel_is_initialized() else 1


def get_model_parallel_rank() -> int:
    return mpu.get_tensor_model_parallel_rank() if mpu.model_parallel_is_initialized() else 0


# ---------------------------------------------------------------- ranks of experts, by the name of a degree: "ep_size_2"


def get_expert_parallel_group(group_name: str | None = None) -> dist.ProcessGroup:
    """Ranks that together hold the experts of a layer once. Without a name: of the largest degree."""
    return mpu.get_expert_model_parallel_group(_degree_of(group_name))


def get_expert_parallel_world_size(group_name: str | None = None) -> int:
    return mpu.get_expert_model_parallel_world_size(_degree_of(group_name))


def get_expert_parallel_rank(group_name: str | None = None) -> int:
    return mpu.get_expert_model_parallel_rank(_degree_of(group_name))


def get_expert_data_parallel_group(group_name: str | None = None) -> dist.ProcessGroup:
    """Ranks that hold the same experts."""
    return mpu.get_expert_data_parallel_group(_degree_of(group_name))


def get_expert_data_parallel_world_size(group_name: str | None = None) -> int:
    return mpu.get_expert_data_parallel_world_size(_degree_of(group_name))


def get_expert_data_parallel_rank(group_name: str | None = None) -> int:
    return dist.get_rank(get_expert_data_parallel_group(group_name))


def group_name_of(ep_size: int) -> str:
    return f"ep_size_{ep_size}"


def _degree_of(group_name: str | None) -> int | None:
    if not mpu.model_parallel_is_initialized():
        raise ValueError("expert-parallel groups are made by deepspeed.initialize(model=...), which knows the layers; ask after it")
    if group_name is None:
        return None
    number = re.fullmatch(r"ep_size_(\d+)", group_name)
    if number is None:
        raise ValueError(f"a group of experts is called ep_size_N, N ranks that share them out; {group_name!r} is no such name")
    return int(number[1])


# newer DeepSpeed calls them so
_get_data_parallel_group = get_data_parallel_group
_get_data_parallel_world_size = get_data_parallel_world_size
_get_data_parallel_rank = get_data_parallel_rank
_get_model_parallel_world_size = get_model_parallel_world_size
_get_expert_parallel_group = get_expert_parallel_group
_get_expert_parallel_world_size = get_expert_parallel_world_size
_get_expert_parallel_rank = get_expert_parallel_rank
_get_expert_data_parallel_group = get_expert_data_parallel_group
_get_expert_data_parallel_world_size = get_expert_data_parallel_world_size
_get_expert_data_parallel_rank = get_expert_data_parallel_rank
