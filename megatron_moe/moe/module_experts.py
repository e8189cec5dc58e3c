"""Experts of any kind: E copies of an nn.Module, their parameters stacked to [E, ...].

    layer = MoELayer(1, 8, 512, 0, moe, expert_factory=lambda width: nn.Sequential(nn.Linear(width, 99), nn.Tanh(), nn.Linear(99, width)))

The factory is called with the width of the rows and returns a module that maps rows [R, D] to rows [R, D] one by one. One module
object holds the stacks, under the names that its parameters have (`experts.stack.0.weight` is [E, 99, 512]), so to expert
parallelism, ZeRO, gradient norm and checkpoints they are stacks like those of moe/experts.py.

One wait for the device in each forward: a module has to be given its rows, and where they end is known there.
"""
# D width of the rows, E experts (those that live here, under expert parallelism), R routed rows, r rows of one expert

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe.moe.experts import StackedExperts
from megatron_moe.utils.dtensor import local_weight
from megatron_moe.utils.random import named_seed

ExpertFactory = Callable[[int], nn.Module]


class ModuleExperts(StackedExperts):
    """y_r = w_r * expert_e(x_r) for rows grouped by expert: the interface of Experts.

    An expert without rows is called with none of them: its gradient is zero, and there, as every rank must have it.
    """

    def __init__(self, num_experts: int, width: int, factory: ExpertFactory, may_draw: bool = False):
        super().__init__()
        self.width, self.factory = width, factory
        experts = [factory(width) for _ in range(num_experts)]
        check_expert(experts[0], width, may_draw)
        stacks, _ = stack_module_state(experts)
        self.stack = copy.deepcopy(experts[0])
        for name, p in list(self.stack.named_parameters()):
            set_parameter(self.stack, name, nn.Parameter(stacks[name].detach(), p.requires_grad))

    def dims(self, name: str) -> str:
        """As STACKS says it: experts first; what the others are is the module's business."""
        return "E" + "x" * (self.get_parameter(name).ndim - 1)

    def cut_into(self, slices: int) -> None:
        if slices > 1:
            raise ValueError(
                f"experts of {type(self.stack).__name__} cannot be cut over {slices} ranks: what of a module is its inner width is not known; "
                f"use --expert-tensor-parallel-size 1, and more expert parallelism in its place"
            )

    def forward(self, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, has_spare_rows: bool = False) -> Tensor:
        """offsets_E: int32, end of each expert's rows; there may be rows behind the last, of weight 0. Returns [R, D]."""
        ends = offsets_E.tolist()
        # unbind: one gradient of the whole stack, instead of one for each index into it
        stacks = {name: local_weight(p).unbind() for name, p in self.stack.named_parameters()}
        results = []
        for e, (start, end) in enumerate(zip([0, *ends], ends)):
            x_rD = x_RD[start:end]
            y_rD = output_of(functional_call(self.stack, {name: stack[e] for name, stack in stacks.items()}, (x_rD,)))
            if y_rD.shape != x_rD.shape:
                raise ValueError(_other_shape(self.stack, x_rD, y_rD))
            results.append(y_rD)
        y_RD = torch.cat([*results, x_RD.new_zeros(x_RD.shape[0] - ends[-1], self.width)])
        return (y_RD * row_weights_R[:, None]).to(x_RD.dtype)

    @torch.no_grad()
    def draw(self, name: str, seed: int, expert: int | None) -> dict[str, Tensor]:
        """Initial weights of one expert by the factory itself, from a seed of (seed, name, expert); None: the same for all."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(named_seed(seed, name if expert is None else f"{name}/{expert}"))
            return {f"stack.{n}": p for n, p in self.factory(self.width).named_parameters()}


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Under a dotted name."""
    owner, _, own_name = name.rpartition(".")
    module.get_submodule(owner).register_parameter(own_name, parameter)


def output_of(result: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """Megatron's modules return (output, bias), the bias None when it is in the output already."""
    if not isinstance(result, tuple):
        return result
    if len(result) != 2 or result[1] is not None:
        raise ValueError(
            f"an expert module may return its output, or (output, None), not a tuple of {len(result)} with more in it: it would be lost; "
            f"add the bias inside the module (Megatron: skip_bias_add=False)"
        )
    return result[0]


@torch.no_grad()
def check_expert(module: nn.Module, width: int, may_draw: bool = False) -> None:
    """Raises ValueError when a module cannot be an expert, with trials of two rows and of none on whatever device it is. `may_draw`: it may
    have dropout, or other noise, from torch's generator; for callers who do without the same numbers under every layout."""
    name = type(module).__name__
    if mixing := [n for n, _ in module.named_buffers()] + [n for n, m in module.named_modules() if isinstance(m, _BatchNorm)]:
        raise ValueError(
            f"the expert module {name} has buffers or batch norms ({', '.join(mixing)}): statistics of the rows that an expert gets here "
            f"would differ from rank to rank; use parameters, and a norm of each row by itself such as LayerNorm"
        )
    names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    if tied := sorted(set(names) - {n for n, _ in module.named_parameters()}):
        raise ValueError(f"the expert module {name} has parameters under two names ({', '.join(tied)}); give each its own")
    device = next((p.device for p in module.parameters()), torch.get_default_device())
    dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
    for rows in (2, 0):
        x_rD = torch.zeros(rows, width, device=device, dtype=dtype)
        try:
            with _undrawn(device), _RandomDraws() as draws:
                result = module(x_rD)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"the expert module {name} cannot take {rows or 'no'} rows of width {width}: {error}") from error
        if draws.seen and not may_draw:
            raise ValueError(
                f"the expert module {name} draws random numbers ({', '.join(draws.seen)}): recomputation would draw other ones, and so "
                f"would another layout; set the p of its dropouts to 0 and use --hidden-dropout, which drops the layer's output"
            )
        y_rD = output_of(result)
        if y_rD.shape != x_rD.shape:
            raise ValueError(_other_shape(module, x_rD, y_rD))


def _undrawn(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside is not missing from the generators behind it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _RandomDraws(TorchDispatchMode):
    """Notes the operators that draw from torch's generators."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in op.tags:
            self.seen.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def _other_shape(module: nn.Module, x: Tensor, y: Tensor) -> str:
    return (
        f"the expert module {type(module).__name__} must return rows of the shape it is given: {list(x.shape)} became {list(y.shape)}; "
        f"its output is added to that of other experts and to the residual stream"
    )
