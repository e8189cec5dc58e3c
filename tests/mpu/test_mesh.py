"""The meshes put ranks into the groups of the tables."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe import mpu
from megatron_moe.mpu.groups import dense_groups, expert_groups

pytestmark = pytest.mark.distributed


def groups_of_this_rank(tp: int, degrees: tuple[int, ...], zero_stage: int) -> dict:
    mesh = mpu.build_mesh("cpu", tp, degrees, zero_stage)
    mpu.set_default_mesh(mesh)
    try:
        ranks = dist.get_process_group_ranks
        found = {"tp": ranks(mpu.get_tensor_model_parallel_group()), "dp": ranks(mpu.get_data_parallel_group())}
        for ep in degrees:
            found[f"ep{ep}"] = ranks(mpu.get_expert_model_parallel_group(ep))
            found[f"edp{ep}"] = ranks(mpu.get_expert_data_parallel_group(ep))
        sizes = (mpu.get_tensor_model_parallel_world_size(), mpu.get_data_parallel_world_size(), mpu.get_expert_model_parallel_world_size())
        return found | {"sizes": sizes, "rank": (mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank())}
    finally:
        mpu.set_default_mesh(None)


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize(("tp", "degrees"), [(1, (1, 2)), (1, (2, 4)), (2, (2, 4)), (4, (4,))])
def test_mesh_groups_are_those_of_the_tables(tp, degrees, zero_stage):
    found = run_distributed(groups_of_this_rank, 4, tp, degrees, zero_stage)
    dense = dense_groups(4, tp=tp)
    expected = {"tp": dense["tp"], "dp": dense["dp"]}
    for ep in degrees:
        expected[f"ep{ep}"], expected[f"edp{ep}"] = expert_groups(4, ep, tp=tp)
    for rank, mine in enumerate(found):
        for name, groups in expected.items():
            assert mine[name] == next(g for g in groups if rank in g), f"rank {rank}: {name}"
        assert mine["sizes"] == (tp, 4 // tp, max(degrees))
        assert mine["rank"] == (rank % tp, rank // tp)


def test_getters_without_a_mesh_say_what_to_do():
    with pytest.raises(ValueError, match="set_default_mesh"):
        mpu.get_data_parallel_group()
