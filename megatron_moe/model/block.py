"""One transformer layer: attention, then an MLP, experts, or both (Residual-MoE, shared experts)."""
# B batch, S sequence, D hidden, T tokens (B*S)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.attention import build_attention
from megatron_moe.model.core import Context
from megatron_moe.model.mlp import MLP
from megatron_moe.model.norm import build_norm
from megatron_moe.moe.layer import MoELayer, call
from megatron_moe.moe.module_experts import ExpertFactory
from megatron_moe.utils.random import Purpose, dropout


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Feed-forward is the dense MLP, or the experts, or for `--mlp-type residual` both, mixed per token by a learned two-way
    softmax: c_0 experts(x) + c_1 mlp(x) (DeepSpeed-MoE, arXiv 2201.05596 section 4.1.1; coefficients as in its code), or as
    they are. A shared expert is a dense MLP of a width of its own, added to the experts, gated or not.
    `run_attention` and `run_mlp` are swapped for recomputing runners; routing is outside of both. `attend`, `feed_forward`,
    `normalise`, `branch` and `finish` may be compiled. The dense branch is computed while rows travel to the experts, and its backward
    while their gradients travel back, where rows travel and neither is recomputed.
    """

    def __init__(self, layer: int, num_experts: int, config: ModelConfig, moe: MoEConfig, expert_factory: ExpertFactory | None = None):
        super().__init__()
        is_moe, D, shared = num_experts > 1, config.hidden_size, moe.moe_shared_expert_intermediate_size
        self.layer, self.dropout = layer, config.hidden_dropout
        self.attn_norm, self.attn, self.mlp_norm = build_norm(config), build_attention(config, layer), build_norm(config)
        self.mlp = MLP(config) if not is_moe or moe.residual else None
        self.moe = None
        if is_moe:
            width = moe.expert_ffn_size(config.ffn_size)
            self.moe = MoELayer(layer, num_experts, D, width, moe, config.activation, config.add_bias_linear, expert_factory)
        self.coefficient = nn.Linear(D, 2) if is_moe and moe.residual == "coefficient" else None
        self.shared_expert = MLP(config, shared) if is_moe and shared else None
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if is_moe and moe.moe_shared_expert_gate else None
        self.run_attention = self.run_mlp = call
        self.has_equal_batches = False  # in evaluation too: micro-batches are of the same size on every rank

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        mine = context.of_layer(self.layer)
        x_BSD = self.run_attention(self.attend, x_BSD, mine)
        if self.moe is None:
            return self.run_mlp(self.feed_forward, x_BSD, mine)
        h_TD = self.normalise(x_BSD)
        # in training every rank has a micro-batch of the same size; evaluation asks the others
        known = h_TD.shape[0] if self.training or self.has_equal_batches else None
        tokens = context.of_stream.token_info(*x_BSD.shape[:2], known)
        has_branch = self.mlp is not None or self.shared_expert is not None
        if has_branch and self.moe.has_gap and self.run_mlp is call:
            found: list[Tensor] = []
            y_TD = self.moe(h_TD, tokens, lambda: found.append(self.branch(h_TD.view_as(x_BSD))))
            return self.finish(x_BSD, h_TD, y_TD, mine, found[0])
        run = self.run_mlp if has_branch else call  # without a dense branch there is nothing worth recomputing
        return run(self.finish, x_BSD, h_TD, self.moe(h_TD, tokens), mine)

    def attend(self, x_BSD: Tensor, context: Context) -> Tensor:
        y_BSD = self.attn(self.attn_norm(x_BSD), context)
        return x_BSD + self._dropout(y_BSD, context, Purpose.ATTENTION_OUTPUT_DROPOUT)

    def feed_forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        return x_BSD + self._dropout(self.mlp(self.mlp_norm(x_BSD)), context, Purpose.MLP_OUTPUT_DROPOUT)

    def normalise(self, x_BSD: Tensor) -> Tensor:
        return self.mlp_norm(x_BSD).flatten(0, 1)

    def branch(self, h_BSD: Tensor) -> Tensor:
        """The dense branch: the MLP of a residual layer, or the shared expert. It needs nothing of the experts, so it can be computed
        while their rows are under way."""
        return self._branch(h_BSD)

    def _branch(self, h_BSD: Tensor) -> Tensor:
        if self.shared_expert is None:
            return self.mlp(h_BSD)
        shared_BSD = self.shared_expert(h_BSD)
        return shared_BSD if self.shared_expert_gate is None else shared_BSD * torch.sigmoid(self.shared_expert_gate(h_BSD))

    def finish(self, x_BSD: Tensor, h_TD: Tensor, y_TD: Tensor, context: Context, branch_BSD: Tensor | None = None) -> Tensor:
        """Mix the experts' answer with the dense branch's, where there is one, and add it to the stream."""
        h_BSD, y_BSD = h_TD.view_as(x_BSD), y_TD.view_as(x_BSD)
        if branch_BSD is None and (self.mlp is not None or self.shared_expert is not None):
            branch_BSD = self._branch(h_BSD)
        if self.coefficient is not None:
            c_BS2 = F.softmax(self.coefficient(h_BSD), dim=-1)
            y_BSD = y_BSD * c_BS2[..., :1] + branch_BSD * c_BS2[..., 1:]
        elif branch_BSD is not None:
            y_BSD = y_BSD + branch_BSD
        return x_BSD + self._dropout(y_BSD, context, Purpose.MLP_OUTPUT_DROPOUT)

    def _dropout(self, y_BSD: Tensor, context: Context, purpose: Purpose) -> Tensor:
        return dropout(y_BSD, self.dropout, context.of_stream.keys_BS, purpose)
