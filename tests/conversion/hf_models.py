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


# model_type -> (configuration class, its values)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", SHARED),
    "llama tied, biases, head_dim": ("LlamaConfig", SHARED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("MistralConfig", SHARED | {"sliding_window": None}),
    "gpt2": ("GPT2Config", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": None,
        "initializer_range": 0.2}),
    "mixtral": ("MixtralConfig", moe(num_local_experts=4, sliding_window=None)),
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
