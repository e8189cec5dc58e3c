"""The proof on the ranks that are here: before a run starts, or inside the processes that stand in for ranks that are not."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.apply import build_parallel_mesh
from megatron_moe.training.distributed import World, init_distributed
from megatron_moe.training.verify.compare import LIMIT, Verdict, compare, report
from megatron_moe.training.verify.layout import train_layout
from megatron_moe.training.verify.reference import STEPS, train_reference
from megatron_moe.training.verify.shrink import Small, lines, shrink
from megatron_moe.utils.groups import end_groups
from megatron_moe.utils.logging import logger

EXIT_CODE = 3  # of a run that did not start because its layout is not what one device computes
TITLE = "verify-parallelism"


def verify_on_ranks(small: Small, mesh: ParallelMesh, device: torch.device) -> Verdict:
    """Rank 0 is the one device as well; the others wait for it. The same verdict on all ranks. Collective."""
    rank, say = dist.get_rank(), _progress()
    expected = None
    clip = torch.zeros((), dtype=torch.float64, device=device)
    if rank == 0:
        expected = train_reference(small.run, small.vocab_size, small.data_ranks, device, say)
        clip.fill_(expected.clip)
    dist.broadcast(clip, 0)
    found, drifts = train_layout(small.run, small.vocab_size, mesh, device, float(clip), say)
    verdicts = [compare(found, expected, drifts) if expected is not None else None]
    dist.broadcast_object_list(verdicts, 0, device=device)
    return verdicts[0]


def verify_or_exit(run: RunConfig, mesh: ParallelMesh, world: World) -> None:
    """Before a run on these ranks. A layout that is not right ends the program on all of them, with nothing written."""
    small = _shrunk_alike(run, world)
    assert sorted(small.run.expert_degrees()) == sorted(mesh.experts), f"{small.run.expert_degrees()} are not {sorted(mesh.experts)}"
    if world.rank == 0:
        tell(f"{world.size} rank(s) on {world.device.type}, {STEPS} steps of a small model, against one device", lines(small))
    started = time.monotonic()
    verdict = verify_on_ranks(small, mesh, world.device)
    if world.rank == 0:
        tell(f"done in {time.monotonic() - started:.0f} s", report(verdict))
        tell(conclusion(verdict))
    if not verdict.is_equal:
        sys.stderr.flush()
        dist.barrier()  # nobody leaves before rank 0 has spoken: the launcher ends all at the first exit
        raise SystemExit(EXIT_CODE)


def _shrunk_alike(run: RunConfig, world: World) -> Small:
    """What rank 0 makes of the run, on all ranks; or its problem."""
    held: list[Small | ConfigError | None] = [None]
    if world.rank == 0:
        try:
            held = [shrink(run, world.size)]
        except ConfigError as error:
            held = [error]
    dist.broadcast_object_list(held, 0, device=world.device)
    if isinstance(held[0], ConfigError):
        raise held[0]
    return held[0]


def verify_here(run: RunConfig) -> None:
    """The proof alone, on the ranks of a launcher."""
    world = init_distributed(run.parallel)
    try:
        verify_or_exit(run, build_parallel_mesh(run, world.device.type), world)
    finally:
        end_groups()


def conclusion(verdict: Verdict) -> str:
    if verdict.is_equal:
        return f"the layout trains the model that one device trains (all within {LIMIT:.0e})"
    what = str(verdict.first or verdict.drifts[0])
    return f"MISMATCH: {what}. This layout does not train the model that one device trains: no run is started, nothing was written"


def tell(title: str, more=()) -> None:
    logger.info("%s: %s", TITLE, title)
    for line in more:
        logger.info("  %s", line)


def _progress():
    return lambda text: logger.info("%s: %s", TITLE, text) if dist.get_rank() == 0 else None
