"""Recomputation of activations in the backward pass. Routing is outside of what is recomputed: it happens once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch.utils.checkpoint import checkpoint

from megatron_moe.model.gpt import GPT


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    # No random state is kept: every draw comes from the counter hash and is replayed by construction.
    # early_stop=False: stopping at the last saved tensor leaves the all-reduce of a row-parallel layer launched and never
    # waited for, one leaked collective per layer and microbatch; running to the end, the residual addition waits for it.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False)


def apply_recompute(model: GPT, modules: Collection[str]) -> None:
    """`modules`: parts of a block by their names in --recompute-modules."""
    for block in model.blocks:
        if "core_attn" in modules:
            block.run_attention = recomputed
        if ("mlp" in modules and block.mlp is not None) or ("shared_experts" in modules and block.shared_expert is not None):
            block.run_mlp = recomputed  # of both at once, where a block has both
        if "moe" in modules and block.moe is not None:
            block.moe.run = recomputed
