"""How many bytes tensors hold at any moment: every storage that an operator makes, until nobody refers to it any more."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """`now` and `peak` in bytes, of storages that are made within the mode and of those that it is told about. Temporaries inside of an
    operator are not tensors and not seen. A storage that FSDP frees and fills again counts while it is filled."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for t in known:
            self._see(t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._see(t)
        if func.namespace in ("inductor", "fsdp") or "resize" in func.overloadpacket.__name__:
            for key in list(self._storages):  # it may have been emptied or filled
                self._weigh(key)
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, t: Tensor) -> None:
        local = getattr(t, "_local_tensor", t)
        if local.device.type == "meta" or isinstance(local, torch._subclasses.FakeTensor):
            return
        storage = local.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
            self.sizes[key] = 0
        self._weigh(key)

    def _weigh(self, key: int) -> None:
        storage = self._storages[key]()
        if storage is not None:
            self.now += storage.nbytes() - self.sizes[key]
            self.sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
        self._storages.pop(key, None)

    def look(self) -> int:
        """Bytes now, whatever happened to storages outside of operators."""
        for key in list(self._storages):
            self._weigh(key)
        self.peak = max(self.peak, self.now)
        return self.now
