"""Whether a Triton kernel can be launched. Triton itself is imported by those modules alone that hold kernels, when one is launched."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def takes_triton(x: Tensor) -> bool:
    """Whether an elementwise kernel may take this tensor. Under torch.compile none does: inductor writes its own of the reference."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and not torch.compiler.is_compiling() and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
