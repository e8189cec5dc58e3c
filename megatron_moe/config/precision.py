"""The loss scale of fp16 training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class LossScaleConfig:
    """Loss scale.

    Of --fp16 alone: losses are multiplied by the scale before the backward, so that small gradients do not vanish in float16, and
    gradients are divided by it before they are clipped. A step whose gradients are not finite is skipped on all ranks.
    """

    loss_scale: float | None = flag(None, "a scale that stays, in place of one that follows the overflows", above=0)
    initial_loss_scale: float = flag(2.0**32, "the scale of the first step", above=0)
    min_loss_scale: float = flag(1.0, "an overflow at this scale ends the run", above=0)
    loss_scale_window: int = flag(1000, "steps in a row without an overflow after which the scale doubles", minimum=1)
    hysteresis: int = flag(2, "overflows between two doublings before each further one halves the scale", minimum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.loss_scale is None and self.initial_loss_scale < self.min_loss_scale:
            yield f"--initial-loss-scale ({self.initial_loss_scale:g}) must not be below --min-loss-scale ({self.min_loss_scale:g})"
