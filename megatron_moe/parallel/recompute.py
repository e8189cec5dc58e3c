"""Recomputation of activations in the backward pass. Routing is outside of what is recomputed: it happens once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from megatron_moe.model.gpt import GPT


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    # No random state is kept: every draw comes from the counter hash and is replayed by construction.
    # early_stop=False: stopping at the last saved tensor leaves the all-reduce of a row-parallel layer launched and never
    # waited for, one leaked collective per layer and microbatch; running to the end, the residual addition waits for it.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False)


def apply_recompute(model: GPT, granularity: str) -> None:
    """full: attention, dense MLPs and experts; selective: attention alone, whose scores grow with the square of the length."""
    for block in model.layers.values():
        block.run_attention = recomputed
        if granularity == "full":
            block.run_mlp = recomputed
            if block.moe is not None:
                block.moe.run = recomputed
