"""What lives on the host: activations between forward and backward (--cpu-offloading), shards and the update (--cpu-optimizer).

Where the host computes, everything is there already: both flags change nothing then, and say so once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.tensor import DTensor

from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT

SMALLEST = 1 << 16  # bytes: below that a copy takes longer than its bytes are worth


def offload_warnings(config: RunConfig, device_type: str) -> Iterator[str]:
    """What was asked for and does nothing on this device."""
    if device_type == "cpu":
        given = {"--cpu-offloading": config.memory.cpu_offloading, "--cpu-optimizer": config.memory.cpu_optimizer}
        yield from (f"{flag} has no effect on a CPU: what it moves to the host is there already" for flag, is_on in given.items() if is_on)


def is_offloaded(config: RunConfig, device_type: str) -> bool:
    """Whether shards of parameters, gradients and optimizer state live on the host."""
    return config.memory.cpu_optimizer and device_type != "cpu"


def apply_activation_offload(model: GPT) -> None:
    """What a block saves for its backward waits in pinned memory of the host. Copies go with the stream: nothing waits for them."""
    for block in model.blocks:
        block.forward = offloaded(block.forward, block, save_on_cpu(pin_memory=True))


def offloaded(
    forward: Callable[..., Tensor], module: nn.Module, host: saved_tensors_hooks, smallest: int = SMALLEST
) -> Callable[..., Tensor]:
    """`forward` with the packing of `host` for all but small tensors and the parameters of the module, which are there anyway."""

    def pack(t: Tensor) -> tuple[bool, Any]:
        stays = t.nbytes < smallest or _storage(t) in map(_storage, module.parameters())
        return (False, t.detach()) if stays else (True, host.pack_hook(t))  # detached: an output that keeps itself is never freed

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        is_moved, kept = packed
        return host.unpack_hook(kept) if is_moved else kept

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return wrapped


def _storage(t: Tensor) -> int:
    """Where a tensor lies, views of it too."""
    return (t.to_local() if isinstance(t, DTensor) else t).untyped_storage().data_ptr()


def materialise(model: nn.Module, device: torch.device, is_on_host: bool) -> None:
    """Memory for a model without: parameters on the device, or their shards on the host and the buffers alone on the device."""
    model.to_empty(device=torch.device("cpu") if is_on_host else device)
    for module in model.modules() if is_on_host else ():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
