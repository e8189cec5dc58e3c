"""What of a model Megatron-DeepSpeed's has nothing like: what of that can be left out, and what cannot.

A setting that is not named anywhere here and is not at its default cannot be left out: a new one is refused until somebody has thought
of it. Example: a model with a window and a relu is refused for the relu; with gelu in its place --allow-lossy writes it without the window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig

# Fields that its model has, or that only training and the kernels look at.
EXPRESSIBLE = {
    ModelConfig: {
        "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "kv_channels", "ffn_hidden_size", "max_position_embeddings",
        "position_embedding_type", "use_rotary_position_embeddings", "rotary_base", "rotary_percent", "normalization", "layernorm_epsilon", "activation_func",
        "swiglu", "squared_relu", "add_bias_linear", "untie_embeddings_and_output_weights", "hidden_dropout", "attention_dropout",
        "init_method_std", "make_vocab_size_divisible_by", "vocab_size",
    },
    MoEConfig: {
        "num_experts", "mlp_type", "topk", "expert_interval", "moe_expert_parallel_size", "moe_pyramid_ep", "moe_token_dropping",
        "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity", "moe_rts", "moe_top2_2nd_expert_sampling",
        "moe_noisy_gate_policy", "moe_loss_coeff",
        # of the training or of the kernels, not of the model
        "moe_seq_loss_coeff", "moe_global_loss_coeff", "moe_loss_warmup_iters", "moe_router_z_loss_coeff", "moe_token_dispatcher",
        "moe_node_size", "moe_fused_capacity", "moe_fused_capacity_factor", "moe_overlap_chunks", "moe_pad_expert_input_to_capacity", "moe_identical_expert_init", "moe_token_drop_policy",
        "moe_router_bias_update_rate",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A part of a model that can be left out: `switch` and the settings that belong to it go back to their defaults."""

    switch: str
    sentence: str
    details: tuple[str, ...] = ()


LOSSES = (
    Loss("mtp_num_layers", "the modules that predict further tokens", ("mtp_loss_scaling_factor",)),
    Loss("qk_layernorm", "the norms of queries and keys", ("qk_layernorm_scope",)),
    Loss("softmax_type", "the attention sinks: each softmax is over the tokens alone"),
    Loss("window_size", "the window: every token sees all before it", ("window_attn_skip_freq",)),
    Loss("rope_scaling_type", "the scaling of the rotary positions: they turn as --rotary-base alone says",
         ("rope_scaling_factor", "rope_original_max_position_embeddings", "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast",
          "rope_beta_slow", "rope_mscale", "rope_mscale_all_dim", "rope_yarn_truncate")),
    Loss("add_qkv_bias", "the bias vectors of queries, keys and values"),
    Loss("moe_router_enable_expert_bias", "the bias of the experts: tokens are routed by their scores alone"),
    Loss("moe_router_topk_scaling_factor", "the factor of the gate weights"),
    Loss("moe_router_score_function", "the scores of the router: its gate weights are a softmax"),
    Loss("moe_router_num_groups", "the groups of experts: a token may send to all", ("moe_router_group_topk", "moe_router_group_best")),
    Loss("moe_residual_combine", "the dense MLP beside the experts: its own is weighed by coefficients", ("mlp_type",)),
    Loss("moe_shared_expert_intermediate_size", "the shared expert", ("moe_shared_expert_gate",)),
    Loss("moe_router_policy", "the policy of the router: each token takes its best experts, in training too", ("moe_router_sinkhorn_iterations",)),
)  # fmt: skip
NORMALISATION = ("moe_router_normalize", "moe_router_pre_softmax")
_AS_TOP_K = ("expert_choice", "sinkhorn")  # policies whose router knows the best experts of a token
_OF_OTHERS = {  # said by what they are settings of, or by a line of its own
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "moe_router_hash_seed", "moe_router_zipf_exponent",
    "moe_ffn_hidden_size",
}  # fmt: skip
_WHY = {
    "multi_latent_attention": "its attention makes keys and values of the whole hidden vector, so the weights of the narrow one have no place",
    "moe_latent_size": "its experts read the whole hidden vector, so those of a narrower one have no place",
    "moe_first_k_dense_replace": "which of its layers have experts follows from --expert-interval alone",
    "rotary_interleaved": "it turns the first half of a head's channels with the second, and these queries and keys are made for neighbours",
    "moe_router_policy": "its tokens go where a trained router sends them, and here there is none",
}


def without_losses(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run as Megatron-DeepSpeed can hold it, and what that is without, a sentence each. ConfigError for what cannot be left out."""
    if obstacles := list(_obstacles(run)):
        why = "--to megatron-deepspeed: its model cannot be this one, not even with --allow-lossy"
        raise ConfigError([f"{why}: {obstacle}" for obstacle in obstacles])
    lost = [loss for loss in LOSSES if _is_there(run, loss)]
    sentences = [f"{loss.sentence} ({_said(run, loss.switch)})" for loss in lost]
    names = {name for loss in lost for name in (loss.switch, *loss.details)}
    if run.moe.has_experts and run.moe.normalize not in its_normalize(run.moe):
        here, there = run.moe.normalize, its_normalize(run.moe)[0]
        sentences.append(f"the normalisation of the gate weights: over {here} here, over {there} there (--moe-router-normalize)")
        names |= set(NORMALISATION)
    if run.model.add_bias_linear:
        names.add("add_qkv_bias")  # which all linears have anyway
    groups = {"model": _back_to_defaults(run.model, names), "moe": _back_to_defaults(run.moe, names)}
    return (dataclasses.replace(run, **groups), sentences) if names else (run, sentences)


def _back_to_defaults(config: Any, names: set[str]) -> Any:
    return dataclasses.replace(config, **{name: spec.default for name, spec in _specs(type(config)).items() if name in names})


def _specs(group: type) -> dict[str, Any]:
    return {spec.name: spec for spec in fields_of(group)}


def _is_there(run: RunConfig, loss: Loss) -> bool:
    is_of_model = loss.switch in _specs(ModelConfig)
    config = run.model if is_of_model else run.moe
    if not is_of_model and not run.moe.has_experts:
        return False
    if loss.switch == "add_qkv_bias" and run.model.add_bias_linear:
        return False
    return getattr(config, loss.switch) != _specs(type(config))[loss.switch].default


def _said(run: RunConfig, name: str) -> str:
    config = run.model if name in _specs(ModelConfig) else run.moe
    return f"{_specs(type(config))[name].option} {getattr(config, name)}"


def _obstacles(run: RunConfig) -> Iterator[str]:
    wide = run.moe.moe_ffn_hidden_size
    if run.model.activation == "relu":
        yield "--activation-func relu: its MLP has gelu, gelu_tanh, swiglu or squared_relu, and the weights are made for their own"
    if run.moe.has_experts and wide not in (None, run.model.ffn_size):
        yield f"--moe-ffn-hidden-size {wide}: its experts are as wide as the MLP ({run.model.ffn_size}), so these have no place"
    groups = (ModelConfig, MoEConfig) if run.moe.has_experts else (ModelConfig,)
    can_go = {name for loss in LOSSES for name in (loss.switch, *loss.details)} | set(NORMALISATION)
    if run.moe.moe_router_policy not in ("topk", *_AS_TOP_K):
        can_go.discard("moe_router_policy")
    for group in groups:
        config = run.model if group is ModelConfig else run.moe
        for name, spec in _specs(group).items():
            is_known = name in EXPRESSIBLE[group] | can_go | _OF_OTHERS or spec.option in run.model.idle
            if not is_known and getattr(config, name) != spec.default:
                yield f"{_said(run, name)}: {_WHY.get(name, 'it has nothing like it')}"


def its_normalize(moe: MoEConfig) -> list[str]:
    """Over what its gate renormalises. Where nothing is dropped, all that were chosen survive."""
    if moe.topk == 1:
        return ["none"]
    return ["survivors"] if moe.moe_token_dropping else ["survivors", "chosen"]
