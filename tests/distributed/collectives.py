"""What a step sends and keeps: collectives as torch dispatches them, and the storages of parameters and gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# What FSDP calls, by the operator that every front end of torch ends in. First argument: where the result goes.
KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


class CollectiveLog(TorchDispatchMode):
    """(phase, kind, ranks, elements of the whole tensor) of every float collective between two or more ranks.

    Integers - routing counts and sizes - are no concern of ZeRO. All-to-all and the differentiable collectives of the token
    dispatchers are other operators: see BytesSent.
    """

    def __init__(self):
        super().__init__()
        self.phase = ""
        self.calls: list[tuple[str, str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again with the local tensors
        kind = KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind:
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            ranks = next(dist.ProcessGroup.unbox(a).size() for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            if ranks > 1 and tensors[0].is_floating_point():
                self.calls.append((self.phase, kind, ranks, max(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))

    def of(self, phase: str) -> Counter:
        """(kind, ranks, "calls" or "elements") -> number."""
        out: Counter = Counter()
        for where, kind, ranks, size in self.calls:
            if where == phase:
                out[kind, ranks, "calls"] += 1
                out[kind, ranks, "elements"] += size
        return out


class BytesSent(TorchDispatchMode):
    """Bytes that this rank sends to others in float collectives, forward and backward, by process group and kind: as they come to the
    process group, whatever front end of torch they were called by. Gathers and scatters as a ring moves them."""

    def __init__(self):
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()  # (name of the group, kind)
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again with the local tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        kind = {
            "alltoall_base_": "all-to-all", "all_to_all_single": "all-to-all", "all_gather_into_tensor": "all-gather",
            "_allgather_base_": "all-gather", "reduce_scatter_tensor": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter",
        }.get(name)  # fmt: skip
        if kind is None or not tensors[0].is_floating_point():
            return
        group = next(_group_of(a) for a in args if isinstance(a, str | dist.ProcessGroup | torch.ScriptObject) and _names_group(a))
        ranks, rank = group.size(), group.rank()
        if kind == "all-to-all":  # (output, input, group, output sizes, input sizes) or (input, output sizes, input sizes, group)
            send = [a for a in args if isinstance(a, list | tuple)][1]
            rows, outgoing = sum(send) - send[rank], tensors[-1]
            size = rows * outgoing[0].numel() if rows else 0
        else:
            size = (ranks - 1) * min(t.numel() for t in tensors) if name.startswith("_") else None
            if size is None:  # the functional ones have their input alone
                size = (ranks - 1) * tensors[0].numel() // (1 if kind == "all-gather" else ranks)
        self.sent[group.group_name, kind] += size * tensors[0].element_size()
        self.calls[group.group_name, kind] += 1

    def of(self, *groups: dist.ProcessGroup) -> int:
        """By all-to-all, all-gather and reduce-scatter."""
        names = {group.group_name for group in groups}
        return sum(size for (name, _), size in self.sent.items() if name in names)


def _names_group(value: object) -> bool:
    return _is_group(value) if isinstance(value, torch.ScriptObject) else not (isinstance(value, str) and value in ("sum", "avg", "max", "min"))


def _group_of(value: object) -> dist.ProcessGroup:
    if isinstance(value, torch.ScriptObject):
        return dist.ProcessGroup.unbox(value)
    return dist.distributed_c10d._resolve_process_group(value) if isinstance(value, str) else value


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().name() == "ProcessGroup"


def elements(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind `tensors`, in float32 elements; a freed storage has none."""
    storages = {}
    for t in tensors:
        if t is not None:
            storage = (t.to_local() if isinstance(t, DTensor) else t).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values()) // 4


class LiveParameters:
    """Every parameter object a model ever has - FSDP swaps sharded and gathered ones - and how much of them is in memory."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.known: dict[int, nn.Parameter] = {}
        self.peak = 0
        self.look()
        for module in model.modules():  # gathered parameters are there when a module inside of their unit begins
            module.register_forward_pre_hook(lambda *_: self.look())

    def look(self) -> None:
        self.known |= {id(p): p for p in self.model.parameters()}
        self.peak = max(self.peak, self.parameters())

    def parameters(self) -> int:
        return elements(self.known.values())

    def gradients(self) -> int:
        return elements(p.grad for p in self.known.values())
