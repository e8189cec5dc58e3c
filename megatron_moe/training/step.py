"""One optimizer step: microbatches, one division, norm, clip, update."""
# B batch, S sequence, N modules of multi-token prediction, M = 1 + N tokens that are predicted from a place

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.data.batch import Batch, look_ahead
from megatron_moe.model.gpt import GPT
from megatron_moe.model.loss import of_predictions, share_of_step, weighted_sum
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.optimizer.clip import clip_gradients, gradient_factor, gradient_norm
from megatron_moe.optimizer.groups import set_rates
from megatron_moe.optimizer.half_adam import HalfAdamW
from megatron_moe.optimizer.loss_scale import LossScale, update_weights
from megatron_moe.parallel.context import part_of
from megatron_moe.parallel.half import release
from megatron_moe.parallel.pipeline import PipelinedGPT
from megatron_moe.parallel.zero import sync_gradients
from megatron_moe.training.distillation import Distillation
from megatron_moe.training.room import Room
from megatron_moe.utils.random import token_keys

if TYPE_CHECKING:
    from megatron_moe.training.graphed import StepGraph

Objective = Callable[[GPT, Batch, Tensor, Tensor], tuple[Tensor, Tensor]]  # language_model_loss, or that of a distillation


@dataclass
class StepResult:
    """Device tensors: nothing waits for them until somebody logs."""

    lm_loss: Tensor  # token-weighted over the global batch
    grad_norm: Tensor
    kd_loss: Tensor | None = None  # KL(teacher || student), weighted like lm_loss; None without a teacher
    mtp_losses: Tensor | None = None  # [N], of the tokens behind the next one, over unmasked ones of their own; None without modules
    found_inf: Tensor | None = None  # 1.0 where the step was skipped; None without a loss scale


def count_loss_tokens(microbatches: Sequence[Batch], mesh: ParallelMesh) -> Tensor:
    """Unmasked tokens of the whole global batch: the one divisor of the step, known before its first forward; [M] of them for as many
    predictions. (Context-parallel ranks hold the same sequences until `forward_backward` cuts them.)"""
    count = torch.stack([of_predictions(b.loss_mask.double()) for b in microbatches]).sum(0)
    return mesh.sum(count, "dp").clamp_min(1.0)


def forward_backward(
    model: GPT | PipelinedGPT,
    microbatches: Sequence[Batch],
    divisor: Tensor,
    mesh: ParallelMesh,
    seed: int,
    iteration: int,
    distillation: Distillation | None = None,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Gradients of sum(token losses) / divisor; returns this rank's share of that sum. Micro-batches are of whole sequences.

    One rule for every parameter: gradients are summed over microbatches and ranks, and divided once, here. `divisor` is an
    argument because another front door divides by something else. Token randomness is a function of (seed, iteration, sample).
    Predictions of M tokens - labels and masks [B, M, S], divisor [M] - have a share each, and gradients of their `weighted_sum`.
    With `distillation` the gradients are of its objective. With `loss_scale` they, those of the auxiliary losses among them, are
    that many times as large.
    """
    objective = language_model_loss
    if distillation is not None:
        distillation.begin_step(divisor.device)
        objective = distillation.objective
    for moe in moe_layers(model):
        weight = auxiliary_weight(moe.config, microbatches, mesh, iteration)
        moe.begin_step(weight if loss_scale is None else weight * loss_scale.double())
    keys = keys_of(microbatches, seed, iteration)
    if isinstance(model, PipelinedGPT):
        parts, keys = zip(*(part_of(b, k, mesh) for b, k in zip(microbatches, keys)))
        scale = 1.0 if loss_scale is None else loss_scale
        share = partial(share_of_step, divisor=divisor / scale)
        return model.forward_backward(parts, keys, share, partial(weighted_sum, model.config)) / scale
    return one_by_one(model, microbatches, keys, divisor, mesh, objective, loss_scale)


def auxiliary_weight(moe: MoEConfig, microbatches: Sequence[Batch], mesh: ParallelMesh, iteration: int) -> float:
    """Of the auxiliary losses: a share of the step's tokens, times their warm-up."""
    tokens_in_step = sum(b.tokens.numel() for b in microbatches) * mesh.size("dp")
    return min((iteration + 1) / (moe.moe_loss_warmup_iters or 1), 1.0) / tokens_in_step


def keys_of(microbatches: Sequence[Batch], seed: int, iteration: int) -> list[Tensor]:
    """int64 [B, S] of each: what all that is random about its tokens follows from."""
    return [token_keys(seed, iteration, b.sample_ids, b.tokens.shape[1]) for b in microbatches]


def one_by_one(
    model: GPT,
    microbatches: Sequence[Batch],
    keys: Sequence[Tensor],
    divisor: Tensor,
    mesh: ParallelMesh,
    objective: Objective,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Forward and backward of one micro-batch after the other. What changes from step to step is in the tensors: a CUDA graph of it may
    be replayed (training/graphed.py)."""
    total = torch.zeros_like(divisor, dtype=torch.float64)
    for i, (batch, keys_BS) in enumerate(zip(microbatches, keys)):
        sync_gradients(model, mesh.zero_stage, i == len(microbatches) - 1)
        loss, lm_loss = objective(model, *part_of(batch, keys_BS, mesh), divisor)
        backward(loss, loss_scale)
        total += lm_loss
    release(model)
    return total


def language_model_loss(model: GPT, batch: Batch, keys_BS: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
    """(what is differentiated, the language-model loss alone), which without a teacher are the same."""
    losses_BS = model(batch.tokens, batch.position_ids, batch.labels, batch.segment_ids, keys_BS)
    shares = share_of_step(losses_BS, batch.loss_mask, divisor)
    return weighted_sum(model.config, shares), shares.detach()


def backward(loss: Tensor, loss_scale: Tensor | None = None, divisor: float = 1, retain_graph: bool = False) -> None:
    """Adds the gradients of loss / divisor, `loss_scale` times as large. `divisor` is what the loss has not been divided by yet: 1 for
    the shares of a pretraining step, ranks x accumulation for the local means of the DeepSpeed-shaped engine."""
    share = loss if divisor == 1 else loss / divisor
    (share if loss_scale is None else share * loss_scale).backward(retain_graph=retain_graph)


def train_step(
    model: GPT | PipelinedGPT,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Batch],
    mesh: ParallelMesh,
    learning_rate: float,
    clip_grad: float,
    seed: int,
    iteration: int,
    distillation: Distillation | None = None,
    weight_decay: float | None = None,
    loss_scale: LossScale | None = None,
    room: Room | None = None,
    graph: StepGraph | None = None,
) -> StepResult:
    """Forward and backward of all microbatches - with `room`, until their rows have some; with `graph`, as one CUDA graph -, clip, update.
    Collective."""
    scale = None if loss_scale is None else loss_scale.scale
    if model.config.mtp_num_layers:
        microbatches = [look_ahead(batch, model.config.mtp_num_layers) for batch in microbatches]
    divisor = count_loss_tokens(microbatches, mesh)
    work = partial(forward_backward, model, microbatches, divisor, mesh, seed, iteration, distillation, scale)
    if graph is not None:
        work = partial(graph, work, model, microbatches, divisor, mesh, seed, iteration)
    lm_loss = work() if room is None else room.until_it_fits(work, optimizer)
    kd_loss = distillation.divergence if distillation is not None else None
    for loss in (lm_loss,) if kd_loss is None else (lm_loss, kd_loss):
        mesh.sum(loss, "dp", "cp", "pp")
    set_rates(optimizer, learning_rate, weight_decay)
    norm, found_inf = update(optimizer, list(model.parameters()), counted_parameters(model), mesh.stage_ranks, clip_grad, loss_scale)
    move_expert_biases(model, mesh, found_inf)
    mtp_losses = None
    if model.config.mtp_num_layers:
        lm_loss, mtp_losses = lm_loss[0], lm_loss[1:]
    return StepResult(lm_loss, norm, kd_loss, mtp_losses, found_inf)


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    counted: Iterable[nn.Parameter],
    stage_ranks: int,
    clip_grad: float,
    loss_scale: LossScale | None,
) -> tuple[Tensor, Tensor | None]:
    """What follows the backward, wherever its gradients came from: norm, clip, update or skip. Returns the norm that the gradients of
    `counted` had without the scale, and 1.0 where the step was skipped (None without a loss scale). Collective; the host waits for nothing."""
    scale = None if loss_scale is None else loss_scale.scale
    norm, found_inf = gradient_norm(counted, stage_ranks), None
    if loss_scale is not None:  # the norm is one number of the whole world, and so is what follows from it
        norm, found_inf = loss_scale.unscaled(norm)
    if isinstance(optimizer, HalfAdamW):
        optimizer.gradient_factor = gradient_factor(norm, clip_grad, scale)
    elif clip_grad > 0 or scale is not None:
        clip_gradients(parameters, norm, clip_grad, scale)
    update_weights(optimizer, found_inf)
    optimizer.zero_grad(set_to_none=True)
    if loss_scale is not None:
        loss_scale.update(found_inf)
    return norm, found_inf


def counted_parameters(model: GPT | PipelinedGPT) -> Iterator[nn.Parameter]:
    """Parameters of this rank, a tied embedding on one of its two stages only."""
    return model.counted_parameters() if isinstance(model, PipelinedGPT) else model.parameters()


def move_expert_biases(model: GPT | PipelinedGPT, mesh: ParallelMesh, found_inf: Tensor | None = None) -> None:
    """One reduction for all layers here that balance by a bias: after the step, by what its tokens chose. None moves in a skipped step."""
    layers = [moe for moe in moe_layers(model) if moe.gate.expert_bias is not None]
    if not layers:
        return
    counts = torch.cat([moe.stats.counts_E for moe in layers])
    dist.all_reduce(counts, group=mesh.stage_group)
    for moe, counts_E in zip(layers, counts.split([moe.num_experts for moe in layers])):
        rate = moe.config.moe_router_bias_update_rate
        moe.gate.move_bias(counts_E, rate if found_inf is None else rate * (1 - found_inf))
