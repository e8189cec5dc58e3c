"""Run a function on several gloo ranks: one pool of worker processes per world size, for the whole pytest session.

Importing torch costs seconds per process, so workers are started once and then wait for work. Flow of one call:
`run_distributed(fn, 2, x)` -> the pool of size 2 (started at first use) -> every worker runs `fn(x)` inside a gloo
process group of 2 ranks -> the results, in rank order.

    def _sum_of_ranks(bias):
        total = torch.tensor(dist.get_rank() + bias)
        dist.all_reduce(total)
        return total.item()

    def test_all_reduce_sums_over_ranks():
        assert run_distributed(_sum_of_ranks, 2, 10) == [21, 21]

Rules: `fn` is a function at module level of a file that a worker can import too; arguments and results are pickled.
Environment, working directory, default dtype and seed are put back after every call; module state and process groups stay.
Equal device meshes are one mesh in a worker: groups cannot be ended one by one, as DTensor's caches name them.
The first exception of any rank is raised again here, caused by a `WorkerError` with rank and traceback.
After an exception, a timeout or a dead worker the pool is killed and the next call starts a new one: ranks that have
fallen out of step cannot spoil another test. This file imports torch in the workers only.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

START_TIMEOUT = 180.0  # seconds until every worker has imported torch and joined the process group
GRACE = 5.0  # seconds the other ranks get to report, once one has failed


class WorkerError(RuntimeError):
    """What went wrong in the workers, with rank and traceback."""


@dataclass
class _Reply:
    """One rank's answer: its result, or its exception and traceback."""

    result: Any = None
    error: BaseException | None = None
    text: str = ""  # traceback; empty when the call worked


@dataclass
class _Pool:
    """`size` worker processes, each with a pipe to this one."""

    size: int
    interprets: bool
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gloo_pool_")))
    processes: list = field(default_factory=list)
    pipes: list = field(default_factory=list)


_pools: dict[tuple[int, bool], _Pool] = {}


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120, interpret: bool = False) -> list[Any]:
    """`fn(*args)` on `world_size` ranks; returns the results in rank order, never hangs longer than `timeout` seconds. interpret: by ranks
    in which triton is an interpreter, which it becomes when it is imported."""
    pool = _pools.get((world_size, interpret)) or _start(world_size, interpret)
    try:
        work = pickle.dumps((fn, args))
        for pipe in pool.pipes:
            pipe.send_bytes(pickle.dumps((sys.path, work)))
        name = getattr(fn, "__qualname__", fn)  # a functools.partial has none
        replies = _collect(pool, time.monotonic() + timeout, f"{name} on {world_size} ranks did not end in {timeout:g} s")
        return [replies[rank].result for rank in range(world_size)]
    except BaseException:
        _kill(pool)
        raise


def close_pools() -> None:
    """End all workers; conftest.py calls it at the end of the session."""
    for pool in list(_pools.values()):
        for pipe in pool.pipes:
            pipe.close()  # the worker reads the end of the pipe and leaves
        deadline = time.monotonic() + GRACE
        for process in pool.processes:
            process.join(max(deadline - time.monotonic(), 0))
        _kill(pool)


atexit.register(close_pools)  # without pytest, and when pytest is interrupted


# ---------------------------------------------------------------- the side of the tests


def _start(size: int, interprets: bool) -> _Pool:
    pool = _pools[size, interprets] = _Pool(size, interprets)
    context = get_context("spawn")
    try:
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, size, interprets, pool.directory, there), name=f"gloo rank {rank} of {size}"
            )
            process.start()
            there.close()  # so that the pipe ends when the worker does
            pool.processes.append(process)
            pool.pipes.append(here)
        _collect(pool, time.monotonic() + START_TIMEOUT, f"{size} workers did not start in {START_TIMEOUT:g} s")
    except BaseException:
        _kill(pool)
        raise
    return pool


def _kill(pool: _Pool) -> None:
    """End the workers by process id, whatever they are doing, and forget the pool."""
    for process in pool.processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in pool.processes:
        process.join()
    for pipe in pool.pipes:
        pipe.close()
    shutil.rmtree(pool.directory, ignore_errors=True)
    if _pools.get((pool.size, pool.interprets)) is pool:
        del _pools[pool.size, pool.interprets]


def _collect(pool: _Pool, deadline: float, what: str) -> dict[int, _Reply]:
    """One reply of every rank, or the exception of the rank that failed first."""
    replies: dict[int, _Reply] = {}
    dead: dict[int, int | None] = {}
    limit = deadline
    while len(replies) + len(dead) < pool.size and (remaining := limit - time.monotonic()) > 0:
        waiting = {pool.pipes[rank]: rank for rank in range(pool.size) if rank not in replies and rank not in dead}
        for pipe in connection.wait(list(waiting), timeout=remaining):
            rank = waiting[pipe]
            try:
                replies[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                pool.processes[rank].join(GRACE)
                dead[rank] = pool.processes[rank].exitcode
            if rank in dead or replies[rank].text:
                limit = min(limit, time.monotonic() + GRACE)  # the others may wait for this rank in a collective
    failed = [rank for rank in replies if replies[rank].text]  # in the order of arrival
    if not failed and not dead and len(replies) < pool.size:
        missing = [rank for rank in range(pool.size) if rank not in replies]
        raise WorkerError(f"{what}; no answer from rank {', '.join(map(str, missing))}\n{_stacks(pool, missing)}")
    if failed or dead:
        notes = [f"rank {rank} of {pool.size} died with exit code {code}" for rank, code in dead.items()]
        notes += [f"rank {rank} of {pool.size} raised\n{replies[rank].text}" for rank in failed]
        failure = WorkerError("\n".join(notes))
        if not dead and replies[failed[0]].error is not None:  # beside a dead rank, exceptions are its consequence
            raise replies[failed[0]].error from failure
        raise failure
    return replies


def _stacks(pool: _Pool, ranks: list[int]) -> str:
    """Where the silent ranks are: faulthandler writes their Python stacks on SIGUSR1."""
    for rank in ranks:
        if pool.processes[rank].is_alive():
            os.kill(pool.processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    files = {rank: pool.directory / f"stack_{rank}" for rank in ranks}
    return "\n".join(f"rank {rank}:\n{path.read_text()}" for rank, path in files.items() if path.exists())


# ---------------------------------------------------------------- the side of a worker


def _worker(rank: int, size: int, interprets: bool, directory: Path, pipe: connection.Connection) -> None:
    """Join the process group, then run what arrives until the pipe ends."""
    if interprets:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    stack_file = open(directory / f"stack_{rank}", "w")  # noqa: SIM115 - faulthandler keeps the descriptor
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    reply = _attempt(lambda: _join_group(rank, size, directory))
    while True:
        try:
            pipe.send_bytes(_pickled(reply))
            path, work = pickle.loads(pipe.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            os._exit(0)  # no destructors: a peer that is gone must not keep this process
        sys.path[:] = path
        reply = _attempt(lambda work=work: _run(*pickle.loads(work)))


def _leave_with_parent() -> None:
    parent_process().join()  # also when pytest was killed with signal 9
    os._exit(1)


def _join_group(rank: int, size: int, directory: Path) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _raise_file_limit()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _share_meshes()
    _share_device()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size, timeout=timedelta(seconds=300))


def _share_device() -> None:
    """All groups of this worker on one gloo device. Each device has a thread that wakes up a hundred times a second for as long as the
    worker lives; a group makes one of its own, and after a hundred layouts idle workers took most of two cores."""
    from torch.distributed import distributed_c10d

    gloo = distributed_c10d.ProcessGroupGloo
    device = gloo.create_default_device()

    class OnOneDevice(gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta):
            options = gloo._Options()
            options._devices, options._threads, options._timeout = [device], 2, timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice


def _share_meshes() -> None:
    """A mesh like one before is that one: each group has sockets and threads that live as long as the worker, and making one takes time."""
    import functools

    import torch.distributed as dist

    known: dict[Any, Any] = {}
    build = dist.device_mesh.init_device_mesh

    @functools.wraps(build)
    def init_device_mesh(device_type: str, mesh_shape: tuple[int, ...], **options: Any) -> Any:
        key = (device_type, tuple(mesh_shape), repr(options))
        if key not in known:
            known[key] = build(device_type, mesh_shape, **options)
        return known[key]

    dist.device_mesh.init_device_mesh = dist.init_device_mesh = init_device_mesh


def _raise_file_limit() -> None:
    """Every gloo group of n ranks holds n - 1 sockets, and groups live as long as the pool."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _run(fn: Callable, args: tuple) -> Any:
    """Call the function and leave no trace of it in the process."""
    import torch

    environment, directory = dict(os.environ), os.getcwd()
    random.seed(0)
    torch.manual_seed(0)
    try:
        return fn(*args)
    finally:
        torch.set_default_dtype(torch.float32)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)


def _attempt(call: Callable[[], Any]) -> _Reply:
    try:
        return _Reply(result=call())
    except BaseException as error:  # SystemExit and pytest's skip included: the parent decides
        return _Reply(error=error, text=traceback.format_exc())


def _pickled(reply: _Reply) -> bytes:
    """Plain pickle: tensors travel by value. What cannot travel becomes text."""
    try:
        data = pickle.dumps(reply)
        pickle.loads(data)  # an exception with a constructor of its own may fail only here
        return data
    except Exception:
        text = reply.text or f"the result cannot be pickled\n{traceback.format_exc()}"
        return pickle.dumps(_Reply(text=text))
