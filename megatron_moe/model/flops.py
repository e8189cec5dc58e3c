"""How many parameters a model has and how many FLOPs a token costs, from the configuration alone.

Conventions: a multiply-add is 2 FLOPs, matrix products only; the backward costs twice the forward, recomputation is not
counted. Causal attention is counted at half the square, what a kernel that skips masked blocks computes. A routed token is
counted at k experts: nothing is dropped or padded.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig


@dataclass(frozen=True)
class LayerCounts:
    """Parameters of one layer; `mlp` is the dense MLP or the residual branch, `experts` all routed ones."""

    attention: int
    norms: int
    mlp: int = 0
    gate: int = 0
    experts: int = 0
    active_experts: int = 0
    coefficient: int = 0
    shared_expert: int = 0  # and its gate
    latent: int = 0  # projections around the experts

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.mlp + self.gate + self.experts + self.coefficient + self.shared_expert + self.latent

    @property
    def active(self) -> int:
        return self.total - self.experts + self.active_experts


@dataclass(frozen=True)
class ParameterCounts:
    """total = embedding + sum of the layers + final_norm + head; active counts k experts of each MoE layer."""

    embedding: int  # token vectors, and position vectors when they are learned
    per_layer: list[LayerCounts]
    final_norm: int
    head: int  # 0 when tied to the embedding

    @property
    def total(self) -> int:
        return self._outside + sum(layer.total for layer in self.per_layer)

    @property
    def active(self) -> int:
        return self._outside + sum(layer.active for layer in self.per_layer)

    @property
    def _outside(self) -> int:
        return self.embedding + self.final_norm + self.head


def parameter_counts(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> ParameterCounts:
    """Counts of the model that these flags build, on one device; `vocab_size` before padding."""
    token_vectors = model.padded_vocab_size(vocab_size) * model.hidden_size
    has_positions = model.position_embedding_type == "learned_absolute"
    return ParameterCounts(
        embedding=token_vectors + (model.max_position_embeddings * model.hidden_size if has_positions else 0),
        per_layer=[_layer_counts(model, moe, n) for n in moe.experts_per_layer(model.num_layers)],
        final_norm=_norm_parameters(model),
        head=0 if model.is_tied else token_vectors,
    )


def flops_per_token(model: ModelConfig, moe: MoEConfig, seq_length: int, vocab_size: int) -> float:
    """Forward and backward FLOPs of one trained token, averaged over the sequence."""
    layers = (layer_flops(model, moe, num_experts, seq_length) for num_experts in moe.experts_per_layer(model.num_layers))
    return logit_flops(model, vocab_size) + sum(layers)


def logit_flops(model: ModelConfig, vocab_size: int) -> float:
    """Of a token, forward and backward, behind the last layer."""
    return 3.0 * 2 * model.hidden_size * model.padded_vocab_size(vocab_size)


def layer_flops(model: ModelConfig, moe: MoEConfig, num_experts: int, seq_length: int) -> float:
    """Of a token in one layer, forward and backward."""
    forward = _attention_flops(model, seq_length)
    if num_experts == 1:
        return 3.0 * (forward + 2 * _mlp_matrices(model))
    forward += 2 * model.hidden_size * num_experts  # router
    forward += 2 * _mlp_matrices(model, *_expert_widths(model, moe)) * moe.topk
    forward += 2 * 2 * model.hidden_size * (moe.moe_latent_size or 0)  # down and up
    if moe.residual:
        forward += 2 * _mlp_matrices(model)  # dense branch
    if moe.residual == "coefficient":
        forward += 2 * model.hidden_size * 2
    if width := moe.moe_shared_expert_intermediate_size:
        forward += 2 * _mlp_matrices(model, width=width) + 2 * model.hidden_size * moe.moe_shared_expert_gate
    return 3.0 * forward


# ---------------------------------------------------------------- one layer


def _layer_counts(model: ModelConfig, moe: MoEConfig, num_experts: int) -> LayerCounts:
    common = {"attention": _attention_parameters(model), "norms": 2 * _norm_parameters(model)}
    mlp = _mlp_parameters(model)
    if num_experts == 1:
        return LayerCounts(**common, mlp=mlp)
    expert, shared = _mlp_parameters(model, *_expert_widths(model, moe)), moe.moe_shared_expert_intermediate_size
    return LayerCounts(
        **common,
        mlp=mlp if moe.residual else 0,
        gate=model.hidden_size * num_experts,
        experts=num_experts * expert,
        active_experts=moe.topk * expert,
        coefficient=2 * model.hidden_size + 2 if moe.residual == "coefficient" else 0,
        shared_expert=_mlp_parameters(model, width=shared) + model.hidden_size * moe.moe_shared_expert_gate if shared else 0,
        latent=2 * model.hidden_size * (moe.moe_latent_size or 0),
    )


def _expert_widths(model: ModelConfig, moe: MoEConfig) -> tuple[int, int]:
    """What goes into a routed expert and comes out of it; its inner width."""
    return moe.moe_latent_size or model.hidden_size, moe.expert_ffn_size(model.ffn_size)


def _attention_matrices(model: ModelConfig) -> int:
    query, key_value = model.num_attention_heads * model.head_dim, model.key_value_heads * model.head_dim
    return model.hidden_size * (2 * query + 2 * key_value)  # q and out; k and v


def _attention_parameters(model: ModelConfig) -> int:
    query, key_value = model.num_attention_heads * model.head_dim, model.key_value_heads * model.head_dim
    biases = query + 2 * key_value + model.hidden_size
    return _attention_matrices(model) + (biases if model.add_bias_linear else 0)


def _attention_flops(model: ModelConfig, seq_length: int) -> int:
    width = model.num_attention_heads * model.head_dim
    scores_and_values = 2 * (2 * width * seq_length) // 2  # two products over the sequence, halved by the causal mask
    return 2 * _attention_matrices(model) + scores_and_values


def _mlp_matrices(model: ModelConfig, hidden: int | None = None, width: int | None = None) -> int:
    """fc1, fc2, and fc_gate, of the dense MLP's widths if no others are given."""
    return (3 if model.activation == "swiglu" else 2) * (hidden or model.hidden_size) * (width or model.ffn_size)


def _mlp_parameters(model: ModelConfig, hidden: int | None = None, width: int | None = None) -> int:
    biases = (2 if model.activation == "swiglu" else 1) * (width or model.ffn_size) + (hidden or model.hidden_size)
    return _mlp_matrices(model, hidden, width) + (biases if model.add_bias_linear else 0)


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
