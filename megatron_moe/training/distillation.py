"""Learning from a teacher: loss = alpha x LM + beta x T^2 x KL(teacher || student), token by token under the loss mask.

Mixture-of-Students (DeepSpeed-MoE, arXiv 2201.05596, section 4.2), and knowledge distillation in general (arXiv 1503.02531, whose
T^2 keeps the gradient's size when the temperature changes). Both terms share the step's one divisor, so the loss does not depend on
micro-batches or ranks. Megatron-DeepSpeed counts masked tokens too, divides by the configured length also when a curriculum shortens
it, takes the softmax over each tensor-parallel rank's columns alone, and does not read alpha.
"""
# B batch, S sequence, V padded vocabulary (the columns here)

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.checkpoint.files import run_directory
from megatron_moe.checkpoint.find import Found, find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.state import MTP, model_state
from megatron_moe.config.distillation import DistillationConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.model.loss import share_of_step, weighted_sum
from megatron_moe.moe.layer import moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.apply import build_sharded_model


class Distillation:
    """The objective of a student. What a step's teacher has said about it is in `divergence`, for whoever logs."""

    def __init__(self, config: DistillationConfig, teacher: GPT):
        self.alpha, self.beta, self.temperature = config.kd_alpha_ce, config.kd_beta_ce, config.kd_temp
        self.teacher = teacher.eval().requires_grad_(False)  # evaluation: no dropout, no noise, evaluation capacity
        for block in teacher.layers.values():
            block.has_equal_batches = True  # it sees training batches, so no rank has to ask the others for their number of tokens
        self.divergence: Tensor | None = None

    def begin_step(self, device: torch.device) -> None:
        self.divergence = torch.zeros((), dtype=torch.float64, device=device)

    def objective(self, student: GPT, batch: Batch, keys_BS: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        """(what is differentiated, the language-model loss alone): shares of this micro-batch, divided by the step's `divisor`."""
        losses, logits_BSV = answers(student, batch, keys_BS)
        kl_BS = student.token_divergences(logits_BSV, self.teach(batch), student.vocab_size, self.temperature)
        lm = share_of_step(losses, batch.loss_mask, divisor)
        is_ahead = batch.labels.ndim == 3  # the teacher says the next token alone
        kl = share_of_step(kl_BS, *((batch.loss_mask[:, 0], divisor[0]) if is_ahead else (batch.loss_mask, divisor)))
        self.divergence += kl.detach()
        return self.alpha * weighted_sum(student.config, lm) + self.beta * self.temperature**2 * kl, lm.detach()

    @torch.no_grad()
    def teach(self, batch: Batch) -> Tensor:
        """The teacher's logits. Its statistics are of no interest to anyone."""
        logits_BSV = self.teacher(batch.tokens, batch.position_ids, None, batch.segment_ids)
        for moe in moe_layers(self.teacher):
            moe.stats.reset()
        return logits_BSV


def answers(student: GPT, batch: Batch, keys_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of whatever the labels ask for, and the logits of the next token."""
    if batch.labels.ndim == 2:
        logits_BSV = student(batch.tokens, batch.position_ids, None, batch.segment_ids, keys_BS)
        return student.token_losses(logits_BSV, batch.labels, student.vocab_size), logits_BSV
    further_BNS, logits_BSV = student(batch.tokens, batch.position_ids, batch.labels, batch.segment_ids, keys_BS, with_logits=True)
    next_BS = student.token_losses(logits_BSV, batch.labels[:, 0], student.vocab_size)
    return torch.cat([next_BS[:, None], further_BNS], dim=1), logits_BSV


def build_teacher(config: RunConfig, vocab_size: int, mesh: ParallelMesh, device: torch.device) -> GPT:
    """The teacher of a run, laid out like the student and without content."""
    teacher = build_sharded_model(config.teacher(), vocab_size, mesh)
    return teacher.to_empty(device=device)


def load_teacher(teacher: GPT, config: DistillationConfig, verify: str, process_group=None) -> Found:
    """Fill it from the newest checkpoint of --load-teacher, whatever layout wrote that. Collective."""
    found = find_checkpoint(*run_directory(config.load_teacher, None), verify, process_group)
    load_tensors(found.path, model_state(teacher), ["model."], process_group, optional=[MTP])
    return found
