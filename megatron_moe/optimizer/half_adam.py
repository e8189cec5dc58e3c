"""AdamW of weights that are stored in float16 (--fp16-master-weights-and-grads): 12 bytes a parameter in place of 16.

Moments are float32: a square of a gradient is nothing in float16. Each parameter in turn is widened, stepped by torch's fused
kernel, and rounded back. What is less than half a step of float16, a 2048th of a weight at least, is lost by that: it is what the
flag means. Gradients stay what the reduction left, the loss scale on them, and are divided by it as they are widened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from megatron_moe.config.training import OptimizerConfig


class HalfAdamW(Optimizer):
    """AdamW in float32, whatever its parameters are stored in."""

    found_inf: Tensor | None = None  # where it is 1 nothing moves
    gradient_factor: Tensor | None = None  # for the next step

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig):
        super().__init__(groups, {"lr": config.lr})
        self._step_supports_amp_scaling = True  # torch's name for reading found_inf
        self.constants = {"beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.adam_eps}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group["lr"], group["weight_decay"])
        self.gradient_factor = None

    def _move(self, p: nn.Parameter, rate: float, decay: float) -> None:
        state = self.state[p]
        if not state:
            state.update(zero_state(p))
        weight, grad = _local(p).float(), _local(p.grad).float()
        if self.gradient_factor is not None:
            grad = grad * self.gradient_factor
        adamw(
            [weight], [grad], [_local(state["exp_avg"])], [_local(state["exp_avg_sq"])], [], [state["step"]], fused=True, foreach=False,
            found_inf=self.found_inf, amsgrad=False, maximize=False, lr=rate, weight_decay=decay, **self.constants,
        )  # fmt: skip
        _local(p).copy_(weight)


def zero_state(p: nn.Parameter) -> dict[str, Tensor]:
    """Of a parameter before its first step."""
    moments = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=p.device)} | moments


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
