"""Gradients of an MoE layer by DeepSpeed's names."""

import copy

import torch

from megatron_moe.deepspeed.moe.layer import MoE


@torch.no_grad()
def named_gradients(moe: MoE) -> dict[str, torch.Tensor]:
    """A copy whose parameters are the gradients says its state."""
    twin = copy.deepcopy(moe)
    for p, q in zip(twin.parameters(), moe.parameters()):
        p.copy_(q.grad)
    return twin.state_dict()
