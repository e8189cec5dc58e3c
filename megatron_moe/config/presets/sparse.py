"""Mixture-of-experts models that were published: the shapes of their configuration files, the hyper-parameters of their papers as far as
these say them, and degrees of parallelism that fit 80 GB devices.

- A name that ends in `-like` has the shape and not every part; what differs is said beside it.
- `max_position_embeddings` and YaRN are those of the released configuration; `seq_length` is what most of the training was done at.
- Multi-token prediction is no part of them: `--mtp-num-layers 1` adds DeepSeek-V3's module.
"""

from __future__ import annotations

from typing import Any

from megatron_moe.config.presets.preset import Preset

# Pre-norm with RMSNorm, rotary positions, SwiGLU, no biases, no dropout, experts in every layer, none dropped.
_MODERN = {
    "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "untie_embeddings_and_output_weights": True, "expert_interval": 1, "moe_token_dropping": False, "bf16": True,
    "moe_top2_2nd_expert_sampling": False, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1,
    "clip_grad": 1.0, "lr_decay_style": "cosine", "split": "98,2,0", "log_interval": 10, "eval_interval": 1000, "eval_iters": 10,
    "recompute_granularity": "selective", "micro_batch_size": 1,
}  # fmt: skip


def _length(tokens: int, lr: float, warmup: int = 8_000_000_000) -> dict[str, Any]:
    return {"train_tokens": tokens, "lr_decay_tokens": tokens, "lr_warmup_tokens": warmup, "lr": lr, "min_lr": lr / 10}


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


# Mixtral (arXiv 2401.04088). Mistral has not said how it was trained: rate, batch and length stand in.
_MIXTRAL = _MODERN | {
    "num_key_value_heads": 8, "num_experts": (8,), "topk": 2, "moe_router_normalize": "chosen", "rotary_base": 1e6, "layernorm_epsilon": 1e-5,
    "vocab_size": 32000, "moe_loss_coeff": 0.02, "seq_length": 4096, "global_batch_size": 1024, "moe_expert_parallel_size": 8,
} | _length(2_000_000_000_000, 3e-4)  # fmt: skip

# Qwen3 (arXiv 2505.09388): 36 trillion tokens in three stages; the balance loss is that of the global batch.
_QWEN3 = _MODERN | {
    "num_key_value_heads": 4, "kv_channels": 128, "qk_layernorm": True, "num_experts": (128,), "topk": 8, "moe_router_normalize": "chosen",
    "rotary_base": 1e6, "layernorm_epsilon": 1e-6, "vocab_size": 151936, "moe_loss_coeff": 0.0, "moe_global_loss_coeff": 1e-3,
    "seq_length": 4096, "max_position_embeddings": 40960, "global_batch_size": 2048, "moe_expert_parallel_size": 8,
} | _length(36_000_000_000_000, 4e-4)  # fmt: skip

# What DeepSeek-V2 and V3 share: latent attention, rotated neighbours, first layers dense, shared experts.
_DEEPSEEK = _MODERN | {
    "multi_latent_attention": True, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128,
    "rotary_interleaved": True, "rotary_base": 1e4, "rope_scaling_type": "yarn", "rope_scaling_factor": 40.0,
    "rope_original_max_position_embeddings": 4096, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0, "max_position_embeddings": 163840,
    "layernorm_epsilon": 1e-6, "init_method_std": 0.006, "seq_length": 4096,
}  # fmt: skip

# Switch Transformer (arXiv 2101.03961) and GLaM (arXiv 2112.06905): experts in every second layer, with a capacity.
_CAPACITY = _without(_MODERN, "swiglu", "moe_token_dropping", "expert_interval", "untie_embeddings_and_output_weights") | {
    "moe_loss_coeff": 0.01, "micro_batch_size": 4,
}  # fmt: skip

SPARSE: dict[str, Preset] = {
    "mixtral-8x7b": Preset("Mixtral 8x7B", 64, _MIXTRAL | {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14336, "max_position_embeddings": 32768,
        "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "mixtral-8x22b": Preset("Mixtral 8x22B", 128, _MIXTRAL | {
        "num_layers": 56, "hidden_size": 6144, "num_attention_heads": 48, "ffn_hidden_size": 16384, "max_position_embeddings": 65536,
        "tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 4, "moe_loss_coeff": 0.001}),
    "qwen3-30b-a3b": Preset("Qwen3 30B-A3B: 128 experts, norms of q and k", 64, _QWEN3 | {
        "num_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "ffn_hidden_size": 6144, "moe_ffn_hidden_size": 768}),
    "qwen3-235b-a22b": Preset("Qwen3 235B-A22B: 128 experts, norms of q and k", 256, _QWEN3 | {
        "num_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "ffn_hidden_size": 12288, "moe_ffn_hidden_size": 1536,
        "tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 4, "moe_expert_parallel_size": 16, "lr": 2e-4, "min_lr": 2e-5}),
    # arXiv 2409.02060: norms of q and k over all heads, gate weights as they are
    "olmoe-1b-7b": Preset("OLMoE 1B-7B: 64 experts, norms of q and k over all heads", 64, _MODERN | {
        "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 1024, "qk_layernorm": True,
        "qk_layernorm_scope": "hidden", "num_experts": (64,), "topk": 8, "moe_router_normalize": "none", "layernorm_epsilon": 1e-5,
        "vocab_size": 50304, "moe_loss_coeff": 0.01, "moe_router_z_loss_coeff": 1e-3, "seq_length": 4096, "max_position_embeddings": 4096,
        "micro_batch_size": 2, "global_batch_size": 1024, "moe_expert_parallel_size": 8,
    } | _length(5_000_000_000_000, 4e-4, 10_000_000_000)),
    # arXiv 2405.04434, appendix B
    "deepseek-v2-lite": Preset("DeepSeek-V2-Lite: latent attention, 64 + 2 experts", 64, _DEEPSEEK | {
        "num_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 10944, "moe_ffn_hidden_size": 1408,
        "moe_shared_expert_intermediate_size": 2816, "moe_first_k_dense_replace": 1, "num_experts": (64,), "topk": 6,
        "moe_router_normalize": "none", "rope_mscale": 0.707, "rope_mscale_all_dim": 0.707, "vocab_size": 102400, "moe_loss_coeff": 0.0,
        "moe_seq_loss_coeff": 1e-3, "global_batch_size": 4608, "moe_expert_parallel_size": 8,
    } | _length(5_700_000_000_000, 4.2e-4)),
    # arXiv 2412.19437, section 4.2. Balanced by a bias; a token sends to 4 of 8 groups of experts. R1 has the same shape.
    "deepseek-v3": Preset("DeepSeek-V3 and R1: latent attention, 256 + 1 experts", 2048, _DEEPSEEK | {
        "num_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "ffn_hidden_size": 18432,
        "moe_ffn_hidden_size": 2048, "moe_shared_expert_intermediate_size": 2048, "moe_first_k_dense_replace": 3, "num_experts": (256,),
        "topk": 8, "moe_router_score_function": "sigmoid", "moe_router_normalize": "chosen", "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 8, "moe_router_group_topk": 4, "moe_router_enable_expert_bias": True, "rope_mscale": 1.0,
        "rope_mscale_all_dim": 1.0, "vocab_size": 129280, "moe_loss_coeff": 0.0, "moe_seq_loss_coeff": 1e-4, "global_batch_size": 15360,
        "moe_expert_parallel_size": 64, "pipeline_model_parallel_size": 16,
    } | _length(14_800_000_000_000, 2.2e-4)),
    # The released model clamps its gated unit and scales its gate by 1.702, and its router has a bias of 32 numbers per layer; this has plain
    # SwiGLU and no such bias, so its weights cannot be taken over as they are.
    "gpt-oss-20b-like": Preset("shape of gpt-oss-20b with plain SwiGLU: windows, sinks, 32 experts", 64, _MODERN | {
        "num_layers": 24, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "kv_channels": 64, "ffn_hidden_size": 2880,
        "add_bias_linear": True, "window_size": 128, "window_attn_skip_freq": (2,), "softmax_type": "learnable", "num_experts": (32,),
        "topk": 4, "moe_router_normalize": "chosen", "rotary_base": 150000.0, "rope_scaling_type": "yarn", "rope_scaling_factor": 32.0,
        "rope_original_max_position_embeddings": 4096, "rope_yarn_truncate": False, "layernorm_epsilon": 1e-5, "vocab_size": 201088,
        "moe_loss_coeff": 0.01, "seq_length": 4096, "max_position_embeddings": 131072, "global_batch_size": 1024,
        "moe_expert_parallel_size": 8,
    } | _length(2_000_000_000_000, 3e-4)),
    # T5-Base's encoder widths as a decoder: the published model has both, and relative position biases
    "switch-base-128-like": Preset("Switch-Base as a decoder: 128 experts in every second layer, top-1", 64, _CAPACITY | {
        "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "ffn_hidden_size": 3072, "activation_func": "relu",
        "num_experts": (128,), "topk": 1, "moe_noisy_gate_policy": "Jitter", "moe_train_capacity_factor": 1.25,
        "moe_eval_capacity_factor": 2.0, "vocab_size": 32128, "layernorm_epsilon": 1e-6, "seq_length": 512, "max_position_embeddings": 512,
        "micro_batch_size": 32, "global_batch_size": 2048, "moe_expert_parallel_size": 64,
    } | _length(576_000_000_000, 6e-4, 10_000_000_000)),
    # 2 experts per token with a capacity of 2; rotary positions and plain GELU in place of relative biases and gated dense layers
    "glam-1.7b-64e-like": Preset("GLaM 1.7B/64E: 64 experts in every second layer, top-2", 64, _CAPACITY | {
        "num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "kv_channels": 128, "ffn_hidden_size": 8192, "num_experts": (64,),
        "topk": 2, "moe_train_capacity_factor": 1.0, "vocab_size": 256000, "seq_length": 1024, "max_position_embeddings": 1024,
        "global_batch_size": 1024, "moe_expert_parallel_size": 64,
    } | _length(600_000_000_000, 2e-4)),
    "glam-64b-64e-like": Preset("GLaM 64B/64E: 64 experts in every second layer, top-2", 1024, _CAPACITY | {
        "num_layers": 64, "hidden_size": 8192, "num_attention_heads": 128, "kv_channels": 128, "ffn_hidden_size": 32768,
        "num_experts": (64,), "topk": 2, "moe_train_capacity_factor": 1.0, "vocab_size": 256000, "seq_length": 1024,
        "max_position_embeddings": 1024, "micro_batch_size": 1, "global_batch_size": 1024, "moe_expert_parallel_size": 64,
        "tensor_model_parallel_size": 8, "sequence_parallel": True, "pipeline_model_parallel_size": 4,
    } | _length(600_000_000_000, 1e-4)),
}  # fmt: skip
