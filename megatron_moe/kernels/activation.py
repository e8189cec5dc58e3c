"""What lies between the two products of an MLP, dense or expert."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

_OF_ONE = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "squared_relu": lambda h: F.relu(h).square()}


def activate(name: str, h: Tensor, gate: Tensor | None = None) -> Tensor:
    """`gate`: what a gated unit (swiglu) has beside h; the others have none."""
    return F.silu(gate) * h if name == "swiglu" else _OF_ONE[name](h)
