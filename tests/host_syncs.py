"""Counts what makes the host wait for the device, on a CPU, where nothing waits.

    with HostSyncs() as syncs:
        train_step(...)
    assert syncs.seen == []

Some of it are operators (reading a scalar; operators whose output size depends on values), which a dispatch mode sees, also in
the backward and from C++; the rest are methods of Tensor, and what copies a Python number or list to the device. Each entry names the
operation and the nearest line of megatron_moe. Copies that ask not to block are none, and nothing is that an interpreted Triton kernel
does: it is a device.

A kernel for CPU tensors alone (kernels/expert_mlp_cpu.py) may read what it likes, and no device would run it. So here nothing takes it:
inside of HostSyncs the CPU stands for a device, and the same lines run as on one.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_moe
from megatron_moe.kernels import expert_mlp

PACKAGE = Path(megatron_moe.__file__).parent

# Their output's size, or their Python value, comes from the device.
_READING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_dim_consecutive",
    "unique_consecutive", "bincount", "histc",
}  # fmt: skip
_METHODS = ("tolist", "numpy", "cpu", "__array__")
_COPIES = ("tensor", "as_tensor")  # to the device, where one is named: of memory that is not pinned, so torch waits until they are there


class HostSyncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.patches: list = []

    def __enter__(self) -> HostSyncs:
        for name in _METHODS:
            self.patches.append(mock.patch.object(torch.Tensor, name, self._noting(name)))
        for name in _COPIES:
            self.patches.append(mock.patch.object(torch, name, self._copying(name)))
        self.patches.append(mock.patch.object(torch.Tensor, "to", self._to))
        self.patches.append(mock.patch.object(expert_mlp, "is_one_operator", return_value=False))
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, kwargs = op._schema.name.removeprefix("aten::"), kwargs or {}
        if name in _READING or (name == "repeat_interleave" and len(args) == 1 and kwargs.get("output_size") is None):
            self._note(name)
        is_indexed = name in ("index", "index_put", "index_put_")
        by_mask = is_indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask and (name == "index" or args[2].numel() > 1):  # x[mask] = 0 is a masked_fill: nobody counts the mask
            self._note(f"{name} by a mask")
        return op(*args, **kwargs)

    def _noting(self, name: str):
        original = getattr(torch.Tensor, name)

        def method(tensor, *args, **kwargs):
            self._note(name)
            return original(tensor, *args, **kwargs)

        return method

    def _copying(self, name: str):
        original = getattr(torch, name)

        def copy(data, *args, **kwargs):
            if kwargs.get("device") is not None and not isinstance(data, torch.Tensor):
                self._note(f"{name} to the device")
            return original(data, *args, **kwargs)

        return copy

    @property
    def _to(self):
        original = torch.Tensor.to

        def to(tensor, *args, **kwargs):
            if not kwargs.get("non_blocking") and any(str(a) == "cpu" for a in (*args, *kwargs.values())):
                self._note("to the CPU")
            return original(tensor, *args, **kwargs)

        return to

    def _note(self, what: str) -> None:
        stack = traceback.extract_stack()
        if any("triton/runtime/interpreter" in frame.filename for frame in stack):
            return
        near = next((f for f in reversed(stack) if PACKAGE in Path(f.filename).parents or "torch/optim/" in f.filename), None)
        if near is not None and "torch/optim/" in near.filename:
            return  # torch's optimizers count their steps in tensors that live on the host (on a GPU their fused kernels read none)
        self.seen.append(f"{what} in {'elsewhere' if near is None else f'{Path(near.filename).name}:{near.lineno}'}")
