"""The benchmark of expert parallelism on one machine: it runs, takes a step apart as it says, and compares equal work only."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from benchmarks import __main__ as command
from benchmarks import expert_parallel
from benchmarks.expert_parallel import COMPUTE, ONE, PACKING, PARTS, ROWS, WAITING, WEIGHTS, Split
from megatron_moe.moe.dispatch import build_dispatcher

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("what", ["step", pytest.param("layer", marks=pytest.mark.matrix)])
def test_it_runs(tmp_path, what):
    assert command.main(["expert_parallel", "--quick", "--what", what, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("expert_parallel-*.json")
    cases = json.loads(file.read_text())["figures"]
    assert list(cases) == (["layer, fp32"] if what == "layer" else ["step, fp32, learned", "step, fp32, balanced"])
    found = next(iter(cases.values()))
    assert set(found["wall_over_one_process"]) == {ONE, "EP 2"}
    assert found["losses_of_the_first_steps"]["EP 2"] == pytest.approx(found["losses_of_the_first_steps"][ONE], rel=1e-4)
    first, second = found["split_in_seconds"]["EP 2"]
    assert first["bytes of rows"] > 0 and first["bytes of weights"] == second["bytes of weights"]
    assert (first["bytes of weights"] > 0) is (what == "step")
    assert all(first[part] > 0 for part in ((COMPUTE, PACKING, ROWS) if what == "layer" else PARTS))
    assert found["split_in_seconds"][ONE][0]["bytes of rows"] == 0


def test_ranks_share_the_batch_and_the_experts():
    assert expert_parallel.shared_out("--micro-batch-size 4", 1) == "--micro-batch-size 4"
    assert expert_parallel.shared_out("--micro-batch-size 4 --topk 2", 2) == "--micro-batch-size 2 --topk 2 --moe-expert-parallel-size 2"


def test_losses_that_differ_are_not_compared():
    expert_parallel.check_equal({ONE: [2.0], "EP 2": [2.0 + 1e-5]}, 1e-4)
    with pytest.raises(AssertionError, match="EP 2 and one process do not do the same"):
        expert_parallel.check_equal({ONE: [2.0], "EP 2": [2.1]}, 1e-4)


def _taken_apart():
    """Rank 1 comes late to a collective, and has less to send."""
    dispatcher = build_dispatcher("alltoall", 2, 1, dist.group.WORLD)
    dist.barrier()  # one may have imported for longer
    rank, split = dist.get_rank(), Split()
    with split.watching():
        time.sleep(0.2 * rank)
        dist.all_reduce(torch.ones(1000))
        x_TD = torch.ones(30, 8, requires_grad=True)
        plan = dispatcher.plan(torch.zeros(30, 1, dtype=torch.int64))  # all go to rank 0
        split.bytes.clear()  # counts
        weights_TK = torch.ones(30, 1, requires_grad=True)
        dispatcher.through(lambda x_RD, _, weights_R, *__: x_RD * weights_R[:, None], x_TD, None, weights_TK, plan).sum().backward()
    return split.found(), plan.sent_bytes


def test_waiting_is_told_from_moving_and_bytes_are_those_that_cross():
    (late_for, sent), (came_late, sent_by_second) = run_distributed(_taken_apart, 2)
    assert late_for[WAITING] > 0.15 and late_for[WEIGHTS] < 0.1
    assert came_late[WAITING] < 0.15 and came_late[COMPUTE] >= 0.2
    for found, (forward, backward) in ((late_for, sent), (came_late, sent_by_second)):
        assert found["bytes of rows"] == forward + backward
        assert found[ROWS] > 0 and found[PACKING] > 0


def test_time_within_a_part_counts_once():
    split = Split()
    with split.part(PACKING):
        time.sleep(0.02)
        with split.part(ROWS):
            time.sleep(0.05)
    found = split.found()
    assert 0.02 <= found[PACKING] < 0.05 <= found[ROWS]
