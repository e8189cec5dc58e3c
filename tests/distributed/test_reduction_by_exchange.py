"""On gloo, gradients are reduced by exchanging parts: the sums of torch's own reduction, in one order, for half the bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed

from megatron_moe.parallel.zero import _ReduceScatterByExchange

pytestmark = pytest.mark.distributed


def reduced(dtype: torch.dtype, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, and the parts of all ranks for this one, which are added up here."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = (torch.randn(ranks * numel, generator=torch.Generator().manual_seed(rank)) * 100).to(dtype)
    reduce = _ReduceScatterByExchange()
    output = reduce.allocate((numel,), dtype=dtype, device=torch.device("cpu"))
    reduce(output, mine, dist.group.WORLD, dist.ReduceOp.SUM)
    everyones = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyones, mine)
    return output, torch.stack([x.view(ranks, numel)[rank] for x in everyones])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_parts_are_added_up_ranks_ascending(dtype, world):
    for found, parts in run_distributed(reduced, world, dtype, 37):
        wide = torch.promote_types(dtype, torch.float32)
        expected = parts[0].to(wide)
        for part in parts[1:]:
            expected = expected + part.to(wide)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_nothing_to_reduce_is_nothing():
    assert all(found.numel() == 0 for found, _ in run_distributed(reduced, 2, torch.float32, 0))


def average() -> None:
    _ReduceScatterByExchange()(torch.empty(1), torch.ones(2), dist.group.WORLD, dist.ReduceOp.AVG)


def test_another_reduction_than_a_sum_is_refused():
    with pytest.raises(RuntimeError, match="gradients are summed"):
        run_distributed(average, 2)
