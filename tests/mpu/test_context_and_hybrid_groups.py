"""Groups of context parallelism and of hybrid sharding, in the meshes, behind the getters and in the plan."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe import mpu
from megatron_moe.arguments import parse_args
from megatron_moe.mpu.groups import dense_groups, expert_groups, hybrid_groups
from megatron_moe.training.plan import as_json, build_plan

pytestmark = pytest.mark.distributed


def test_hybrid_sharding_cuts_each_pool_into_parts_of_ranks_that_follow_each_other():
    assert hybrid_groups([[0, 1, 2, 3], [4, 5, 6, 7]], 2) == (
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
    )
    assert hybrid_groups([[0, 2, 4, 6]], 1) == ([[0, 2, 4, 6]], [[0], [2], [4], [6]])


def groups_of_this_rank(tp: int, cp: int, replicas: int, degrees: tuple[int, ...]) -> dict[str, list[int]]:
    mesh = mpu.build_mesh("cpu", tp, degrees, 1, cp=cp, replicas=replicas)
    mpu.set_default_mesh(mesh)
    try:
        ranks = dist.get_process_group_ranks
        found = {
            "tp": ranks(mpu.get_tensor_model_parallel_group()), "dp": ranks(mpu.get_data_parallel_group()),
            "cp": ranks(mpu.get_context_parallel_group()), "shard": ranks(mpu.get_intra_distributed_optimizer_instance_group()),
            "replicate": ranks(mpu.get_inter_distributed_optimizer_instance_group()),
        }  # fmt: skip
        sizes = [mpu.get_data_parallel_world_size(), mpu.get_data_parallel_world_size(with_context_parallel=True)]
        for ep in degrees:
            sizes.append(mpu.get_expert_data_parallel_world_size(ep))
            found[f"expert shard {ep}"] = ranks(mesh.experts[ep]["edp_shard"].get_group())
            found[f"expert replicate {ep}"] = ranks(mesh.experts[ep]["edp_replicate"].get_group())
        if replicas == 1:
            found["data"] = ranks(mpu.get_data_parallel_group(with_context_parallel=True))
        else:
            with pytest.raises(ValueError, match=f"instances {replicas} there is no one group"):
                mpu.get_data_parallel_group(with_context_parallel=True)
        return found | {"sizes": sizes}
    finally:
        mpu.set_default_mesh(None)


@pytest.mark.parametrize(("tp", "cp", "replicas", "degrees"), [(1, 2, 1, (2, 4)), (2, 2, 1, (4,)), (1, 2, 2, (1, 2)), (1, 1, 2, (2, 4))])
def test_meshes_and_getters_have_the_groups_of_the_tables(tp, cp, replicas, degrees):
    expected = dense_groups(4, tp=tp, cp=cp)
    data = dense_groups(4, tp=tp)["dp"]
    expected["shard"], expected["replicate"] = hybrid_groups(data, replicas)
    if replicas == 1:
        expected["data"] = data
    sizes = [4 // (tp * cp), 4 // tp]
    for ep in degrees:
        edp = expert_groups(4, ep, tp=tp)[1]
        sizes.append(4 // ep)
        expected[f"expert shard {ep}"], expected[f"expert replicate {ep}"] = hybrid_groups(edp, min(replicas, 4 // ep))
    del expected["pp"]
    for rank, mine in enumerate(run_distributed(groups_of_this_rank, 4, tp, cp, replicas, degrees)):
        assert mine.pop("sizes") == sizes
        assert mine == {name: next(g for g in groups if rank in g) for name, groups in expected.items()}


def plan_of(words: str, world: int) -> dict:
    parsed = parse_args(f"--preset tiny --mock-data --train-iters 2 --micro-batch-size 1 --global-batch-size 8 {words}".split())
    return json.loads(as_json(build_plan(parsed.run, world, parsed.given)))


def test_a_dry_run_tells_the_groups_of_context_parallelism_and_hybrid_sharding():
    words = "--num-experts 8 --moe-expert-parallel-size 2 --context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"
    plan = plan_of(f"{words} --num-distributed-optimizer-instances 2", 8)
    assert (plan["degrees"]["cp"], plan["degrees"]["dp"], plan["degrees"]["replicas"]) == (2, 2, 2)
    ranks = {name: plan["groups"][name]["ranks"] for name in ("tp", "cp", "dp", "shard", "replicate")}
    assert ranks == {
        "tp": [[0, 1], [2, 3], [4, 5], [6, 7]], "cp": [[0, 2], [1, 3], [4, 6], [5, 7]], "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "shard": [[0, 2], [4, 6], [1, 3], [5, 7]], "replicate": [[0, 4], [2, 6], [1, 5], [3, 7]],
    }  # fmt: skip
    assert plan["groups"]["edp"]["2"]["ranks"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan["groups"]["expert_shard"]["2"]["ranks"] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert plan["groups"]["expert_replicate"]["2"]["ranks"] == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert plan["not_built_yet"] == []


def test_a_dry_run_counts_what_a_rank_holds_under_hybrid_sharding_and_context_parallelism():
    """Halves and quarters: sharded over two of the four data ranks, or over all of them, whichever of dp and cp they are."""
    all_four, halves = (plan_of(f"--num-experts 1 {words}", 4)["per_rank"]["fullest"]["dense_parameters"] for words in (
        "--context-parallel-size 2", "--context-parallel-size 2 --num-distributed-optimizer-instances 2"))  # fmt: skip
    assert halves == 2 * all_four
    assert all_four == plan_of("--num-experts 1", 4)["per_rank"]["fullest"]["dense_parameters"]
