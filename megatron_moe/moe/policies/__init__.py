"""Routing policies: which experts a token goes to.

A policy maps logits to a Choice and knows nothing of capacity, dropping and dispatch, which come after it; these know nothing
of the policy. A new one is a file here, a value of --moe-router-policy and an entry of `build_policy`.
"""

from __future__ import annotations

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, Policy
from megatron_moe.moe.policies.topk import TopK

__all__ = ["Choice", "Policy", "build_policy"]


def build_policy(config: MoEConfig, num_experts: int) -> Policy:
    """The policy of a layer with this many experts."""
    return TopK(config)
