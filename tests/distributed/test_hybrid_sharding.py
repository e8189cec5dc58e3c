"""What hybrid sharding sends and keeps: gathered and scattered within a replica, summed between replicas once a step."""

from __future__ import annotations

from collections import Counter

import pytest
from distributed_pool import run_distributed

from distributed import parity
from distributed.test_zero_accounting import DENSE, DENSE_UNITS, EXPERT, EXPERT_UNITS, EXPERTS, MOE_LAYERS, ROOT, count_step

pytestmark = pytest.mark.distributed


def calls(kind: str, ranks: int, units: int, elements: int) -> Counter:
    return Counter({(kind, ranks, "calls"): units, (kind, ranks, "elements"): elements})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 2])
def test_two_replicas_of_two_shards(ep, stage):
    """Four ranks. Experts at EP 1 lie like the rest; at EP 2 two ranks hold the same ones, and are replicas of each other."""
    flags = f"--zero-stage {stage} --moe-expert-parallel-size {ep} --moe-token-dispatcher alltoall --micro-batch-size 1"
    found = run_distributed(count_step, 4, f"{flags} --num-distributed-optimizer-instances 2")[0]
    experts = MOE_LAYERS * EXPERT * EXPERTS // ep
    are_sharded = ep == 1
    shard = DENSE // 2 + (experts // 2 if are_sharded else experts)

    def within(kind: str, dense_units: int, dense: int) -> Counter:
        return calls(kind, 2, dense_units, dense) + (calls(kind, 2, EXPERT_UNITS, experts) if are_sharded else Counter())

    gathered, gathered_again = within("all-gather", DENSE_UNITS, DENSE), within("all-gather", DENSE_UNITS - 1, DENSE - ROOT)
    scattered = within("reduce-scatter", DENSE_UNITS, DENSE)
    between = calls("all-reduce", 2, DENSE_UNITS + EXPERT_UNITS, shard)
    scalars = calls("all-reduce", 4, 2, 2)  # loss and gradient norm
    assert parity.SEQUENCES // 4 == 2  # micro-batches
    for i in (0, 1):
        assert found.calls[f"forward {i}"] == (gathered if stage == 3 or i == 0 else Counter())
        expected = (gathered_again if stage == 3 else Counter()) + (scattered if stage >= 2 or i else Counter())
        assert found.calls[f"backward {i}"] == expected + (between + scalars if i else Counter())
    assert found.calls["update"] == Counter()
    assert (found.parameters["update"], found.moments) == (shard, 2 * shard)
    assert found.gradients["backward 1"] == shard
