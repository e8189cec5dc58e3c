"""The start of a run from a dense model, and the proof: the first logits against those of the dense model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.checkpoint.files import CheckpointError, read_manifest, run_directory
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.config.run import RunConfig
from megatron_moe.config.upcycling import inexact_because
from megatron_moe.conversion.hf.start import open_start
from megatron_moe.conversion.native import NativeSource
from megatron_moe.conversion.source import Source
from megatron_moe.conversion.upcycle import fill, fit_problems
from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.apply import build_sharded_model
from megatron_moe.parallel.context import part_of
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.parallel.zero import reshard
from megatron_moe.training.distributed import World
from megatron_moe.training.preflight import Prepared
from megatron_moe.utils.logging import logger


@dataclass(frozen=True)
class Upcycled:
    """Which dense model it was, and what a person should know about how it was chosen."""

    source: Source
    notes: tuple[str, ...]


def upcycle(prepared: Prepared, model: GPT | PipelinedGPT, world: World) -> Upcycled:
    """Fill the model from the dense one of --load, whatever layout wrote it, or of --load-hf. Collective; each rank reads what it needs."""
    upcycled, ranks = _open_dense(prepared.run, world), Ranks(world.cpu_group)
    source = upcycled.source
    if problems := ranks.first("comparing with the dense model", lambda: fit_problems(prepared.run, prepared.vocab_size, source)):
        raise CheckpointError("\n  ".join([f"{source.path.name} does not fit, nothing was loaded:", *problems[:10]]))
    ranks.all(f"upcycling {source.path.name}", lambda: fill(model, source, prepared.run))
    return upcycled


def _open_dense(run: RunConfig, world: World) -> Upcycled:
    """Collective."""
    c = run.checkpoint
    if c.load_hf:
        folder = open_start(run)
        for note in folder.notes:
            logger.info(note)
        return Upcycled(folder, ())
    found = find_checkpoint(*run_directory(c.load, c.ckpt_step), c.ckpt_verify, world.cpu_group)
    return Upcycled(NativeSource(found.path, read_manifest(found.path)), found.notes)


@dataclass(frozen=True)
class Difference:
    """To the dense model, before the first step."""

    largest: float  # absolute; infinite where there is a number that is none
    largest_dense: float  # absolute value of the dense model, what rounding is relative to
    tokens: int  # compared, of all ranks
    of: str  # logits, or losses of tokens


@torch.no_grad()
def compare_with_dense(
    prepared: Prepared, upcycled: Upcycled, model: GPT | PipelinedGPT, mesh: ParallelMesh, world: World, batch: Batch
) -> Difference:
    """Both models in the layout of the run, on a micro-batch of each rank, in evaluation and without dropping. Collective.

    For that long the dense model is there too: less than what the optimizer will take. A pipeline gives losses instead of logits.
    """
    batch = part_of(batch.to(world.device), None, mesh)[0]
    expected = answers(load_dense(prepared, upcycled, mesh, world), batch)
    with dropless(model):
        found = answers(model, batch)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    if expected is not None:
        sums = torch.stack([_largest(found - expected), _largest(expected)])
    dist.all_reduce(sums, dist.ReduceOp.MAX)
    tokens = batch.tokens.numel() * mesh.size("dp") * mesh.size("cp")
    return Difference(*sums.tolist(), tokens, "losses of tokens" if isinstance(model, PipelinedGPT) else "logits")


def load_dense(prepared: Prepared, upcycled: Upcycled, mesh: ParallelMesh, world: World) -> GPT | PipelinedGPT:
    """The dense model in the layout of the run. Collective."""
    run = prepared.run.dense()
    model = build_sharded_model(run, prepared.vocab_size, mesh)
    model.to_empty(device=world.device)
    Ranks(world.cpu_group).all("loading the dense model", lambda: fill(model, upcycled.source, run))
    return model


def answers(model: GPT | PipelinedGPT, batch: Batch) -> Tensor | None:
    """Logits (under tensor parallelism the columns here); with a pipeline losses, None on the ranks that do not see them."""
    model.eval()
    try:
        if isinstance(model, PipelinedGPT):
            return model.losses([batch])
        return model(batch.tokens, batch.position_ids, None, batch.segment_ids)
    finally:
        model.train()
        reshard(model)
        for moe in moe_layers(model):
            moe.stats.reset()


@contextmanager
def dropless(model: GPT | PipelinedGPT) -> Iterator[None]:
    """Capacity is not what the copies are about: which tokens are dropped depends on their neighbours."""
    layers = moe_layers(model)
    before = [moe.config for moe in layers]
    for moe in layers:
        moe.config = replace(moe.config, moe_token_dropping=False)
    try:
        yield
    finally:
        for moe, config in zip(layers, before):
            moe.config = config


def _largest(x: Tensor) -> Tensor:
    """NaN would vanish in the maximum over ranks."""
    return x.double().abs().nan_to_num(float("inf"), float("inf")).max()


def verdict(run: RunConfig, difference: Difference) -> str:
    """The line of the log."""
    d = difference
    line = f"{d.of} of {d.tokens} tokens of the data differ from those of the dense model by at most {d.largest:.3g}"
    if d.largest == 0:
        return f"{line} (exact)"
    if reasons := inexact_because(run):
        return f"{line}: {'; '.join(reasons)}"
    return f"{line}, where the largest is {d.largest_dense:.3g}: what rounding makes of sums in another order"
