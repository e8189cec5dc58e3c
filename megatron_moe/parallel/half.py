"""16-bit compute of one process on a CPU: every weight is cast once per step, into memory that stays.

FSDP2 has nothing to gather or to reduce there, and would still copy: into its all-gather and out of it, into a flat gradient and out of
it, in memory that it gets and gives back in every step. What it keeps is kept here: parameters stay float32 and are what optimizer
and checkpoints see; gradients are rounded to 16 bits where they are made, and added up in float32; the router stays float32.

    forward: weights are cast, unless they are since the last release; modules find the casts where their weights were
    release: after the last backward of a step, and after an evaluation: modules have their weights again
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_moe.moe.gate import Gate
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.module_experts import ModuleExperts
from megatron_moe.mpu.mesh import ParallelMesh


class HalfWeights:
    """Of one model. A module's own attributes come before its parameters: in them the casts stand."""

    def __init__(self, model: nn.Module, half: torch.dtype):
        self.model, self.half, self.is_cast = model, half, False
        self.memory: dict[str, Tensor] = {}  # parameter name -> its cast

    def __call__(self, *_: object) -> None:
        """Before every forward of the model."""
        for module, name, path, p in self._places():
            cast = self._cast(path, p)
            module.__dict__[name] = _Cast.apply(p, cast) if torch.is_grad_enabled() and p.requires_grad else cast
        self.is_cast = True

    def release(self) -> None:
        for module, name, _, _ in self._places():
            module.__dict__.pop(name, None)
        self.is_cast = False

    def _places(self) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
        """(module, name there, name in the model, parameter)"""
        for prefix, module in self.model.named_modules():
            if not isinstance(module, Gate):
                for name, p in module._parameters.items():
                    if p is not None:
                        yield module, name, f"{prefix}.{name}", p

    def _cast(self, path: str, p: nn.Parameter) -> Tensor:
        if path not in self.memory:
            self.memory[path] = torch.empty_like(p, dtype=self.half, requires_grad=False)
        elif self.is_cast:
            return self.memory[path]
        return self.memory[path].copy_(p.detach())


class _Cast(torch.autograd.Function):
    """Hands on a cast that exists; its gradient is one of the parameter."""

    @staticmethod
    def forward(ctx, p: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = p.dtype
        return cast.detach()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.dtype), None


def can_cast(model: nn.Module, mesh: ParallelMesh) -> bool:
    """Whether this is one process on a CPU, with float32 weights that modules read as attributes (experts of any kind read theirs by name)."""
    is_alone = mesh.stage_ranks == 1 and mesh.size("pp") == 1 and mesh.dense.device_type == "cpu"
    return (
        is_alone
        and all(p.dtype == torch.float32 for p in model.parameters())
        and not any(isinstance(m, ModuleExperts) for m in model.modules())
    )


def apply_half(model: nn.Module, half: torch.dtype) -> None:
    """From now on the model's forward computes in `half`."""
    model.half_weights = HalfWeights(model, half)
    model.register_forward_pre_hook(model.half_weights)
    for moe in moe_layers(model):  # gate weights come in float32, and FSDP would cast them too
        moe.experts.register_forward_pre_hook(lambda _, args: tuple(_in(half, x) for x in args))


def _in(half: torch.dtype, x: object) -> object:
    return x.to(half) if isinstance(x, Tensor) and x.is_floating_point() else x


def has_half_weights(model: nn.Module) -> bool:
    return isinstance(getattr(model, "half_weights", None), HalfWeights)


def release(model: nn.Module) -> None:
    """Where there are none, nothing happens: FSDP does so by itself."""
    if has_half_weights(model):
        model.half_weights.release()
