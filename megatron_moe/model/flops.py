"""How many parameters a model has and how many FLOPs a token costs, from the configuration alone.

Conventions: a multiply-add is 2 FLOPs, matrix products only; the backward costs twice the forward, recomputation is not
counted. Causal attention is counted at half the square, or what of it lies in the window: what a kernel that skips masked blocks computes. A routed token is
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
    """total = embedding + sum of the layers + final_norm + head + mtp; active counts k experts of each MoE layer, and no multi-token
    prediction, which a model that is used does without."""

    embedding: int  # token vectors, and position vectors when they are learned
    per_layer: list[LayerCounts]
    final_norm: int
    head: int  # 0 when tied to the embedding
    mtp: int = 0  # modules of multi-token prediction, without the vectors and the head that they share

    @property
    def total(self) -> int:
        return self._outside + self.mtp + sum(layer.total for layer in self.per_layer)

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
        mtp=_mtp_parameters(model, moe),
    )


def flops_per_token(model: ModelConfig, moe: MoEConfig, seq_length: int, vocab_size: int) -> float:
    """Forward and backward FLOPs of one trained token, averaged over the sequence."""
    experts = enumerate(moe.experts_per_layer(model.num_layers), start=1)
    layers = sum(layer_flops(model, moe, n, seq_length, model.window_of(layer)) for layer, n in experts)
    return logit_flops(model, vocab_size) + layers + mtp_flops(model, moe, seq_length, vocab_size)


def mtp_flops(model: ModelConfig, moe: MoEConfig, seq_length: int, vocab_size: int) -> float:
    """Of a token in multi-token prediction, forward and backward: projection, block and logits of each module."""
    if not model.mtp_num_layers:
        return 0.0
    last = model.num_layers
    block = layer_flops(model, moe, moe.experts_per_layer(last)[-1], seq_length, model.window_of(last))
    return model.mtp_num_layers * (3.0 * 2 * 2 * model.hidden_size**2 + block + logit_flops(model, vocab_size))


def logit_flops(model: ModelConfig, vocab_size: int) -> float:
    """Of a token, forward and backward, behind the last layer."""
    return 3.0 * 2 * model.hidden_size * model.padded_vocab_size(vocab_size)


def layer_flops(model: ModelConfig, moe: MoEConfig, num_experts: int, seq_length: int, window: int | None = None) -> float:
    """Of a token in one layer, forward and backward."""
    forward = 2 * attention_matrices(model) + score_flops(model, seq_length, window)
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


def _mtp_parameters(model: ModelConfig, moe: MoEConfig) -> int:
    if not model.mtp_num_layers:
        return 0
    block = _layer_counts(model, moe, moe.experts_per_layer(model.num_layers)[-1]).total
    return model.mtp_num_layers * (2 * model.hidden_size**2 + block + 3 * _norm_parameters(model))


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


def attention_matrices(model: ModelConfig) -> int:
    """Elements of the projections."""
    D, H = model.hidden_size, model.num_attention_heads
    out = H * model.v_width * D
    if not model.multi_latent_attention:
        return D * H * model.head_dim + 2 * D * model.key_value_heads * model.head_dim + out
    query = H * model.qk_width * (model.q_lora_rank or D) + D * (model.q_lora_rank or 0)
    return (
        query + D * (model.kv_lora_rank + model.qk_pos_emb_head_dim) + model.kv_lora_rank * H * (model.qk_head_dim + model.v_head_dim) + out
    )


def _attention_parameters(model: ModelConfig) -> int:
    """With biases, norms inside and sinks."""
    D, H = model.hidden_size, model.num_attention_heads
    norm = 2 if model.normalization == "LayerNorm" else 1
    total = attention_matrices(model) + (H if model.softmax_type == "learnable" else 0) + (D if model.add_bias_linear else 0)
    if model.multi_latent_attention:
        narrow, queries = model.q_lora_rank or 0, H * model.qk_width
        keys = model.kv_lora_rank + model.qk_pos_emb_head_dim + H * (model.qk_head_dim + model.v_head_dim)
        return total + norm * (narrow + model.kv_lora_rank) + (narrow + queries + keys if model.add_bias_linear else 0)
    queries, keys = H * model.head_dim, model.key_value_heads * model.head_dim
    if model.add_bias_linear or model.add_qkv_bias:
        total += queries + 2 * keys
    if model.qk_layernorm:
        total += norm * (2 * model.head_dim if model.qk_layernorm_scope == "head" else queries + keys)
    return total


def score_flops(model: ModelConfig, seq_length: int, window: int | None = None) -> float:
    """Forward, of a token, over the mean of what it sees: scores, and values weighted by them."""
    reach = min(window or seq_length, seq_length)
    seen = reach - reach * reach / (2 * seq_length)  # the first tokens see less; half the sequence without a window
    return 2 * model.num_attention_heads * (model.qk_width + model.v_width) * seen


def _mlp_matrices(model: ModelConfig, hidden: int | None = None, width: int | None = None) -> int:
    """fc1, fc2, and fc_gate, of the dense MLP's widths if no others are given."""
    return (3 if model.activation == "swiglu" else 2) * (hidden or model.hidden_size) * (width or model.ffn_size)


def _mlp_parameters(model: ModelConfig, hidden: int | None = None, width: int | None = None) -> int:
    biases = (2 if model.activation == "swiglu" else 1) * (width or model.ffn_size) + (hidden or model.hidden_size)
    return _mlp_matrices(model, hidden, width) + (biases if model.add_bias_linear else 0)


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
