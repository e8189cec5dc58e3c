"""Gradients of sharded weights used on local tokens: a replicated weight's gradient is a part of a sum."""

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_moe.utils.dtensor import local_weight


def _gradient(placement):
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    weight = distribute_tensor(torch.ones(4, 3), mesh, [placement]).requires_grad_()
    (local_weight(weight) * (rank + 1.0)).sum().backward()  # every rank has tokens of its own
    return str(weight.grad.placements[0]), weight.grad.full_tensor()[:, 0].tolist()


def test_a_plain_tensor_is_its_own_local_weight():
    weight = torch.ones(2, requires_grad=True)
    assert local_weight(weight) is weight


@pytest.mark.distributed
def test_the_gradient_of_a_replicated_weight_is_summed_over_the_ranks():
    assert run_distributed(_gradient, 2, Replicate()) == [("P(sum)", [3.0] * 4)] * 2


@pytest.mark.distributed
def test_the_gradient_of_a_sharded_weight_stays_where_it_is():
    assert run_distributed(_gradient, 2, Shard(0)) == [("S(0)", [1.0, 1.0, 2.0, 2.0])] * 2
