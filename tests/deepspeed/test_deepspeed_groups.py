"""deepspeed.utils.groups: the default degree, and who is in which group."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe import mpu
from megatron_moe.deepspeed.utils import groups
from megatron_moe.mpu.mesh import build_mesh


def test_initialize_keeps_a_degree_and_one_process_is_the_only_data_rank():
    for size in (2, 1):
        groups.initialize(ep_size=size)
        assert groups.default_ep_size() == size
    assert (groups.get_data_parallel_world_size(), groups.get_data_parallel_rank(), groups.get_data_parallel_group()) == (1, 0, None)
    assert (groups.get_model_parallel_world_size(), groups.get_model_parallel_rank()) == (1, 0)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_a_degree_that_is_no_number_of_ranks_is_refused(size):
    with pytest.raises(ValueError, match=r"ep_size .* must be a whole number of at least 1"):
        groups.initialize(size)
    assert groups.default_ep_size() == 1


def test_groups_of_another_framework_are_refused():
    with pytest.raises(ValueError, match=r"mpu=object\): tensor-parallel groups of another framework"):
        groups.initialize(2, mpu=object())


def test_groups_of_experts_are_asked_for_too_early():
    with pytest.raises(ValueError, match=r"made by deepspeed\.initialize"):
        groups.get_expert_parallel_group()


def everything(degrees: list[int]) -> dict:
    groups.initialize(ep_size=2)
    before = groups.get_data_parallel_world_size(), groups.get_data_parallel_rank()
    mpu.set_default_mesh(build_mesh("cpu", 1, degrees, 0))
    try:
        found = {"before": before, "data": (groups.get_data_parallel_world_size(), groups.get_data_parallel_rank())}
        for name in (None, *(f"ep_size_{n}" for n in degrees)):
            found[name] = {
                "ep": dist.get_process_group_ranks(groups.get_expert_parallel_group(name)),
                "edp": dist.get_process_group_ranks(groups.get_expert_data_parallel_group(name)),
                "sizes": (groups.get_expert_parallel_world_size(name), groups.get_expert_data_parallel_world_size(name)),
                "ranks": (groups.get_expert_parallel_rank(name), groups._get_expert_data_parallel_rank(name)),
            }
        for wrong, message in (("ep_size_3", r"degree 3; this run has \[2, 4\]"), ("experts", "called ep_size_N.*'experts' is no such")):
            with pytest.raises(ValueError, match=message):
                groups.get_expert_parallel_group(wrong)
        return found
    finally:
        mpu.set_default_mesh(None)
        groups.initialize(1)


@pytest.mark.distributed
def test_the_getters_answer_for_the_mesh_of_the_run():
    """The tutorials' example: 4 ranks, EP 2: [0,1] [2,3] hold all experts, [0,2] [1,3] the same ones."""
    for rank, found in enumerate(run_distributed(everything, 4, [2, 4])):
        assert found["before"] == found["data"] == (4, rank)
        first = rank // 2 * 2
        assert found["ep_size_2"] == {
            "ep": [first, first + 1],
            "edp": [rank % 2, rank % 2 + 2],
            "sizes": (2, 2),
            "ranks": (rank % 2, rank // 2),
        }
        assert found["ep_size_4"] == {"ep": [0, 1, 2, 3], "edp": [rank], "sizes": (4, 1), "ranks": (rank, 0)}
        assert found[None] == found["ep_size_4"]


def refused(ep_size: int) -> str:
    with pytest.raises(ValueError) as error:
        groups.initialize(ep_size)
    return str(error.value)


@pytest.mark.distributed
def test_a_degree_that_does_not_divide_the_ranks_is_refused():
    expected = r"number of ranks \(2\) must be divisible by ep_size \(4\); use one of 1, 2,"
    for message in run_distributed(refused, 2, 4):
        assert re.search(expected, message)
