"""Loss on held-out data: deterministic, no dropout, no routing noise, evaluation capacity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.context import part_of
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.parallel.zero import reshard


@dataclass(frozen=True)
class Evaluation:
    lm_loss: float  # mean over unmasked tokens, nats
    tokens: int


@torch.no_grad()
def evaluate(
    model: GPT | PipelinedGPT,
    batches: Iterable[Batch],
    mesh: ParallelMesh,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
    in_flight: int = 1,
) -> Evaluation | None:
    """Sum of losses over sum of tokens, over all ranks. None when it was interrupted. Collective: equal batches on every rank.

    `in_flight`: micro-batches that a pipeline is given at a time; the last ones may be fewer."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    left = iter(batches)
    try:
        while together := [
            part_of(batch.to(device, non_blocking=True), None, mesh)[0]
            for batch in itertools.islice(left, in_flight if isinstance(model, PipelinedGPT) else 1)
        ]:
            losses_BS = losses_of(model, together)
            if losses_BS is not None:
                mask_BS = torch.cat([batch.loss_mask for batch in together])
                sums += torch.stack([(losses_BS * mask_BS).sum().double(), mask_BS.sum().double()])
            if interrupted():
                return None
    finally:
        model.train()
        reshard(model)
        for moe in moe_layers(model):
            moe.stats.reset()
    total, tokens = mesh.sum(sums, "dp", "cp", "pp").tolist()
    return Evaluation(total / max(tokens, 1.0), int(tokens))


def losses_of(model: GPT | PipelinedGPT, batches: Sequence[Batch]) -> Tensor | None:
    """[B, S] of all sequences; None on the ranks of a pipeline that do not see them."""
    if isinstance(model, PipelinedGPT):
        return model.losses(batches)
    (batch,) = batches
    return model(batch.tokens, batch.position_ids, batch.labels, batch.segment_ids)
