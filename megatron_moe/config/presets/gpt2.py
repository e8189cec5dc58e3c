"""GPT-2 in its four sizes: layers, widths and dropout of the released checkpoints. How OpenAI trained them is not known in full; batch,
rate and length are those that reproductions use (nanoGPT's, 300 billion tokens)."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.presets.preset import Preset

_COMMON = {
    "seq_length": 1024, "max_position_embeddings": 1024, "activation_func": "gelu_tanh", "vocab_size": 50257, "hidden_dropout": 0.1,
    "attention_dropout": 0.1, "init_method_std": 0.02, "bf16": True, "micro_batch_size": 8, "global_batch_size": 512,
    "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0, "lr_decay_style": "cosine",
    "train_tokens": 300_000_000_000, "lr_decay_tokens": 300_000_000_000, "lr_warmup_tokens": 1_000_000_000, "split": "98,2,0",
    "log_interval": 10, "eval_interval": 1000, "eval_iters": 10,
}  # fmt: skip


def _size(layers: int, width: int, heads: int, lr: float, **more: Any) -> dict[str, Any]:
    return _COMMON | {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "lr": lr, "min_lr": lr / 10} | more


GPT2: dict[str, Preset] = {
    "gpt2-124m": Preset("GPT-2 small, dense", 8, _size(12, 768, 12, 6e-4)),
    "gpt2-355m": Preset("GPT-2 medium, dense", 8, _size(24, 1024, 16, 3e-4)),
    "gpt2-774m": Preset("GPT-2 large, dense", 16, _size(36, 1280, 20, 2.5e-4, micro_batch_size=4)),
    "gpt2-1.5b": Preset("GPT-2 XL, dense", 16, _size(48, 1600, 25, 2e-4, micro_batch_size=2, checkpoint_activations=True)),
}
