"""A run whose settings come from a DeepSpeed JSON is the run of the same flags."""

import json

import torch
from distributed_pool import run_distributed

from training import runs


def test_a_json_trains_as_its_flags_do(tmp_path):
    """ZeRO 2, bf16, clipping, accumulation, Adam and experts, bit for bit."""
    content = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.3,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}, "steps_per_print": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.9], "weight_decay": 0.1}},
        "moe": {"expert_parallel_size": 2, "moe_loss_coeff": 0.05, "drop_tokens": False},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = (
        "--global-batch-size 8 --gradient-accumulation-steps 2 --clip-grad 0.3 --bf16 --zero-stage 2 --adam-beta1 0.8 --adam-beta2 0.9 "
        "--weight-decay 0.1 --moe-expert-parallel-size 2 --moe-loss-coeff 0.05 --disable-moe-token-dropping"
    )
    run = "--mock-data --vocab-size 64 --num-experts 2 2 4 --train-iters 3 --eval-iters 0"
    of_flags = run_distributed(runs.train_here, 2, f"{run} {flags}")[0]
    of_json = run_distributed(runs.train_here, 2, f"{run} --global-batch-size 8 --deepspeed --deepspeed_config {tmp_path / 'ds.json'}")[0]
    assert of_json["progress"] == of_flags["progress"]
    assert of_json["tensors"].keys() == of_flags["tensors"].keys()
    assert all(torch.equal(of_json["tensors"][name], of_flags["tensors"][name]) for name in of_flags["tensors"])
