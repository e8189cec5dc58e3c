"""The loss scale of fp16 training. It lives on the device: neither an overflow nor a change of the scale makes the host wait.

    loss x scale -> backward -> gradients x scale, summed over ranks -> their norm, one number of the world
                                                                        |-- not finite: nothing moves, `update` lowers the scale
                                                                        |-- else gradients / scale, clip, step

That one number is all that ranks must agree on: an inf or NaN in any shard of any gradient of any rank makes it inf or NaN.

Worked example, scale 16, window 3, hysteresis 2; x is an overflow:
    step            .   x   x   .   .   .   x   .
    scale after    16  16   8   8   8  16  16  16      the first x uses up the patience, the third good step in a row renews it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.optimizer.clip import beside

MOST = 2.0**127  # what a float32 holds


class LossScale:
    """Megatron's rule: an overflow halves the scale once there have been `hysteresis` of them since it was last doubled; a window of
    steps without any doubles it. A fixed scale (--loss-scale) skips steps too, and stays."""

    def __init__(self, config: LossScaleConfig, device: torch.device | str = "cpu"):
        self.config, self.is_fixed = config, config.loss_scale is not None
        self.scale = torch.full((), config.loss_scale or config.initial_loss_scale, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)  # since the last overflow, or doubling
        self.patience = torch.full((), config.hysteresis, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps, since the run began
        self.at_minimum = torch.zeros((), dtype=torch.int64, device=device)  # overflows after which the scale could not fall

    def unscaled(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of the scaled gradients -> (the norm that the gradients have, 1.0 if it is not finite else 0.0)."""
        norm = norm / beside(self.scale, norm)
        return norm, (~norm.isfinite()).float()

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """After every step, skipped or not."""
        overflow = beside(found_inf, self.scale) > 0
        self.skipped += overflow
        if self.is_fixed:
            return
        good = torch.where(overflow, 0, self.good_steps + 1)
        grows = good == self.config.loss_scale_window
        self.patience = torch.where(grows, self.config.hysteresis, (self.patience - overflow.long()).clamp_min(0))
        falls = overflow & (self.patience == 0)
        self.at_minimum += falls & (self.scale <= self.config.min_loss_scale)
        lower = (self.scale / 2).clamp_min(self.config.min_loss_scale)
        self.scale = torch.where(falls, lower, torch.where(grows, (self.scale * 2).clamp_max(MOST), self.scale))
        self.good_steps = torch.where(grows, 0, good)

    # ------------------------------------------------------------ where the host waits

    def state(self) -> dict[str, Any]:
        """For a checkpoint: numbers that JSON holds exactly."""
        return {name: getattr(self, name).item() for name in _STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            getattr(self, name).fill_(state[name])
        if self.is_fixed:
            self.scale.fill_(self.config.loss_scale)

    def numbers(self) -> tuple[float, int, bool]:
        """(scale, steps skipped so far, whether an overflow has found the scale at its minimum)."""
        scale, skipped, at_minimum = torch.stack([self.scale.double(), self.skipped.double(), self.at_minimum.double()]).tolist()
        return scale, int(skipped), at_minimum > 0


_STATE = ("scale", "good_steps", "patience", "skipped")


def update_weights(optimizer: torch.optim.Optimizer, found_inf: Tensor | None) -> None:
    """`optimizer.step()`, which leaves weights, moments and step counters as they are where `found_inf` is 1.

    torch's fused kernels and our Muon read that on the device; for the others the host does."""
    if found_inf is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = found_inf
        found_inf = None
    if found_inf is None or not found_inf:
        optimizer.step()
