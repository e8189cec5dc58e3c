"""A small network with two MoE layers, for whichever `MoE` it is given: DeepSpeed's or ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, CLASSES = 8, 3


class Small(nn.Module):
    """4 experts, then 8 beside a dense MLP. Nothing is dropped, and nothing is drawn."""

    def __init__(self, moe: Any, ep_size: int = 1):
        super().__init__()
        expert = lambda: nn.Sequential(nn.Linear(HIDDEN, 12), nn.ReLU(), nn.Linear(12, HIDDEN))  # noqa: E731
        self.first = nn.Linear(6, HIDDEN)
        self.one = moe(hidden_size=HIDDEN, expert=expert(), num_experts=4, ep_size=ep_size, drop_tokens=False, use_rts=False)
        self.norm = nn.LayerNorm(HIDDEN)
        self.two = moe(
            hidden_size=HIDDEN, expert=expert(), num_experts=8, ep_size=ep_size, drop_tokens=False, use_rts=False, use_residual=True
        )
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(x))
        y, l_one, _ = self.one(x)
        x = self.norm(x + y)
        y, l_two, _ = self.two(x)
        return self.last(x + y), l_one + l_two


def start_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name alone, so that every expert is another one, whoever's layer it is in; gates wide, so that no two experts are close."""
    weights = {}
    for name, tensor in model.state_dict().items():
        draw = torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        weights[name] = torch.randn(tensor.shape, generator=draw) * (2 if "wg" in name else 0.4)
    return weights


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(16, 6, generator=draw), torch.randint(CLASSES, (16,), generator=draw)


def train(engine: Any, first: int, last: int, rank: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Steps `first` to `last` - 1; the losses of this rank."""
    losses = []
    for step in range(first, last):
        x, y = batch(step, rank)
        logits, l_aux = engine(x.to(dtype))
        loss = F.cross_entropy(logits.float(), y) + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def config(stage: int = 0, half: str | None = None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": half == "bf16"},
        "fp16": {"enabled": half == "fp16", "initial_scale_power": 8},
    }
