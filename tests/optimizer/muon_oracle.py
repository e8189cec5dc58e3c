"""Muon by singular values, on whole parameters in one process: the quintic acts on each singular value alone."""

import torch
from torch import Tensor, nn

from megatron_moe.config.training import OptimizerConfig


def muon_direction(update: Tensor, steps: int) -> Tensor:
    """The matrix with the singular vectors of `update`, and its singular values sent through the quintic `steps` times."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    s = s / s.square().sum().sqrt().clamp_min(1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


class PlainMuon:
    """Groups of one parameter each; those with `matrices` are stepped here, expert by expert, the others by torch's AdamW."""

    def __init__(self, groups: list[dict], o: OptimizerConfig):
        self.param_groups, self.o = groups, o
        self.momenta: dict[nn.Parameter, Tensor] = {}
        adam = [g for g in groups if not g["matrices"]]
        self.adam = torch.optim.AdamW(adam, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        m = self.o.muon_momentum
        for group in (g for g in self.param_groups if g["matrices"]):
            (p,) = group["params"]
            momentum = self.momenta[p] = m * self.momenta.get(p, torch.zeros_like(p)) + (1 - m) * p.grad
            update = (1 - m) * p.grad + m * momentum if self.o.muon_use_nesterov else momentum
            for weight, of_one in zip(p, update) if p.ndim == 3 else [(p, update)]:
                rate = self.o.muon_extra_scale_factor * max(weight.shape) ** 0.5 * group["lr"]
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * muon_direction(of_one, self.o.muon_num_ns_steps))
        self.adam.step()

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
