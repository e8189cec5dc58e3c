"""x W^T + b where the weight is whole: float32 on a CPU by the library that is faster there, all else by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.kernels import matmul_cpu
from megatron_moe.kernels.matmul_cpu import matmul

HAS_CHOICE = matmul_cpu.mkl_stays_behind()  # a constant: torch.compile cannot look into the function


class Linear(nn.Linear):
    """`nn.Linear`, with `linear` below as its product: the same parameters, the same initial values."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k], bias [n] -> [..., n]. Sharded weights (DTensor) and autocast take torch's operator."""
    is_plain = all(type(t) in (Tensor, nn.Parameter) for t in (x, weight))
    if (
        is_plain
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and HAS_CHOICE
        and x.numel() * weight.shape[0] >= matmul_cpu.ENOUGH
        and not torch.is_autocast_enabled("cpu")
    ):
        return _forward(x, weight, bias)
    return F.linear(x, weight, bias)


# `matmul` decides in the end. One operator each way, since torch.compile would take oneDNN's for the one of its own that it made for weights that do not change.
@torch.library.custom_op("megatron_moe::linear_on_cpu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return matmul(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("megatron_moe::linear_on_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, x: Tensor | None, weight: Tensor, for_x: bool, for_bias: bool) -> list[Tensor]:
    """Of x and bias where they are asked for, and of the weight where there is an x."""
    found, dy_TN = [], dy.reshape(-1, dy.shape[-1]).contiguous()
    if for_x:
        found.append(matmul(dy_TN, weight).view(*dy.shape[:-1], -1))
    if x is not None:
        found.append(matmul(dy_TN.t(), x.reshape(-1, x.shape[-1])))
    if for_bias:
        found.append(dy_TN.sum(0))
    return found


@_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_backward.register_fake
def _(dy, x, weight, for_x, for_bias):
    shapes = (((*dy.shape[:-1], weight.shape[1]), for_x), (weight.shape, x is not None), (weight.shape[:1], for_bias))
    return [dy.new_empty(shape) for shape, is_wanted in shapes if is_wanted]


def _remember(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _derive(ctx, dy: Tensor):
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    found = iter(_backward(dy, x, weight, wanted[0], wanted[2]))
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)


_forward.register_autograd(_derive, setup_context=_remember)
