"""Routing policies: which experts a token goes to.

A policy maps logits to a Choice and knows nothing of capacity, dropping and dispatch, which come after it; these know nothing
of the policy. A new one is a file here, a value of --moe-router-policy and an entry of POLICIES.
"""

from __future__ import annotations

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.policies.base import Choice, Policy
from megatron_moe.moe.policies.expert_choice import ExpertChoice
from megatron_moe.moe.policies.forced import Balanced, Zipf
from megatron_moe.moe.policies.hash import Hash
from megatron_moe.moe.policies.sinkhorn import Sinkhorn
from megatron_moe.moe.policies.topk import TopK

__all__ = ["Choice", "Policy", "build_policy"]


POLICIES = {"topk": TopK, "expert_choice": ExpertChoice, "hash": Hash, "sinkhorn": Sinkhorn, "balanced": Balanced, "zipf": Zipf}


def build_policy(config: MoEConfig) -> Policy:
    """--moe-router-policy."""
    return POLICIES[config.moe_router_policy](config)
