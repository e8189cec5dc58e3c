"""Every name of utils.compat: that this torch has what it stands on, and that it does what its docstring says."""

import inspect
import re
import threading
import time

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_moe.utils import compat

TESTED = {
    "grouped_mm", "all_gather_into_tensor", "local_slices", "all_gather_rows", "reduce_scatter_rows",
    "sum_over_ranks", "fake_process_group", "last_collective", "Collective", "ring_attention", "ring_attention_backward",
    "reduce_unused_gradients", "with_local", "scaled_grouped_mm", "onednn_linear",
}  # fmt: skip


def test_every_name_has_a_test_here():
    defined = {
        name
        for name, value in vars(compat).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and name not in ("annotations", "Any", "Callable", "Tensor", "DTensor", "FSDPModule", "Iterator")
    }
    assert defined - {"compute_local_shape_and_global_offset", "contextmanager", "dataclass"} == TESTED


def test_scaled_grouped_mm_multiplies_groups_of_rows_by_column_major_matrices():
    x, w = (torch.empty(*shape, dtype=torch.float8_e4m3fn, device="meta") for shape in ((40, 32), (3, 48, 32)))
    scales = torch.empty(40, device="meta"), torch.empty(3, 48, device="meta")
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    y = compat.scaled_grouped_mm(x, w.transpose(1, 2), *scales, offsets)
    assert (y.shape, y.dtype) == ((40, 48), torch.bfloat16)


@pytest.mark.parametrize("has_bias", [False, True])
def test_onednn_linear_multiplies_whatever_the_strides_are(has_bias):
    torch.manual_seed(0)
    for m, k, n in ((5, 7, 3), (1, 1, 1), (0, 4, 2), (64, 33, 130)):
        for x in (torch.randn(m, k), torch.randn(k, m).t()):
            for w in (torch.randn(n, k), torch.randn(k, n).t(), torch.randn(n, k + 3)[:, 1:-2]):
                bias = torch.randn(n) if has_bias else None
                want = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
                y = compat.onednn_linear(x, w, bias)
                assert (y.shape, y.dtype) == ((m, n), torch.float32)
                torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-5 * max(k, 1) ** 0.5)


def test_fake_process_group_shards_like_a_rank_of_a_real_one():
    whole = torch.empty(10, 6, device="meta")
    for rank, rows in ((0, 3), (2, 3), (3, 1)):  # 10 rows over 4 ranks: 3 3 3 1
        with compat.fake_process_group(rank, 4):
            assert (dist.get_rank(), dist.get_world_size()) == (rank, 4)
            shard = distribute_tensor(whole, init_device_mesh("cpu", (4,)), [Shard(0)], src_data_rank=None)
            assert shard.to_local().shape == (rows, 6)
    assert not dist.is_initialized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_multiplies_groups_of_rows(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(5, 8, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype)
    y = compat.grouped_mm(x, w, offs=torch.tensor([2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(y, torch.cat([x[:2] @ w[0], x[2:] @ w[2]]), rtol=0.02, atol=0.02)


def _slices():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(30).view(5, 6)
    shards = [distribute_tensor(whole, mesh, [placement]) for placement in (Shard(0), Shard(1), Replicate())]
    return all(torch.equal(p.to_local(), whole[compat.local_slices(p)]) for p in shards), str(compat.local_slices(shards[0]))


def _gather():
    rank = dist.get_rank()
    x = torch.full((2, 1), float(rank), requires_grad=True)
    y = compat.all_gather_rows(x, dist.group.WORLD)
    (y * torch.arange(1.0, 5.0)[:, None] * (rank + 1)).sum().backward()
    return y.flatten().tolist(), x.grad.flatten().tolist()


def _scatter():
    rank = dist.get_rank()
    x = torch.arange(4.0)[:, None].add(10 * rank).requires_grad_()
    y = compat.reduce_scatter_rows(x, dist.group.WORLD)
    (y * (rank + 1)).sum().backward()
    return y.flatten().tolist(), x.grad.flatten().tolist()


def _with_local():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = distribute_tensor(torch.arange(30).view(5, 6), mesh, [Shard(0)])
    other = compat.with_local(p, p.to_local() + 1)
    return torch.equal(other.to_local(), p.to_local() + 1) and (other.shape, other.placements, other.device_mesh) == (
        p.shape, p.placements, p.device_mesh
    )  # fmt: skip


@pytest.mark.distributed
def test_with_local_has_the_place_of_the_other_in_the_whole():
    assert run_distributed(_with_local, 2) == [True, True]


@pytest.mark.distributed
def test_local_slices_say_where_the_shard_lies():
    first, second = run_distributed(_slices, 2)
    assert first == (True, "(slice(0, 3, None), slice(0, 6, None))")
    assert second == (True, "(slice(3, 5, None), slice(0, 6, None))")


@pytest.mark.distributed
def test_all_gather_rows_concatenates_and_its_backward_sums_over_ranks():
    assert run_distributed(_gather, 2) == [
        ([0.0, 0.0, 1.0, 1.0], [3.0, 6.0]),
        ([0.0, 0.0, 1.0, 1.0], [9.0, 12.0]),
    ]


def _sum():
    x = torch.tensor([1, 10 * dist.get_rank()])
    return compat.sum_over_ranks(x, dist.group.WORLD).tolist(), x.tolist()


@pytest.mark.distributed
def test_sum_over_ranks_leaves_its_input_alone():
    assert run_distributed(_sum, 2) == [([2, 10], [1, 0]), ([2, 10], [1, 10])]


@pytest.mark.distributed
def test_reduce_scatter_rows_sums_over_ranks_and_its_backward_gathers():
    assert run_distributed(_scatter, 2) == [
        ([10.0, 12.0], [1.0, 1.0, 2.0, 2.0]),
        ([14.0, 16.0], [1.0, 1.0, 2.0, 2.0]),
    ]


def _blocks() -> list[tuple[list[float], bool]]:
    """Which keys the queries of this rank meet, block by block: the first key of each, and whether the later ones are hidden; and gradients
    that come back around the ring."""
    rank, seen = dist.get_rank(), []
    chunk_starts = torch.tensor([2.0 * rank, 2.0 * (3 - rank)]).repeat_interleave(2) + torch.tensor([0.0, 1.0, 0.0, 1.0])
    k = chunk_starts.double().view(1, 1, 4, 1)  # every key is its place in the sequence of 8

    def kernel(q, k, v, is_causal):
        seen.append((q.flatten().tolist(), k.flatten().tolist(), is_causal))
        return torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=q.dtype)

    def backward(*, query, key, value, **rest):
        return torch.zeros_like(query), torch.ones_like(key), torch.zeros_like(value)

    out, log_sums = compat.ring_attention(dist.group.WORLD, kernel, k, k, k)
    _, grad_k, _ = compat.ring_attention_backward(dist.group.WORLD, backward, out, k, k, k, out, log_sums)
    return seen, grad_k.flatten().tolist()


@pytest.mark.distributed
def test_ring_attention_brings_every_block_of_keys_once_and_their_gradients_home():
    (first, grads), (second, _) = run_distributed(_blocks, 2)
    assert first == [([0, 1, 6, 7], [0, 1, 6, 7], True), ([6, 7], [2, 3, 4, 5], False)]
    assert second == [([2, 3, 4, 5], [2, 3, 4, 5], True), ([2, 3, 4, 5], [0, 1], False)]
    assert grads == [2, 2, 1, 1]  # the first chunk is looked at from both ranks, the last one from its own


def _collectives():
    """The last collective when all have ended, and the one that this rank waits in."""
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    dist.all_reduce(torch.ones(3, 5), group=group)
    ended, waiting = _record(is_completed=True), []  # gloo tells the caller before it takes the entry off its list
    if rank == 0:
        thread = threading.Thread(target=lambda: waiting.append(_record(is_completed=False)))
        thread.start()
    else:
        time.sleep(2)
    dist.all_reduce(torch.ones(7))
    if rank == 0:
        thread.join()
    return ended, waiting


def _record(is_completed: bool, seconds: float = 10) -> compat.Collective:
    end = time.monotonic() + seconds
    while (last := compat.last_collective()).is_completed is not is_completed and time.monotonic() < end:
        time.sleep(0.01)
    return last


def test_last_collective_is_the_one_that_is_waited_in():
    (ended, waiting), (ended_on_1, _) = run_distributed(_collectives, 2)
    assert re.match(r"all_reduce \(number 1 of group \d+.*\[3, 5\]", str(ended)), str(ended)
    assert ended.is_completed and str(ended_on_1) == str(ended)
    assert "[7]" in str(waiting[0]) and not waiting[0].is_completed and waiting[0].sequence > ended.sequence


def _two_groups():
    group = dist.new_group(backend="gloo", group_desc="saves")
    dist.all_reduce(torch.ones(3, 5))
    dist.all_reduce(torch.ones(11), group=group)
    return str(compat.last_collective()), str(compat.last_collective(but="saves"))


@pytest.mark.distributed
def test_last_collective_leaves_a_group_out():
    for last, but in run_distributed(_two_groups, 2):
        assert "[11]" in last and "[3, 5]" in but


class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.rare = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)

    def forward(self, x, is_rare):
        x = self.always(x)
        return self.rare(x) if is_rare else x


def _one_rank_uses_it():
    from torch.distributed.fsdp import fully_shard

    module = Branch()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    if not compat.reduce_unused_gradients(module):
        return None
    module(torch.ones(1, 2), dist.get_rank() == 0).sum().backward()
    return [tuple(p.grad.full_tensor().shape) for p in module.parameters()]


def test_reduce_unused_gradients_sums_where_one_rank_alone_has_some():
    found = run_distributed(_one_rank_uses_it, 2)
    assert found in ([[(2, 2), (2, 2)]] * 2, [None, None])
    assert compat.reduce_unused_gradients(object()) is False, "torch 2.11 has no such setting"
