"""The proof for ranks that are not here: the command for 64 GPUs, on a laptop.

    RunConfig --shrink.fold--> Small, at most 8 ranks -> as many processes of this machine over gloo -> the verdict of rank 0

Processes meet in a file and speak over the loopback interface. None outlives this one, and none waits for ever: collectives have a
timeout, the whole has a deadline, and the first process that fails ends the others.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from megatron_moe.config.run import RunConfig
from megatron_moe.training.verify.compare import Verdict, report
from megatron_moe.training.verify.ranks import EXIT_CODE, conclusion, tell, verify_on_ranks
from megatron_moe.training.verify.shrink import Small, fold, lines

START_SECONDS, DEADLINE_SECONDS = 120.0, 900.0  # of one collective; of one layout
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class VerificationError(RuntimeError):
    """The layout did not come to a verdict: what its processes said."""


def verify_folded(run: RunConfig, world_size: int | None) -> int:
    """Report on standard error; returns the exit code."""
    code = 0
    for small in fold(run, world_size):
        tell(f"{small.world_size} process(es) in place of {world_size or 'the'} ranks of the command", lines(small))
        started = time.monotonic()
        try:
            verdict = run_processes(small)
        except VerificationError as error:
            tell(f"MISMATCH: the layout does not run where one device does.\n{error}")
            code = EXIT_CODE
            continue
        tell(f"done in {time.monotonic() - started:.0f} s", report(verdict))
        tell(conclusion(verdict))
        code = code or (0 if verdict.is_equal else EXIT_CODE)
    return code


def run_processes(small: Small) -> Verdict:
    """One process for each rank; the verdict of rank 0."""
    directory = tempfile.mkdtemp(prefix="verify_")
    context, processes, pipes = get_context("spawn"), [], []
    try:
        for rank in range(small.world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(rank, small, directory, there), name=f"rank {rank}", daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        return _answer(pipes, processes)
    finally:
        for process in processes:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        shutil.rmtree(directory, ignore_errors=True)


def _answer(pipes: list, processes: list) -> Verdict:
    """Of rank 0, when all have come to their end; else what the ranks that failed have said."""
    end, answers, failures = time.monotonic() + DEADLINE_SECONDS, {}, {}
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = connection.wait(list(waiting), timeout=max(end - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]
            try:
                answers[rank], text = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[rank].join(5)
                answers[rank], text = None, f"ended with exit code {processes[rank].exitcode}"
            if text:
                failures[rank] = text
                end = min(end, time.monotonic() + 1)  # the others may only have lost the connection to this one
    if failures:
        lost = ("closed by peer", "reset by peer")
        rank, text = min(failures.items(), key=lambda failure: any(word in failure[1] for word in lost))
        raise VerificationError(f"rank {rank}: {text}")
    if missing := [str(rank) for rank in range(len(pipes)) if rank not in answers]:
        raise VerificationError(f"no answer from rank {', '.join(missing)} within {DEADLINE_SECONDS:g} s")
    return answers[0]


# ---------------------------------------------------------------- the side of a process


def _process(rank: int, small: Small, directory: str, pipe: connection.Connection) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(small.world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(small.world_size))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    try:
        answer = (_verify(rank, small, directory), "")
    except BaseException:
        answer = (None, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)  # no destructors: a peer that is gone must not keep this process


def _verify(rank: int, small: Small, directory: str) -> Verdict:
    import torch
    import torch.distributed as dist

    from megatron_moe.parallel.apply import build_parallel_mesh
    from megatron_moe.utils.logging import setup_logging

    setup_logging()
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), small.world_size)
    timeout = timedelta(seconds=START_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=small.world_size, timeout=timeout)
    mesh = build_parallel_mesh(small.run, "cpu")
    verdict = verify_on_ranks(small, mesh, torch.device("cpu"))
    dist.barrier()
    return verdict


def _leave_with_parent() -> None:
    parent_process().join()  # also when that was killed with signal 9
    os._exit(1)
