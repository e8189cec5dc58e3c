"""The meshes put ranks into the groups of the tables."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe import mpu
from megatron_moe.mpu.groups import dense_groups, expert_groups, expert_tensor_groups

pytestmark = pytest.mark.distributed


def groups_of_this_rank(tp: int, degrees: tuple[int, ...], zero_stage: int, etp: int = 1, node_size: int | None = None) -> dict:
    mesh = mpu.build_mesh("cpu", tp, degrees, zero_stage, etp=etp, node_size=node_size)
    mpu.set_default_mesh(mesh)
    try:
        ranks = dist.get_process_group_ranks
        found = {"tp": ranks(mpu.get_tensor_model_parallel_group()), "dp": ranks(mpu.get_data_parallel_group())}
        for ep in degrees:
            found[f"ep{ep}"] = ranks(mpu.get_expert_model_parallel_group(ep))
            found[f"edp{ep}"] = ranks(mpu.get_expert_data_parallel_group(ep))
            found[f"etp{ep}"] = ranks(mpu.get_expert_tensor_parallel_group(ep))
            if (nodes := mesh.expert_node_groups(ep)) is not None:
                found |= {f"within{ep}": ranks(nodes[0]), f"across{ep}": ranks(nodes[1])}
        sizes = (mpu.get_tensor_model_parallel_world_size(), mpu.get_data_parallel_world_size(), mpu.get_expert_model_parallel_world_size())
        slices = (mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size())
        return found | {
            "sizes": sizes, "rank": (mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()), "slices": slices,
        }  # fmt: skip
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


@pytest.mark.parametrize(
    ("world", "tp", "degrees", "etp"), [(4, 1, (1, 2), 2), (4, 2, (2,), 2), (4, 4, (1, 2), 2), (4, 2, (1,), 4), (8, 2, (2, 4), 2)]
)
def test_slices_of_an_expert_are_neighbours_and_expert_groups_lie_across_them(world, tp, degrees, etp):
    found = run_distributed(groups_of_this_rank, world, tp, degrees, 0, etp)
    for rank, mine in enumerate(found):
        assert mine["slices"] == (rank % etp, etp)
        for ep in degrees:
            tables = zip(("ep", "edp", "etp"), (*expert_groups(world, ep, tp=tp, etp=etp), expert_tensor_groups(world, etp)))
            for name, groups in tables:
                assert mine[f"{name}{ep}"] == next(g for g in groups if rank in g), f"rank {rank}: {name}{ep}"


def test_two_stages_are_the_ranks_of_a_node_and_those_of_equal_number():
    found = run_distributed(groups_of_this_rank, 8, 1, (2, 8), 0, 1, 4)
    assert "within2" not in found[0]  # all on one node
    assert [f["within8"] for f in found] == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4
    assert [f["across8"] for f in found] == [[0, 4], [1, 5], [2, 6], [3, 7]] * 2
    sliced = run_distributed(groups_of_this_rank, 8, 1, (4,), 0, 2, 4)
    assert [f["within4"] for f in sliced[:4]] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["across4"] for f in sliced[:4]] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_getters_without_a_mesh_say_what_to_do():
    with pytest.raises(ValueError, match="set_default_mesh"):
        mpu.get_data_parallel_group()
