"""Where the kernels of the fused all-to-all can run, and have shown so, they take the place of the exchange that a layer has."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_moe.config.run import RunConfig
from megatron_moe.kernels.fused import cuda_exchange
from megatron_moe.kernels.fused.exchange import Exchange, row_problem
from megatron_moe.kernels.fused.memory import IpcMemory, Memory, SymmetricMemory
from megatron_moe.kernels.on_gpu import has_triton
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.fused import FusedDispatcher, first_difference
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.expert import expert_degree

logger = logging.getLogger(__name__)

TRIAL_SPINS = 2**26  # a rank compiles its kernels while others look for it, and a fault should not be waited for

BuildExchange = Callable[[MoELayer, dist.ProcessGroup], Exchange | str]


def apply_fused_dispatch(model: GPT, mesh: ParallelMesh, config: RunConfig) -> None:
    """After `apply_expert_parallel`. Collective, and the host waits: ranks show each other their memory, and try it.

    Where it cannot be, a layer keeps its dispatcher, and says why."""
    kind, c = config.moe.moe_token_dispatcher, config.moe
    # what only an all-to-all has is not taken away
    is_open = kind == "auto" and not (c.moe_pad_expert_input_to_capacity or c.moe_overlap_chunks > 1 or c.moe_fp8_dispatch)
    if kind == "fused" or (is_open and mesh.dense.device_type == "cuda" and config.parallel.etp == 1):
        use_fused_dispatch(model, mesh, lambda moe, group: _tried_exchange(moe, group, config), is_asked_for=kind == "fused")


def use_fused_dispatch(model: GPT, mesh: ParallelMesh, build: BuildExchange, is_asked_for: bool = True) -> None:
    """`build`: an exchange for layers like this one, or why there can be none. Layers of one shape share it: their rows use it in turn."""
    exchanges: dict[tuple[int, int], Exchange | str] = {}
    for moe in moe_layers(model):
        ep = expert_degree(model, moe)
        if ep == 1:
            continue
        key = ep, moe.num_experts
        if key not in exchanges:
            exchanges[key] = build(moe, mesh.expert_group(ep))
        found, before = exchanges[key], moe.dispatcher
        about = f"{moe.num_experts} experts, k {moe.config.topk}, EP {ep}"
        if isinstance(found, str):
            before.why = f"{about}: {before.name}, not fused: {found}"
            continue
        moe.dispatcher = FusedDispatcher(moe.num_experts, found)
        moe.dispatcher.why = (
            "" if is_asked_for else f"{about}: fused, which brought random rows as the all-to-all does ({found.memory.kind} memory)"
        )


def device_problem() -> str | None:
    """Why this machine cannot run the kernels; a predicate of the path."""
    if not torch.cuda.is_available():
        return "writes from GPU to GPU, and torch sees no GPU here"
    if not has_triton():
        return "needs Triton, which is not installed (pip install triton)"
    return None


def _tried_exchange(moe: MoELayer, group: dist.ProcessGroup, config: RunConfig) -> Exchange | str:
    """For layers like this one; or why not, which all ranks of the group then say."""
    t, c = config.training, config.moe
    dtype = getattr(torch, t.half or t.params_dtype)
    width = c.moe_latent_size or config.model.hidden_size
    reason = _first_of_all(device_problem() or row_problem(width, dtype), group) or _domain_problem(group)
    if reason:
        return reason
    device = torch.device("cuda", torch.cuda.current_device())
    memory = open_memory(group, device)
    if isinstance(memory, str):
        return memory
    kernels = _cuda_kernels(device, width, dtype, c.topk) if c.moe_fused_kernels == "cuda" else None
    if reason := _first_of_all(kernels if isinstance(kernels, str) else None, group):
        return reason
    exchange = Exchange(memory, moe.num_experts, c.topk, c.moe_fused_capacity, c.moe_fused_capacity_factor, kernels=kernels)
    trial = Exchange(memory, moe.num_experts, c.topk, "worst", spins=TRIAL_SPINS, kernels=kernels)
    try:
        difference = first_difference(FusedDispatcher(moe.num_experts, trial), AllToAllDispatcher(moe.num_experts, group), width, dtype)
    except RuntimeError as error:
        difference = f"{type(error).__name__}: {error}"
    difference = _first_of_all(difference, group)
    return exchange if difference is None else f"it failed its test at the start: {difference}"


def _cuda_kernels(device: torch.device, width: int, dtype: torch.dtype, k: int) -> cuda_exchange.CudaKernels | str:
    """Of --moe-fused-kernels cuda; or why there are none."""
    reason = cuda_exchange.problem(torch.cuda.get_device_capability(device), width, dtype, k)
    if reason is None:
        try:
            return cuda_exchange.kernels_for(device)
        except (RuntimeError, OSError) as error:
            reason = str(error)
    return f"--moe-fused-kernels cuda: {reason}; leave it out for Triton's kernels"


def open_memory(group: dist.ProcessGroup, device: torch.device) -> Memory | str:
    """Symmetric memory, or CUDA IPC where that cannot be had; or why neither can. Collective."""
    reasons = []
    for kind in (SymmetricMemory, IpcMemory):
        memory, failure = kind(group, device), None
        try:
            memory.alloc((16,), torch.int32)
        except RuntimeError as error:
            failure = f"{kind.kind} memory: {str(error).splitlines()[0]}"
        failure = _first_of_all(failure, group)
        if failure is None:
            return memory
        reasons.append(failure)
    return "; ".join(reasons)


def _domain_problem(group: dist.ProcessGroup) -> str | None:
    """Whether the group's GPUs reach each other's memory."""
    here = socket.gethostname(), torch.cuda.current_device()
    places: list[tuple[str, int]] = [here] * dist.get_world_size(group)
    dist.all_gather_object(places, here, group=group)
    hosts = sorted({host for host, _ in places})
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} nodes ({', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''})"
    unreachable = [d for d in sorted({d for _, d in places} - {here[1]}) if not torch.cuda.can_device_access_peer(here[1], d)]
    return _first_of_all(f"GPU {here[1]} cannot reach the memory of GPU {unreachable[0]}" if unreachable else None, group)


def _first_of_all(reason: str | None, group: dist.ProcessGroup) -> str | None:
    """What the first rank of the group that has a reason says."""
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    return next((r for r in reasons if r is not None), None)
