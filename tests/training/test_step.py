"""One optimizer step at the edges; that it is right otherwise is shown in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from distributed import parity
from distributed_pool import run_distributed

from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import backward, train_step

pytestmark = pytest.mark.distributed


def matrix_after_a_step(flags: str, clip_grad: float, mask: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One matrix before and after, and the loss; the loss mask is multiplied by `mask`."""
    c = parity.config("modern", flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    before = parity.whole(model.head.weight)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    batches = [b._replace(loss_mask=b.loss_mask * mask) for b in batches]
    done = train_step(model, build_optimizer(model, c.optimizer), batches, mesh, 1e-2, clip_grad, parity.SEED, 0)
    return before, parity.whole(model.head.weight), float(done.lm_loss)


def test_clipping_at_zero_is_no_clipping():
    before, after, _ = run_distributed(matrix_after_a_step, 2, "--optimizer sgd", 0.0, 1.0)[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, run_distributed(matrix_after_a_step, 2, "--optimizer sgd", 1e9, 1.0)[0][1])
    assert not torch.equal(after, run_distributed(matrix_after_a_step, 2, "--optimizer sgd", 0.1, 1.0)[0][1])


def test_step_without_a_token_that_counts_has_no_loss_and_harms_nothing():
    before, after, loss = run_distributed(matrix_after_a_step, 2, "--optimizer sgd --weight-decay 0", 1.0, 0.0)[0]
    assert loss == 0
    assert torch.equal(after, before)


def test_the_divisor_of_the_backward_is_an_argument():
    """Pretraining divides its losses by tokens before; the DeepSpeed-shaped engine by ranks x accumulation here."""
    x = torch.tensor(3.0, requires_grad=True)
    gradients = []
    for scale, divisor in ((None, 1), (None, 4), (torch.tensor(8.0), 4)):
        backward(x.square(), scale, divisor)
        gradients.append(float(x.grad))
        x.grad = None
    assert gradients == [6.0, 1.5, 12.0]
