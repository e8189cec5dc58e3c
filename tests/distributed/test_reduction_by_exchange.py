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
    reduce, kind = _ReduceScatterByExchange(), {"dtype": dtype, "device": torch.device("cpu")}
    for values in (torch.full_like(mine, 7.0)[: ranks * (numel // 2)], torch.ones(ranks * 2 * numel).to(dtype), mine):
        sent = reduce.allocate(values.shape, **kind).copy_(values)  # of a smaller unit, of a larger one, and then of ours
        output = reduce.allocate((len(values) // ranks,), **kind)
        reduce(output, sent, dist.group.WORLD, dist.ReduceOp.SUM)
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


def memory() -> tuple[bool, bool]:
    reduce, kind = _ReduceScatterByExchange(), {"dtype": torch.float32, "device": torch.device("cpu")}
    pairs = []
    for _ in range(2):
        sent, output = reduce.allocate((2000,), **kind).fill_(1.0), reduce.allocate((1000,), **kind)
        reduce(output, sent, dist.group.WORLD, dist.ReduceOp.SUM)
        pairs.append((sent, output))
    (a, first), (b, second) = pairs
    return a.data_ptr() == b.data_ptr(), first.data_ptr() == second.data_ptr()


def test_what_travels_lies_in_memory_that_is_kept_and_gradients_do_not():
    assert run_distributed(memory, 2) == [(True, False)] * 2


def average() -> None:
    _ReduceScatterByExchange()(torch.empty(1), torch.ones(2), dist.group.WORLD, dist.ReduceOp.AVG)


def test_another_reduction_than_a_sum_is_refused():
    with pytest.raises(RuntimeError, match="gradients are summed"):
        run_distributed(average, 2)
