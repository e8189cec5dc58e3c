"""What differs between torch 2.11 and newer, or is not public yet, in one place. tests/utils/test_compat.py holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
# renamed in torch 2.13, where the old names warn
all_gather_into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_all_gather_autograd = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd
_reduce_scatter_autograd = getattr(funcol, "reduce_scatter_single_autograd", None) or funcol.reduce_scatter_tensor_autograd


def _onednn_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x [m, k], w [n, k], bias [n] -> x w^T + bias: oneDNN's product, on a CPU. No gradient. (What torch.compile calls for inference; there is
    no public way to it for float32.)"""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


onednn_linear = _onednn_linear if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None  # builds without oneDNN


def scaled_grouped_mm(x_RD: Tensor, w_EDF: Tensor, scale_R: Tensor, scale_EF: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows of e4m3 times their expert's matrix of e4m3, each row of x and each column of w with a float32 scale -> bfloat16 [R, F].

    CUDA only. w_EDF is column-major: D is its packed dim. The same operator in torch 2.11 and 2.13, and the one of the two whose rules torch also
    knows on the meta device; `torch.nn.functional.scaled_grouped_mm` is the public one.
    """
    if operator := getattr(torch, "_scaled_grouped_mm", None):
        return operator(x_RD, w_EDF, scale_R, scale_EF, offs=offsets_E, out_dtype=torch.bfloat16)
    F = torch.nn.functional
    return F.scaled_grouped_mm(x_RD, w_EDF, scale_R, F.ScalingType.RowWise, scale_EF, F.ScalingType.RowWise, offs=offsets_E)


def local_slices(p: DTensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole tensor."""
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape))


def with_local(p: DTensor, local: Tensor) -> DTensor:
    """`p` with another local tensor, which may lie on the host while the mesh is one of devices. `DTensor.from_local` would move it."""
    return DTensor(local, p._spec, requires_grad=False)


def all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] -> [ranks * n, ...]; the backward is a reduce-scatter that sums."""
    return funcol.wait_tensor(_all_gather_autograd(x.contiguous(), 0, group))


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A new tensor; no gradient. torch.compile traces it."""
    return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))


def reduce_scatter_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks * n, ...] -> the sum of everyone's n rows for this rank; the backward is an all-gather."""
    return funcol.wait_tensor(_reduce_scatter_autograd(x.contiguous(), "sum", 0, group))


def ring_attention(
    group: dist.ProcessGroup, kernel: Callable[..., tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Causal attention over the ranks of `group`, of which rank r has the chunks r and 2P-1-r of each sequence, [B, heads, S, h].

    kernel(q, k, v, is_causal=) -> (output, log-sums, ...) for one block of queries and one of keys. Returns the same of all keys. Local
    to the group, and collective: keys and values go from rank to rank. No gradient."""
    with _ring(q.dtype) as loops:
        return loops._templated_ring_attention(group, 2, kernel, q, k, v, is_causal=True)


def ring_attention_backward(
    group: dist.ProcessGroup, kernel: Callable[..., tuple[Tensor, ...]], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k and v. kernel(grad_out=, query=, key=, value=, out=, logsumexp=, is_causal=): of one block, as above."""
    with _ring(q.dtype) as loops:
        return loops._templated_ring_attention_backward(group, 2, kernel, grad_out, "grad_out", q, k, v, out, log_sums, True)[:3]


@contextmanager
def _ring(dtype: torch.dtype) -> Iterator[Any]:
    """torch's loops, set to send keys on from rank to rank; they are not public, and an import takes seconds."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention as loops
    except ImportError:  # before there was a package
        from torch.distributed.tensor.experimental import _attention as loops
    options = loops._cp_options
    kept = options.rotate_method, options.convert_to_f32, options.enable_load_balance
    options.rotate_method, options.enable_load_balance = loops._RotateMethod.ALL_TO_ALL, True
    options.convert_to_f32 = dtype != torch.float64  # partial results are merged in at least float32
    try:
        yield loops
    finally:
        options.rotate_method, options.convert_to_f32, options.enable_load_balance = kept


@contextmanager
def fake_process_group(rank: int, size: int) -> Iterator[None]:
    """This process as rank `rank` of `size` that do not exist: meshes and shards are the real ones, collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; for those alone who ask for it

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Collective:
    """An entry of torch's flight recorder."""

    name: str
    number: int  # of its group, counted alike on all ranks
    group: str
    sizes: str
    is_completed: bool
    sequence: int  # of all collectives of this rank

    def __str__(self) -> str:
        return f"{self.name} (number {self.number} of {self.group}, {self.sizes})"


def last_collective(but: str = "") -> Collective | None:
    """The first collective of this rank that has not ended, or the last one if all have; None where torch keeps no record.

    but: the description of a group whose collectives do not count. NCCL and gloo have a recorder each (of TORCH_FR_BUFFER_SIZE or TORCH_NCCL_TRACE_BUFFER_SIZE entries).
    """
    from torch._C import _distributed_c10d as c10d

    entries = []
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if function := getattr(c10d, dump, None):
            entries += json.loads(function() or "{}").get("entries") or []
    entries = [e for e in entries if not but or but not in (e.get("process_group") or ())]
    if not entries:
        return None
    entries.sort(key=lambda e: (e.get("time_created_ns", 0), e.get("record_id", 0)))
    entry = next((e for e in entries if not _has_ended(e)), entries[-1])
    group = entry.get("process_group") or ["?"]
    return Collective(
        name=entry.get("profiling_name", "?").rpartition(":")[2],
        number=entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id", 0),
        group=f"group {group[0]}" + (f" {group[1]}" if len(group) > 1 and group[1] not in ("", "undefined") else ""),
        sizes=f"{entry.get('input_sizes', '')} to {entry.get('output_sizes', '')}",
        is_completed=_has_ended(entry),
        sequence=entry.get("record_id", 0),
    )


def _has_ended(entry: dict) -> bool:
    """gloo never says completed: it takes what has ended off its list. NCCL also takes off what has timed out."""
    return entry["state"] == "completed" or (entry.get("retired", False) and entry.get("profiling_name", "").startswith("gloo:"))


def reduce_unused_gradients(unit: FSDPModule) -> bool:
    """Parameters that a rank has not used count as zeros in the sum over ranks, in `unit` and the units in it. False where torch (before
    2.13) cannot: there all ranks must use the same parameters."""
    if not hasattr(unit, "set_reduce_scatter_unused_params"):
        return False
    unit.set_reduce_scatter_unused_params(True)
    return True
