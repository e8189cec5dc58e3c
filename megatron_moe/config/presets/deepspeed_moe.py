"""The models of DeepSpeed-MoE (arXiv 2201.05596) with the hyper-parameters of the example scripts of Megatron-DeepSpeed.

The dense bases, the same with 64 or 128 experts in every second layer, the pyramid-residual ones and their students; dense models of the
other sizes of GPT-3 (arXiv 2005.14165, table 2.1). Where they are not the upstream recipe:

- bf16 instead of fp16: as wide, and it needs no loss scale. fp16 was what the GPUs of that time had.
- ZeRO stage 1 (the default) instead of 0 or 2: the same arithmetic, with the optimizer state spread over the ranks.
- the student of a distillation says for how long the teacher is asked (the paper: the first 400000 steps); upstream is restarted by hand.
"""

from __future__ import annotations

from megatron_moe.config.presets.preset import Preset

# A pyramid-residual model that a laptop trains in seconds: 4 layers, 4 then 8 experts.
TINY = {
    "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 128, "max_position_embeddings": 128,
    "num_experts": (4, 8), "mlp_type": "residual", "topk": 1, "moe_token_dropping": False, "moe_loss_coeff": 0.01,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 100,
    "lr": 3e-3, "min_lr": 3e-4, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.05, "weight_decay": 0.1, "adam_beta2": 0.95,
    "log_interval": 5, "eval_interval": 50, "eval_iters": 4, "num_workers": 0,
}  # fmt: skip

# What all published runs share: 300 billion tokens, a warm-up of 375 million.
PUBLISHED = {
    "seq_length": 2048, "max_position_embeddings": 2048, "init_method_std": 0.014, "bf16": True, "checkpoint_activations": True,
    "moe_loss_coeff": 0.01, "moe_train_capacity_factor": 1.0, "moe_eval_capacity_factor": 1.0, "moe_min_capacity": 4,
    "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0, "lr_decay_style": "cosine",
    "train_tokens": 300_000_000_000, "lr_decay_tokens": 300_000_000_000, "lr_warmup_tokens": 375_000_000,
    "split": "98,2,0", "log_interval": 10, "eval_interval": 100, "eval_iters": 10,
}  # fmt: skip
DENSE = PUBLISHED | {"lr_decay_tokens": 260_000_000_000}  # GPT-3's; the lowest rate is a tenth of the highest

GPT_125M = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "micro_batch_size": 4, "global_batch_size": 256}
GPT_350M = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "micro_batch_size": 4, "global_batch_size": 256}
GPT_1_3B = {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "global_batch_size": 512}
GPT_6_7B = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "micro_batch_size": 4, "global_batch_size": 1024}

DEEPSPEED_MOE: dict[str, Preset] = {
    "tiny": Preset("pyramid-residual, for a laptop", 1, TINY),
    "gpt-125m": Preset("dense", 64, DENSE | GPT_125M | {"lr": 6e-4, "min_lr": 6e-5}),
    "gpt-350m": Preset("dense", 64, DENSE | GPT_350M | {"lr": 3e-4, "min_lr": 3e-5}),
    "gpt-1.3b": Preset("dense", 64, DENSE | GPT_1_3B | {
        "micro_batch_size": 2, "tensor_model_parallel_size": 4, "rampup_batch_size": (32, 32, 1_953_125), "lr": 2e-4, "min_lr": 2e-5}),
    "gpt-6.7b": Preset("dense", 64, DENSE | GPT_6_7B | {
        "tensor_model_parallel_size": 8, "rampup_batch_size": (32, 32, 4_882_812), "init_method_std": 0.01, "lr": 1.2e-4, "min_lr": 1.2e-5}),
    "gpt-760m": Preset("dense", 64, DENSE | {
        "num_layers": 24, "hidden_size": 1536, "num_attention_heads": 16, "micro_batch_size": 4, "global_batch_size": 256, "lr": 2.5e-4,
        "min_lr": 2.5e-5}),
    "gpt-2.7b": Preset("dense", 64, DENSE | {
        "num_layers": 32, "hidden_size": 2560, "num_attention_heads": 32, "micro_batch_size": 2, "global_batch_size": 512,
        "tensor_model_parallel_size": 4, "lr": 1.6e-4, "min_lr": 1.6e-5}),
    "gpt-13b": Preset("dense", 64, DENSE | {
        "num_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "micro_batch_size": 2, "global_batch_size": 1024,
        "tensor_model_parallel_size": 8, "sequence_parallel": True, "init_method_std": 0.009, "lr": 1e-4, "min_lr": 1e-5}),
    "gpt-175b": Preset("dense", 512, DENSE | {
        "num_layers": 96, "hidden_size": 12288, "num_attention_heads": 96, "micro_batch_size": 1, "global_batch_size": 1536,
        "tensor_model_parallel_size": 8, "sequence_parallel": True, "pipeline_model_parallel_size": 8, "init_method_std": 0.006,
        "lr": 6e-5, "min_lr": 6e-6}),
    "gpt-125m-moe-64": Preset("64 experts in every second layer", 64, PUBLISHED | GPT_125M | {
        "num_experts": (64,), "moe_expert_parallel_size": 64, "lr": 4.5e-4, "min_lr": 4.5e-6}),
    "gpt-350m-moe-128": Preset("128 experts in every second layer", 64, PUBLISHED | GPT_350M | {
        "num_experts": (128,), "moe_expert_parallel_size": 64, "lr": 2e-4, "min_lr": 2e-6}),
    "gpt-1.3b-moe-128": Preset("128 experts in every second layer", 64, PUBLISHED | GPT_1_3B | {
        "num_experts": (128,), "moe_expert_parallel_size": 64, "micro_batch_size": 8, "lr": 1.2e-4, "min_lr": 1e-6}),
    "gpt-350m-pr-moe-32-64": Preset("pyramid-residual: 10 layers of 32 experts, 2 of 64", 64, PUBLISHED | GPT_350M | {
        "num_experts": (32,) * 10 + (64,) * 2, "mlp_type": "residual", "moe_expert_parallel_size": 64, "lr": 3e-4, "min_lr": 1e-6}),
    "gpt-350m-pr-moe-32-64-mos": Preset("the same with 21 layers, taught by it (Mixture-of-Students)", 64, PUBLISHED | GPT_350M | {
        "num_layers": 21, "num_experts": (32,) * 8 + (64,) * 2, "mlp_type": "residual", "moe_expert_parallel_size": 64, "lr": 3e-4,
        "min_lr": 1e-6, "mos": True, "kd_beta_ce": 1.0, "kd_stop_iters": 400_000, "num_layers_teacher": 24,
        "num_experts_teacher": (32,) * 10 + (64,) * 2, "hidden_size_teacher": 1024, "num_attention_heads_teacher": 16}),
    "gpt-1.3b-pr-moe-64-128": Preset("pyramid-residual: 10 layers of 64 experts, 2 of 128", 64, PUBLISHED | GPT_1_3B | {
        "num_experts": (64,) * 10 + (128,) * 2, "mlp_type": "residual", "moe_expert_parallel_size": 64, "micro_batch_size": 8,
        "lr": 1.2e-4, "min_lr": 1e-6}),
    "gpt-1.3b-pr-moe-64-128-mos": Preset("the same with 21 layers, taught by it (Mixture-of-Students)", 128, PUBLISHED | GPT_1_3B | {
        "num_layers": 21, "num_experts": (64,) * 8 + (128,) * 2, "mlp_type": "residual", "moe_expert_parallel_size": 128,
        "micro_batch_size": 4, "lr": 1.2e-4, "min_lr": 1e-6, "mos": True, "kd_beta_ce": 1.0, "kd_stop_iters": 400_000,
        "num_layers_teacher": 24, "num_experts_teacher": (64,) * 10 + (128,) * 2, "hidden_size_teacher": 2048,
        "num_attention_heads_teacher": 16}),
}  # fmt: skip
