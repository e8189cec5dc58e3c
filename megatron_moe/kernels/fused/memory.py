"""Memory that every rank of a group can read and write: four kinds with one interface.

`memory.alloc(shape, dtype)` is collective: all ranks of the group call it in the same order with the same arguments, and it returns
when everyone's can be reached. It may be let go after a `memory.meet()`, which waits until nobody is at work on it any more.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Shared:
    """Zeros of the same shape on every rank."""

    tensor: Tensor  # of this rank
    pointers: Tensor  # int64 [ranks] on the device: the address of everyone's, as this rank sees it
    others: Any  # what must live as long as the pointers


class Memory:
    """Of the ranks of `group`, on `device`."""

    kind = ""

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str):
        self.group, self.device = group, torch.device(device)
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> Shared:
        mine, everyones, others = self._share(tuple(shape), dtype)
        pointers = torch.tensor([t.data_ptr() for t in everyones], dtype=torch.int64, device=self.device)
        self.meet()
        return Shared(mine, pointers, (everyones, others))

    def meet(self) -> None:
        """All ranks, and what their devices have begun, have come so far. The host waits."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(self.group)

    def largest(self, number: int) -> int:
        """Of all ranks. The host waits."""
        most = torch.tensor(number, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Any]:
        """(zeros of this rank, everyone's in the order of the ranks, what keeps those there)"""
        raise NotImplementedError


class SymmetricMemory(Memory):
    """torch symmetric memory: the one for GPUs of one NVLink domain. Its handles travel through the group's store, so groups of any backend
    will do. Several ranks on one GPU: TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1.

    The group must be one of a partition of all ranks, which all make theirs at the same time: torch waits for ever when some ranks are
    left out (pytorch issue 196082).
    """

    kind = "symmetric"

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Any]:
        import torch.distributed._symmetric_memory as symmetric_memory

        mine = symmetric_memory.empty(*shape, dtype=dtype, device=self.device).zero_()
        torch.cuda.synchronize(self.device)
        handle = symmetric_memory.rendezvous(mine, self.group.group_name)
        return mine, [handle.get_buffer(rank, shape, dtype) for rank in range(self.ranks)], handle


class IpcMemory(Memory):
    """CUDA IPC handles, as torch hands tensors to other processes: where symmetric memory cannot be had."""

    kind = "ipc"

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        mine = torch.zeros(shape, dtype=dtype, device=self.device)
        torch.cuda.synchronize(self.device)
        handles: list[Any] = [None] * self.ranks
        dist.all_gather_object(handles, reduce_tensor(mine), group=self.group)
        return mine, [mine if rank == self.rank else build(*args) for rank, (build, args) in enumerate(handles)], None


class ProcessMemory(Memory):
    """Shared memory of processes on one Linux machine: for the interpreter. It has no name in any folder, so none is left behind when
    a process dies: the others open it through its owner's descriptor, in /proc."""

    kind = "processes"

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group, "cpu")

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Any]:
        elements = torch.Size(shape).numel()
        length = (elements * dtype.itemsize // mmap.PAGESIZE + 1) * mmap.PAGESIZE  # whole pages, and one at least
        descriptor = os.memfd_create("fused_all_to_all")
        os.ftruncate(descriptor, length)  # zeros
        owners: list[Any] = [None] * self.ranks
        dist.all_gather_object(owners, (os.getpid(), descriptor), group=self.group)
        everyones = [_mapped(f"/proc/{pid}/fd/{number}", length).view(dtype)[:elements].view(shape) for pid, number in owners]
        dist.barrier(self.group)  # everyone has opened mine
        os.close(descriptor)
        return everyones[self.rank], everyones, None


def _mapped(path: str, length: int) -> Tensor:
    descriptor = os.open(path, os.O_RDWR)
    try:
        pages = mmap.mmap(descriptor, length)
    finally:
        os.close(descriptor)
    return torch.frombuffer(pages, dtype=torch.uint8)


class VirtualRanks:
    """Ranks that are streams of one process: real concurrency and real signals on one GPU, nothing to set up. On the CPU only one of
    them, as the interpreter ends a kernel before it begins the next.

    memories = VirtualRanks(4, "cuda").memories
    """

    def __init__(self, ranks: int, device: torch.device | str):
        self.tensors: list[list[Tensor]] = []  # of each allocation, everyone's
        self.memories = [VirtualMemory(self, rank, ranks, device) for rank in range(ranks)]


class VirtualMemory(Memory):
    kind = "virtual"

    def __init__(self, world: VirtualRanks, rank: int, ranks: int, device: torch.device | str):
        self.world, self.rank, self.ranks, self.device, self.number = world, rank, ranks, torch.device(device), 0

    def meet(self) -> None:
        """One thread: it is everybody."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def largest(self, number: int) -> int:
        return number

    def _share(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Any]:
        if self.number == len(self.world.tensors):  # the first of the ranks allocates for all
            self.world.tensors.append([torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(self.ranks)])
        everyones = self.world.tensors[self.number]
        self.number += 1
        return everyones[self.rank], everyones, None
