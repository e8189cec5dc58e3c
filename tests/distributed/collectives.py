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
# On gloo a reduce-scatter is an all-to-all in equal parts, which are added up where they arrive (parallel/zero.py).
KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "alltoall_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


class CollectiveLog(TorchDispatchMode):
    """(phase, kind, ranks, elements of the whole tensor) of every float collective between two or more ranks.

    Integers - routing counts and sizes - are no concern of ZeRO. All-to-alls with a size for each rank, and the differentiable collectives
    of the token dispatchers: see BytesSent.
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
            in_own_sizes = func.overloadpacket.__name__ == "alltoall_base_" and len(args[3]) > 0
            if ranks > 1 and tensors[0].is_floating_point() and not in_own_sizes:
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


def _is_data(x: Tensor) -> bool:
    """Not routing counts, nor sizes. Rows in FP8 travel as bytes."""
    return x.is_floating_point() or x.dtype == torch.uint8


class BytesSent(TorchDispatchMode):
    """Bytes that this rank sends to others, forward and backward, by process group: all-to-alls of data by whatever front end of torch, and
    the differentiable gathers and scatters, as a ring moves them. FSDP's collectives are other operators: see CollectiveLog."""

    def __init__(self):
        super().__init__()
        self.sent: Counter[str] = Counter()  # by name of the group

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again with the local tensors
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func.namespace == "c10d" and name == "alltoall_base_" and _is_data(tensors[1]) and len(args[4]) > 0:
            _, outgoing, group, _, send = args[:5]
            group = dist.ProcessGroup.unbox(group)
            rows = sum(send) - send[group.rank()]
            self.sent[group.group_name] += rows * outgoing[:1].numel() * outgoing.element_size()
        elif func.namespace == "_c10d_functional" and name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            group = args[-1] if isinstance(args[-1], dist.ProcessGroup) else dist.distributed_c10d._resolve_process_group(args[-1])
            whole = tensors[0].numel() if name == "all_gather_into_tensor" else tensors[0].numel() // group.size()
            if tensors[0].is_floating_point():
                self.sent[group.group_name] += (group.size() - 1) * whole * tensors[0].element_size()
        else:
            assert "all_to_all" not in name, f"an all-to-all that is not counted: {func}"
        return func(*args, **(kwargs or {}))

    def of(self, *groups: dist.ProcessGroup) -> int:
        return sum(self.sent[name] for name in {group.group_name for group in groups})


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
