"""Mixture-of-experts layer: route -> dispatch -> experts -> combine.

The layer reads single-device. What differs between layouts is handed to it: `dispatcher` (who owns which expert), `reducer` (over
which ranks tokens are spread) and `run` (recompute the experts in the backward or not).
`jittered`, `decide` and the experts are pure functions of tensors, which may be compiled; what is between them cannot be.
"""
# T tokens, D hidden, E experts, e experts on this rank, K experts per token, R routed rows

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.config.moe import MoEConfig
from megatron_moe.moe.dispatch import Limits, build_dispatcher
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.gate import Gate
from megatron_moe.moe.latent import TokenProjection
from megatron_moe.moe.losses import AttachLoss, auxiliary_losses
from megatron_moe.moe.metrics import RoutingStats, measure
from megatron_moe.moe.module_experts import ExpertFactory, ModuleExperts
from megatron_moe.moe.policies import Choice, build_policy
from megatron_moe.moe.routing import DropOrder, Routing, combine_weights, count_assignments, drop_over_capacity, expert_capacity
from megatron_moe.moe.tokens import NO_INFO, Reducer, TokenInfo
from megatron_moe.utils.random import Purpose, layer_keys, layer_offset, uniform

JITTER = 0.01  # DeepSpeed's width of the multiplicative noise


def call(function: Callable[..., Any], *args: Any) -> Any:
    """The default runner: no recomputation."""
    return function(*args)


class MoELayer(nn.Module):
    """x_TD -> y_TD, the sum over each token's experts of gate weight times expert output.

    `loss_weight` is 1 / tokens of the global batch (times the warm-up of the coefficients, times the loss scale of the main loss: a
    tensor then), set once per step before the first forward; at 0, and in evaluation, the auxiliary losses are only measured.

        x_TD --gate--> logits_TE --policy--> Choice --capacity--> ids_TK, weights_TK      route: once, never recomputed
          |                |                                          |
          |                +--> auxiliary losses, statistics          |
          v                                                           v
        dispatch --> rows_RD by expert --> experts --> combine --> y_TD                   compute: may be recomputed

    (the dispatcher's `through`, which may do so in several parts)

    With --moe-latent-size tokens are projected to that width before dispatch, and back behind combine. `expert_factory` makes
    experts of any kind, see moe/module_experts.py; without it they are MLPs. `experts_may_draw`: these may have dropout of their own.
    """

    def __init__(self, layer: int, num_experts: int, hidden_size: int, ffn_size: int, moe: MoEConfig, activation: str = "gelu",
                 bias: bool = True, expert_factory: ExpertFactory | None = None, experts_may_draw: bool = False):  # fmt: skip
        super().__init__()
        self.layer, self.num_experts, self.config = layer, num_experts, moe
        self.gate = Gate(hidden_size, num_experts, moe.moe_router_enable_expert_bias)
        self.policy = build_policy(moe)
        latent, width = moe.moe_latent_size, moe.moe_latent_size or hidden_size
        self.latent_down = TokenProjection(hidden_size, latent) if latent else None
        self.latent_up = TokenProjection(latent, hidden_size) if latent else None
        if expert_factory is None:
            gather = moe.moe_expert_gemm == "gather"
            self.experts: nn.Module = Experts(num_experts, width, ffn_size, activation, bias, moe.moe_fp8_experts, gather)
        elif moe.moe_fp8_experts:
            raise ValueError(
                "--moe-fp8-experts multiplies the matrices of the built-in MLPs, and expert_factory makes modules of its own; drop one"
            )
        else:
            self.experts = ModuleExperts(num_experts, width, expert_factory, experts_may_draw)
        self.dispatcher: Any = build_dispatcher("auto", num_experts, moe.topk, None, pad=moe.moe_pad_expert_input_to_capacity)
        self.reducer = Reducer()
        self.run = call
        self.loss_weight: float | Tensor = 0.0
        self.batch_counts_E: Tensor | None = None
        self.stats = RoutingStats(num_experts)
        self.measures = True  # in evaluation; in training always. Generation asks for nothing but the output

    def begin_step(self, loss_weight: float | Tensor) -> None:
        """Before the first forward of a step."""
        self.loss_weight, self.batch_counts_E = loss_weight, None
        self.stats.reset()

    def forward(self, x_TD: Tensor, tokens: TokenInfo = NO_INFO, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """meanwhile: with `has_gap`, called when rows are under way; what it computes is its caller's."""
        return self.routed(x_TD, tokens, meanwhile)[0]

    @property
    def has_gap(self) -> bool:
        """Rows are under way for a while, and what is computed meanwhile is computed once: not where rows are sent again to recompute."""
        return self.dispatcher.has_gap and self.run is call

    def routed(self, x_TD: Tensor, tokens: TokenInfo = NO_INFO, meanwhile: Callable[[], None] | None = None) -> tuple[Tensor, Routing]:
        """The same, and how the tokens were routed."""
        routing, limits = self.route(x_TD, tokens)
        plan = self.dispatcher.plan(routing.ids_TK, limits)
        also = () if meanwhile is None else (meanwhile,)
        y_TD = self.run(self.compute, x_TD, routing.ids_TK, routing.weights_TK, plan, *also)
        self.stats.add_sent(plan.sent_bytes, plan.far_bytes, torch.is_grad_enabled(), self.run is not call)
        return y_TD, routing

    def compute(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """The part that may be recomputed: it decides nothing."""
        x_TD = x_TD if self.latent_down is None else self.latent_down(x_TD)
        also = () if meanwhile is None else (meanwhile,)
        y_TD = self.dispatcher.through(self.experts, x_TD, ids_TK, weights_TK, plan, *also)
        return y_TD if self.latent_up is None else self.latent_up(y_TD)

    def route(self, x_TD: Tensor, tokens: TokenInfo) -> tuple[Routing, Limits]:
        """Scores of the experts, what follows from them, and the statistics; and what is known about the ids without looking."""
        keys_T = layer_keys(tokens.keys_T, self.layer) if self.training and tokens.keys_T is not None else None
        layer_key = torch.full((), layer_offset(self.layer), dtype=torch.int64, device=x_TD.device)
        tokens = replace(tokens, keys_T=keys_T, layer_key=layer_key)
        has_jitter = keys_T is not None and self.config.moe_noisy_gate_policy == "Jitter"
        logits_TE = self.gate(self.jittered(x_TD, keys_T) if has_jitter else x_TD)
        most_tokens = tokens.most_tokens
        if most_tokens is None and self.has_capacity:  # only then: the host waits for the answer
            most_tokens = self.reducer.most_tokens(x_TD.shape[0])
        capacity = self.capacity(most_tokens) if self.has_capacity else None
        weight, dtype = self.loss_weight, logits_TE.dtype
        is_attached = self.training and (isinstance(weight, Tensor) or weight)  # a tensor's value would be a wait
        loss_weight = None
        if is_attached:
            loss_weight = weight.to(dtype) if isinstance(weight, Tensor) else torch.full((), weight, dtype=dtype, device=logits_TE.device)
        counts_E = None  # of the step so far; evaluation has no part in them
        if is_attached and self.config.moe_global_loss_coeff:
            counts_E = self.batch_counts_E
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x_TD.device) if counts_E is None else counts_E
        routing = self.decide(logits_TE, tokens, capacity, loss_weight, self.gate.expert_bias, counts_E)
        if routing.measured is not None:
            self.stats.add(routing.measured)
        self.batch_counts_E = routing.batch_counts_E
        return routing, Limits(capacity is None and tokens.used_T is None, capacity, most_tokens)

    def decide(self, logits_TE: Tensor, tokens: TokenInfo, capacity: int | None, loss_weight: Tensor | None,
               bias_E: Tensor | None, batch_counts_E: Tensor | None) -> Routing:  # fmt: skip
        """Choose experts, attach the auxiliary losses to the logits, drop what exceeds the capacity."""
        choice = self.policy(logits_TE, tokens, bias_E, capacity, self.training)
        if tokens.used_T is not None:
            choice.ids_TK = torch.where(tokens.used_T[:, None], choice.ids_TK, -1)
        counts_E = count_assignments(choice.ids_TK, self.num_experts)
        losses, scores_TE = None, choice.scores_TE
        if self.training or self.measures:
            losses = auxiliary_losses(self.config, logits_TE, choice, tokens, self.reducer, batch_counts_E)
            scores_TE = scores_TE if loss_weight is None else AttachLoss.apply(scores_TE, loss_weight * losses.total)
        kept_TK = choice.ids_TK
        if capacity is not None and not self.policy.keeps_capacity:
            kept_TK = self._drop(choice, capacity, tokens.keys_T)
        c = self.config
        weights_TK = combine_weights(scores_TE, choice.ids_TK, kept_TK, c.normalize, c.moe_router_topk_scaling_factor)
        if losses is None:
            return Routing(kept_TK, weights_TK, counts_E, None)
        measured = measure(choice.probs_TE, counts_E, (kept_TK >= 0).sum(), losses.balance, losses.z)
        balance = losses.balance if loss_weight is None else None
        return Routing(kept_TK, weights_TK, counts_E, measured, losses.batch_counts_E, balance)

    def jittered(self, x_TD: Tensor, keys_T: Tensor) -> Tensor:
        noise_TD = uniform(keys_T, Purpose.GATE_JITTER, x_TD.shape[1])
        return x_TD * (1 - JITTER + 2 * JITTER * noise_TD)  # promotes bf16 to the gate's float32

    @property
    def has_capacity(self) -> bool:
        """Whether there are rows that an expert does not take."""
        return self.training if self.policy.keeps_capacity else self.config.moe_token_dropping

    def capacity(self, num_tokens: int) -> int:
        """Rows that an expert takes of this many tokens."""
        c = self.config
        factor = c.moe_train_capacity_factor if self.training else c.moe_eval_capacity_factor
        return expert_capacity(num_tokens, self.num_experts, factor, c.topk, c.moe_min_capacity)

    def _drop(self, choice: Choice, capacity: int, keys_T: Tensor | None) -> Tensor:
        order = self.drop_order
        if order == "random" and keys_T is None:
            order = "position"  # evaluation is deterministic
        priority_TK = None
        if order == "random":
            priority_TK = uniform(keys_T, Purpose.TOKEN_SELECTION, choice.ids_TK.shape[1])
        elif order == "probs":
            priority_TK = choice.scores_TE.gather(1, choice.ids_TK.clamp_min(0))
        return drop_over_capacity(choice.ids_TK, capacity, order, priority_TK)

    @property
    def drop_order(self) -> DropOrder:
        """auto is DeepSpeed's: random token selection for k = 1, position for k = 2, gate probability above."""
        if self.config.moe_token_drop_policy != "auto":
            return self.config.moe_token_drop_policy
        return {1: "random" if self.config.moe_rts else "position", 2: "position"}.get(self.config.topk, "probs")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, MoELayer)]
