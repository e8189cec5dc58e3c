"""Mixture-of-experts layer: route -> dispatch -> experts -> combine.

The layer reads single-device. What differs between layouts is handed to it: `dispatcher` (who owns which expert),
`sum_counts` (over which ranks a microbatch's tokens are spread) and `run` (recompute the experts in the backward or not).
`jittered`, `decide` and the experts are pure functions of tensors, which may be compiled; what is between them cannot be.
"""
# T tokens, D hidden, E experts, e experts on this rank, K experts per token, R routed rows

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.dispatch import Limits, LocalDispatcher
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.gate import Gate
from megatron_moe.moe.losses import AttachLoss, load_balancing_sum, router_z_sum
from megatron_moe.moe.metrics import RoutingStats, measure
from megatron_moe.moe.routing import (
    DropOrder,
    Routing,
    choose_experts,
    combine_weights,
    count_assignments,
    drop_over_capacity,
    expert_capacity,
)
from megatron_moe.utils.random import Purpose, gumbel, layer_keys, uniform

JITTER = 0.01  # DeepSpeed's width of the multiplicative noise


def call(function: Callable[..., Any], *args: Any) -> Any:
    """The default runner: no recomputation."""
    return function(*args)


class MoELayer(nn.Module):
    """x_TD -> y_TD, the sum over each token's experts of gate weight times expert output.

    `keys_T` (int64, utils.random.token_keys) are the source of all noise; without them there is none. `loss_weight` is
    1 / tokens of the global batch, set once per step before the first forward; at 0, and in evaluation, the auxiliary losses are
    only measured. `most_tokens` is the length of the longest x_TD among the ranks that share the experts: a dispatcher that
    must know it would have to ask them.
    """

    def __init__(self, layer: int, num_experts: int, hidden_size: int, ffn_size: int, moe: MoEConfig, swiglu=False, bias=True):
        super().__init__()
        self.layer, self.num_experts, self.config = layer, num_experts, moe
        self.gate = Gate(hidden_size, num_experts)
        self.experts = Experts(num_experts, hidden_size, ffn_size, swiglu, bias)
        self.dispatcher: Any = LocalDispatcher(num_experts)
        self.sum_counts: Callable[[Tensor], Tensor] = lambda counts_E: counts_E
        self.run = call
        self.loss_weight = 0.0
        self.stats = RoutingStats(num_experts)

    def forward(self, x_TD: Tensor, keys_T: Tensor | None = None, most_tokens: int | None = None) -> Tensor:
        routing = self.route(x_TD, keys_T)
        capacity = None if most_tokens is None else self.capacity(most_tokens)
        plan = self.dispatcher.plan(routing.ids_TK, Limits(not self.config.moe_token_dropping, capacity, most_tokens))
        return self.run(self.compute, x_TD, routing.ids_TK, routing.weights_TK, plan)

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any) -> Tensor:
        """The part that may be recomputed: it decides nothing."""
        x_RD, offsets_e, row_weights_R, plan = self.dispatcher.dispatch(x_TD, ids_TK, weights_TK, plan)
        y_RD = self.experts(x_RD, offsets_e, row_weights_R, plan.has_spare_rows)
        return self.dispatcher.combine(y_RD, plan)

    def route(self, x_TD: Tensor, keys_T: Tensor | None) -> Routing:
        """Scores of the experts, what follows from them, and the statistics."""
        keys_T = layer_keys(keys_T, self.layer) if self.training and keys_T is not None else None
        has_jitter = keys_T is not None and self.config.moe_noisy_gate_policy == "Jitter"
        logits_TE = self.gate(self.jittered(x_TD, keys_T) if has_jitter else x_TD)
        is_attached = self.loss_weight and self.training
        loss_weight = torch.full((), self.loss_weight, dtype=logits_TE.dtype, device=logits_TE.device) if is_attached else None
        routing = self.decide(logits_TE, keys_T, self.capacity(x_TD.shape[0]), loss_weight)
        self.stats.add(routing.measured)
        return routing

    def decide(self, logits_TE: Tensor, keys_T: Tensor | None, capacity: int | None, loss_weight: Tensor | None) -> Routing:
        """Choose experts, attach the auxiliary losses to the logits, drop what exceeds the capacity."""
        probs_TE, ids_TK = choose_experts(logits_TE, self.config.topk, self._choice_noise(logits_TE, keys_T))
        counts_E = count_assignments(ids_TK, self.num_experts)
        balance_counts_E = counts_E if self.config.topk != 2 else count_assignments(ids_TK[:, :1], self.num_experts)
        aux = load_balancing_sum(probs_TE, self.sum_counts(balance_counts_E))
        z = router_z_sum(logits_TE)
        if loss_weight is not None:
            extra = loss_weight * (self.config.moe_loss_coeff * aux + self.config.moe_router_z_loss_coeff * z)
            probs_TE = AttachLoss.apply(probs_TE, extra)
        if capacity is not None:
            ids_TK = self._drop(ids_TK, capacity, probs_TE, keys_T)
        weights_TK = combine_weights(probs_TE, ids_TK)
        return Routing(ids_TK, weights_TK, counts_E, measure(probs_TE, counts_E, (ids_TK >= 0).sum(), aux, z))

    def jittered(self, x_TD: Tensor, keys_T: Tensor) -> Tensor:
        noise_TD = uniform(keys_T, Purpose.GATE_JITTER, x_TD.shape[1])
        return x_TD * (1 - JITTER + 2 * JITTER * noise_TD)  # promotes bf16 to the gate's float32

    def _choice_noise(self, logits_TE: Tensor, keys_T: Tensor | None) -> Tensor | None:
        """Gumbel noise where the policy samples: the expert of k = 1 (RSample), the second expert of k = 2."""
        samples = (self.config.topk == 1 and self.config.moe_noisy_gate_policy == "RSample") or (
            self.config.topk == 2 and self.config.moe_top2_2nd_expert_sampling
        )
        if keys_T is None or not samples:
            return None
        return gumbel(keys_T, Purpose.GATE_SAMPLING, self.num_experts).to(logits_TE.dtype)

    def capacity(self, num_tokens: int) -> int | None:
        """Rows that an expert takes of this many tokens; None: all."""
        c = self.config
        factor = c.moe_train_capacity_factor if self.training else c.moe_eval_capacity_factor
        return expert_capacity(num_tokens, self.num_experts, factor, c.topk, c.moe_min_capacity) if c.moe_token_dropping else None

    def _drop(self, ids_TK: Tensor, capacity: int, probs_TE: Tensor, keys_T: Tensor | None) -> Tensor:
        order = self.drop_order
        if order == "random" and keys_T is None:
            order = "position"  # evaluation is deterministic
        priority_TK = None
        if order == "random":
            priority_TK = uniform(keys_T, Purpose.TOKEN_SELECTION, self.config.topk)
        elif order == "probs":
            priority_TK = probs_TE.gather(1, ids_TK)
        return drop_over_capacity(ids_TK, capacity, order, priority_TK)

    @property
    def drop_order(self) -> DropOrder:
        """auto is DeepSpeed's: random token selection for k = 1, position for k = 2, gate probability above."""
        if self.config.moe_token_drop_policy != "auto":
            return self.config.moe_token_drop_policy
        return {1: "random" if self.config.moe_rts else "position", 2: "position"}.get(self.config.topk, "probs")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MoELayer)]
