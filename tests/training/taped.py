"""In place of a CUDA graph, where there is no GPU: what a step does is written down, and done again.

    replay, result = taped(work, tapes)
    replay()

As by a graph, no line of Python that `work` has runs again, and every operation reads and writes the memory that it had. Nothing but that
can change what a replay computes: a number that Python put into an operation stays. As in a graph, nothing is computed
before the first replay: until then what `work` has left behind is not a number.

Of the tape: operators of torch, collectives among them, and launches of Triton kernels (interpreted). `tape.outside`: the memory that is
read and was there before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_OF_NO_CONTENT = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}  # by address of a storage, which the tape keeps
        self.outside: dict[int, Tensor] = {}
        self.constants: dict[int, Tensor] = {}
        self.is_on = False

    def __enter__(self) -> Tape:
        self.is_on = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if FakeTensor in types:
            return op(*args, **kwargs)  # DTensor asks for shapes
        # DTensors, and results that are waited for later: what they do with tensors of their own comes here
        if any(t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented
        if op._schema.name == "_c10d_functional::_wrap_tensor_autograd":
            return op(*args, **kwargs)  # around what is there
        out = op(*args, **kwargs)
        if op._schema.name == "c10d::_reduce_scatter_base_":
            # gloo copies results when they are waited for: here, and not on the tape, which another collective is then waited for in place of
            wait(out)
            out = (out[0], torch.ops.c10d.allreduce_([torch.zeros(1)], args[2], args[3], None)[1])
        found, name = tensors_in(out), op._schema.name.partition("::")[2]
        if name == "lift_fresh":  # a constant, like any number in an operation
            self.constants.update({t.untyped_storage().data_ptr(): t for t in found})
            return out
        for tensors, place, other in ((tensors_in((args, kwargs)), self.outside, self.made), (found, self.made, self.outside)):
            for t in tensors:
                where = t.untyped_storage().data_ptr()
                if where and where not in other and where not in self.constants:
                    place[where] = t
        returns = op._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and name not in _OF_NO_CONTENT:
            self.steps.append(lambda: again(op, args, kwargs, found))
        return out

    def launch(self, kernel: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        self.steps.append(lambda: kernel(*args, **kwargs))

    def replay(self) -> None:
        with torch.no_grad():
            for step in self.steps:
                step()


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def again(op, args, kwargs, found: list[Tensor]) -> None:
    out = op(*args, **kwargs)
    if op.namespace == "c10d":
        wait(out)
    for mine, new in zip(found, tensors_in(out), strict=True):
        if op.namespace == "_c10d_functional":
            new = torch.ops._c10d_functional.wait_tensor(new)
        if mine is not new:
            mine.copy_(new)


def wait(out: Any) -> None:
    for leaf in tree_leaves(out):
        if not isinstance(leaf, Tensor):
            leaf.wait()


def memory_stays() -> Any:
    """What FSDP gives back stays a graph's, whoever gets memory for it later. Here both would share it, so it is not given back."""
    return mock.patch.object(_fsdp_param, "free_storage")


def taped(work: Callable[[], Tensor], tapes: list[Tape]) -> tuple[Callable[[], None], Tensor]:
    """With `tapes` bound, a `Capture` of training/graphed.py."""
    tapes.append(tape := Tape())
    with tape:
        result = work()
    for t in tape.made.values():
        t.untyped_storage().copy_(torch.full((t.untyped_storage().nbytes(),), 255, dtype=torch.uint8).untyped_storage())  # NaN, and -1
    return tape.replay, result


class TapedKernels:
    """In the place of the module of an exchange's kernels."""

    def __init__(self, kernels: Any, tapes: list[Tape]):
        self._kernels, self._tapes = kernels, tapes

    def __getattr__(self, name: str) -> TapedKernels._Kernel:
        return self._Kernel(getattr(self._kernels, name), self._tapes)

    class _Kernel:
        def __init__(self, kernel: Any, tapes: list[Tape]):
            self.kernel, self.tapes = kernel, tapes

        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                if self.tapes and self.tapes[-1].is_on:
                    self.tapes[-1].launch(self.kernel[grid], args, kwargs)
                with _disable_current_modes() if self.tapes and self.tapes[-1].is_on else nullcontext():
                    self.kernel[grid](*args, **kwargs)

            return launch
