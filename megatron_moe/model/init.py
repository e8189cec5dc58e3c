"""Initial weights: a function of (seed, parameter name), so the same under every layout.

Every parameter is drawn from a generator of its own, seeded by its name; each expert of a stack from one seeded by the name
and the global number of the expert. A rank draws what it holds and nothing else decides the numbers.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_moe.moe.experts import STACKS
from megatron_moe.moe.gate import Gate
from megatron_moe.moe.module_experts import ModuleExperts
from megatron_moe.utils.dtensor import local_part
from megatron_moe.utils.random import named_generator

_EXPERT_STACK = re.compile(rf"\bexperts\.({'|'.join(STACKS)})$")
_RESIDUAL_OUTPUT = re.compile(r"(out_proj|fc2|latent_up)\.weight$|\bexperts\.w2$")


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, std: float, num_layers: int, identical_experts: bool = False) -> None:
    """Fill every parameter and buffer in place, sharded or not, on whatever device.

    Norms 1, biases 0, matrices N(0, std); those that write to the residual stream std / sqrt(2 num_layers) (GPT-2). The
    numbers are drawn on the CPU in float32, one whole matrix (or expert) at a time: memory stays near the largest of them.
    """
    for buffer in model.buffers():  # what moves by a rule of its own starts at zero
        buffer.zero_()
    drawn_by_factories = _draw_module_experts(model, seed, identical_experts)
    for name, p in model.named_parameters():
        local, slices = local_part(p)
        if local.numel() == 0 or name in drawn_by_factories:
            continue
        scale = initial_std(name, std, num_layers)
        if _EXPERT_STACK.search(name):
            for i, expert in enumerate(range(slices[0].start, slices[0].stop)):
                key = name if identical_experts else f"{name}/{expert}"
                local[i].copy_(draw(name, key, tuple(p.shape[1:]), seed, scale)[slices[1:]])
        else:
            local.copy_(draw(name, name, tuple(p.shape), seed, scale)[slices])


def _draw_module_experts(model: nn.Module, seed: int, identical: bool) -> set[str]:
    """Experts of a factory get the initial weights that it gives them, one expert at a time; returns the names of these parameters."""
    names: set[str] = set()
    for prefix, experts in model.named_modules():
        if not isinstance(experts, ModuleExperts):
            continue
        here = {name: local_part(p) for name, p in experts.named_parameters()}
        names |= {f"{prefix}.{name}" for name in here}
        for expert in sorted({e for _, slices in here.values() for e in range(slices[0].start, slices[0].stop)}):
            drawn = experts.draw(prefix, seed, None if identical else expert)
            for name, (local, slices) in here.items():
                if slices[0].start <= expert < slices[0].stop:
                    local[expert - slices[0].start].copy_(drawn[name][slices[1:]])
    return names


def initial_std(name: str, std: float, num_layers: int) -> float:
    """Of the numbers that a matrix starts with."""
    return std * (2 * num_layers) ** -0.5 if _RESIDUAL_OUTPUT.search(name) else std


def draw(name: str, key: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Initial values of a parameter (or one expert of a stack), float32; its generator is seeded by `key`."""
    if re.search(r"norm\.weight$", name):
        return torch.ones(shape)
    if name.endswith("bias") or re.search(r"\.b\w+$", name):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(seed, key))


def store_in_half(model: nn.Module) -> None:
    """Parameters become float16, in place; those of the routers stay, or close scores would tie."""
    model.half()
    for module in model.modules():
        if isinstance(module, Gate):
            module.float()


def build_on_meta(build, dtype: torch.dtype) -> nn.Module:
    """`build()` without memory: shapes only, to be sharded first and filled where each shard lives."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Undrawn(), torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(before)


class _Undrawn(TorchFunctionMode):
    """Modules do not draw the values that they begin with. On the meta device there are none, and torch would import its compiler to
    work out their shape: more than a second of every start."""

    DRAWS = frozenset({nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
