"""Start and end of torch.distributed: the same for one process and many, CPU and CUDA."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.utils.host_memory import keep_freed_memory


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup  # gloo on every device: checkpoints and small agreements stay off the compute stream


def init_distributed(config: ParallelConfig) -> World:
    """Process group of this run: torchrun's, or a world of one without it. Raises ValueError for a backend that is not there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    use_cuda = torch.cuda.is_available() and config.distributed_backend != "gloo"
    if config.distributed_backend == "nccl" and not use_cuda:
        raise ValueError("--distributed-backend nccl needs CUDA, and torch sees no GPU here; use auto or gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE", "1") == str(size)
    if is_one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine: listen to no other
    if not os.environ.keys() & {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}:
        os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"  # torch's flight recorder: what the last words of a rank are read from
    options = {"timeout": timedelta(minutes=config.distributed_timeout_minutes)}
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    if "RANK" in os.environ:
        if is_one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            options |= {"store": loopback_store(size, options["timeout"]), "rank": int(os.environ["RANK"]), "world_size": size}
        dist.init_process_group(backend, device_id=device if use_cuda else None, **options)
    else:  # started by plain python
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    cpu_group = dist.new_group(backend="gloo", **options) if use_cuda else dist.group.WORLD
    return World(dist.get_rank(), dist.get_world_size(), device, cpu_group)


def loopback_store(size: int, timeout: timedelta) -> dist.Store:
    """The store of the rendezvous, on MASTER_PORT of the loopback interface. torch's own listens on every interface."""
    port, is_master = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    if not is_master:
        return dist.TCPStore("127.0.0.1", port, size, False, timeout=timeout)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return dist.TCPStore("127.0.0.1", port, size, True, timeout=timeout, master_listen_fd=listener.detach())


def in_turn(world: World, work: Callable[[], Any]) -> Any:
    """`work()` on rank 0, then on one rank of every other machine, then on the rest: what the first leave on a disk, shared or
    not, those after them find. Collective."""
    mine = 0 if world.rank == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    result = None
    for turn in range(3):
        if turn == mine:
            result = work()
        dist.barrier(group=world.cpu_group)
    return result


def explain_lost_rank(error: Exception, rank: int, timeout_minutes: float) -> str | None:
    """What an error of the backend means when another rank hangs or is gone; None for any other error."""
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(sign in text for sign in ("timed out waiting", "watchdog caught collective operation timeout")):
        return (
            f"rank {rank} waited for another rank longer than --distributed-timeout-minutes {timeout_minutes:g}. Each rank has printed "
            "above where it is ('no step has ended'): look for the one that is not in a collective. If that one was only slow, raise the timeout"
        )
    if any(sign in text for sign in ("connection closed by peer", "connection reset by peer", "broken pipe")):
        return f"rank {rank} lost the connection to another rank, which has ended: see its own message above"
    return None
