"""Loss on held-out data: deterministic, no dropout, no routing noise, evaluation capacity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.context import part_of
from megatron_moe.parallel.zero import reshard


@dataclass(frozen=True)
class Evaluation:
    lm_loss: float  # mean over unmasked tokens, nats
    tokens: int


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[Batch], mesh: ParallelMesh, device: torch.device, interrupted: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Sum of losses over sum of tokens, over all ranks. None when it was interrupted. Collective: equal batches on every rank."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        for batch in batches:
            batch, _ = part_of(batch.to(device), None, mesh)
            losses_BS = model(batch.tokens, batch.position_ids, batch.labels, batch.segment_ids)
            sums += torch.stack([(losses_BS * batch.loss_mask).sum().double(), batch.loss_mask.sum().double()])
            if interrupted():
                return None
    finally:
        model.train()
        reshard(model)
        for moe in moe_layers(model):
            moe.stats.reset()
    total, tokens = mesh.sum(sums, "dp", "cp").tolist()
    return Evaluation(total / max(tokens, 1.0), int(tokens))
