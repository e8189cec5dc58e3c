"""Named settings: `--preset NAME` sets these fields, everything on the command line overrides them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # A pyramid-residual model that a laptop trains in seconds: 4 layers, 4 then 8 experts.
    "tiny": {
        "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128, "max_position_embeddings": 128,
        "num_experts": (4, 8), "mlp_type": "residual", "topk": 1, "moe_token_dropping": False, "moe_loss_coeff": 0.01,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 100,
        "lr": 3e-3, "min_lr": 3e-4, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.05, "weight_decay": 0.1, "adam_beta2": 0.95,
        "log_interval": 5, "eval_interval": 50, "eval_iters": 4, "num_workers": 0,
    },
}  # fmt: skip
