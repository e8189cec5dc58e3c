"""Small models of transformers with weights that matter, saved as its users save them, and what compares them with ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB, LENGTH = 96, 24
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip


def moe(**changes) -> dict:
    return SHARED | {"num_experts_per_tok": 2} | changes


def deepseek(**changes) -> dict:
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}
    experts = {"n_routed_experts": 8, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6}
    return SHARED | latent | experts | changes


# model_type -> (configuration class, its values)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", SHARED),
    "llama tied, biases, head_dim": ("LlamaConfig", SHARED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("MistralConfig", SHARED | {"sliding_window": None}),
    "gpt2": ("GPT2Config", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": None,
        "initializer_range": 0.2}),
    "mixtral": ("MixtralConfig", moe(num_local_experts=4, sliding_window=None)),
    "llama with rope scaling llama3": ("LlamaConfig", SHARED | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "llama with rope scaling linear": ("LlamaConfig", SHARED | {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "qwen2": ("Qwen2Config", SHARED),
    "qwen3 with yarn": ("Qwen3Config", SHARED | {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral with a window": ("MistralConfig", SHARED | {"sliding_window": 9}),
    "mixtral with a window": ("MixtralConfig", moe(num_local_experts=4, sliding_window=9)),
    "qwen2_moe": ("Qwen2MoeConfig", moe(
        num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40, decoder_sparse_step=2, norm_topk_prob=True)),
    "qwen3_moe": ("Qwen3MoeConfig", moe(num_experts=8, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True, num_experts_per_tok=3)),
    "olmoe": ("OlmoeConfig", moe(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)),
    "deepseek_v2": ("DeepseekV2Config", deepseek(q_lora_rank=None, n_shared_experts=2, num_experts_per_tok=3, topk_method="greedy")),
    "deepseek_v2 with groups": ("DeepseekV2Config", deepseek(
        q_lora_rank=12, n_shared_experts=1, num_experts_per_tok=3, topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=16.0)),
    "deepseek_v3": ("DeepseekV3Config", deepseek(
        q_lora_rank=12, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        rope_parameters={"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1})),
    "qwen2_moe without bias": ("Qwen2MoeConfig", moe(
        num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40, qkv_bias=False, decoder_sparse_step=1)),
}  # fmt: skip


def build(transformers, kind: str):
    """A model in float32, its norms and biases not what they begin with."""
    name, values = MODELS[kind]
    config = getattr(transformers, name)(**values)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith("bias") or p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
        for key, b in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                b.copy_(0.3 * torch.randn_like(b))
    return model


def save(transformers, kind: str, directory: Path, dtype=torch.float32, **how):
    model = build(transformers, kind)
    model.to(dtype).save_pretrained(directory, **how)
    return model.float()


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by the library alone."""
    from safetensors.torch import load_file

    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def edit(path: Path, **changes) -> None:
    """Settings of a JSON; None takes one out."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))
