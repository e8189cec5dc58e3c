"""The commands that people have: those of the upstream MoE examples with their DeepSpeed JSON, and those of tutorials.

Written anew from what the commands say, with short paths: what matters is which flags they give, and with which values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One launch line, its JSON, and the number of ranks it is for."""

    line: str
    ranks: int
    json: dict[str, Any] = field(default_factory=dict)  # empty: the line names none

    @property
    def flags(self) -> list[str]:
        """What stands behind the program."""
        import shlex

        words = shlex.split(self.line)
        return words[next(i for i, w in enumerate(words) if w.endswith(".py")) + 1 :]


def ds_json(batch: int, micro: int, stage: int) -> dict[str, Any]:
    """The template of the upstream examples, filled in."""
    return {
        "train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, "steps_per_print": 10,
        "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0, "prescale_gradients": stage == 0,
        "fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 11},
        "bf16": {"enabled": False},
        "curriculum_learning": {
            "enabled": False, "curriculum_type": "seqlen", "min_difficulty": 80, "max_difficulty": 2048, "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 110138, "difficulty_step": 8},
        },
        "wall_clock_breakdown": False,
    }  # fmt: skip


PILE = "/data/pile_text_document"
BLEND = "0.14336 /data/books 0.08962 /data/news 0.19336 /data/web 0.57366 /data/code"


def example(
    layers: int, hidden: int, heads: int, batch: int, micro: int, lr: str, min_lr: str, experts: str = "1", ep: int = 1, tp: int = 1,
    stage: int = 0, std: str = "0.014", length: str = "", ramp: str = "", residual: bool = False, teacher: str = "", data: str = PILE,
    ranks: int = 64,
) -> Launch:  # fmt: skip
    """A command of the MoE examples. `teacher`: the expert counts of the teacher of MoS."""
    is_moe = experts != "1"
    distill = (
        f"--mos --kd-beta-ce 1 --num-layers-teacher 24 --num-experts-teacher {teacher} --hidden-size-teacher {hidden} "
        f"--num-attention-heads-teacher {heads} --load-teacher out/teacher/ "
    )
    line = (
        "deepspeed ./pretrain_gpt.py --override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 "
        f"--tensor-model-parallel-size {tp} --moe-expert-parallel-size {ep} --num-experts {experts} --moe-loss-coeff 0.01 "
        f"{'--mlp-type residual ' if residual else ''}"
        "--moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        f"--init-method-std {std} --lr-decay-tokens {300 if is_moe else 260}000000000 --lr-warmup-tokens 375000000 "
        f"--micro-batch-size {micro} --exit-duration-in-mins 30000000 {ramp}--global-batch-size {batch} --num-layers {layers} "
        f"--hidden-size {hidden} --num-attention-heads {heads} --seq-length 2048 --max-position-embeddings 2048 "
        f"--train-tokens 300000000000 {length or '--train-samples 439453125'} --lr {lr} --min-lr {min_lr} --lr-decay-style cosine "
        f"--split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval {10000 if is_moe else 1000} "
        "--weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load out/run --save out/run "
        f"{distill if teacher else ''}"
        "--tensorboard-queue-size 1 --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard "
        f"--tensorboard-dir out/tensorboard --checkpoint-activations {'--create-moe-param-group ' if is_moe else ''}"
        f"--vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-path {data} --data-impl mmap "
        "--deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        f"{'--no-pipeline-parallel ' if is_moe else ''}--deepspeed-activation-checkpointing"
    )
    return Launch(line, ranks, ds_json(batch, micro, stage))


SHORT, LONG = "--train-iters 858306", "--train-iters 1716613"
PYRAMID_350M, PYRAMID_1B = "32 32 32 32 32 32 32 32 32 32 64 64", "64 64 64 64 64 64 64 64 64 64 128 128"

EXAMPLES = {
    "gpt-125m-moe-64": example(12, 768, 12, 256, 4, "4.5e-4", "4.5e-06", "64", 64, length=LONG),
    "gpt-350m": example(24, 1024, 16, 256, 4, "3.0e-4", "3.0e-5"),
    "gpt-350m-moe-128": example(24, 1024, 16, 256, 4, "2.0e-4", "2e-06", "128", 64, length=LONG),
    "gpt-350m-pr-moe-32-64": example(24, 1024, 16, 256, 4, "3.0e-4", "1.0e-06", PYRAMID_350M, 64, length=LONG, residual=True),
    "gpt-350m-pr-moe-32-64-mos": example(21, 1024, 16, 256, 4, "3.0e-4", "1.0e-06", "32 32 32 32 32 32 32 32 64 64", 64, length=LONG,
                                     residual=True, teacher=PYRAMID_350M, data=BLEND),
    "gpt-1.3b": example(24, 2048, 16, 512, 2, "2.0e-4", "2.0e-5", tp=4, ramp="--rampup-batch-size 32 32 1953125 "),
    "gpt-1.3b-moe-128": example(24, 2048, 16, 512, 8, "1.2e-4", "1.0e-6", "128", 64, length=SHORT),
    "gpt-1.3b-pr-moe-64-128": example(24, 2048, 16, 512, 8, "1.2e-4", "1.0e-6", PYRAMID_1B, 64, length=SHORT, residual=True, stage=2),
    "gpt-1.3b-pr-moe-64-128-mos": example(21, 2048, 16, 512, 4, "1.2e-4", "1.0e-6", "64 64 64 64 64 64 64 64 128 128", 128, length=SHORT,
                                      residual=True, stage=2, teacher=PYRAMID_1B, data=BLEND, ranks=128),
    "gpt-6.7b": example(32, 4096, 32, 1024, 4, "1.2e-4", "1.2e-5", tp=8, std="0.01", ramp="--rampup-batch-size 32 32 4882812 "),
}  # fmt: skip

_COMMON = "--moe-loss-coeff 0.01 --moe-train-capacity-factor 1.25 --moe-eval-capacity-factor 2.0"
TUTORIALS = {
    "experts-128": Launch(
        "deepspeed pretrain_gpt_moe.py --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --micro-batch-size 4 --global-batch-size 256 --train-iters 500000 --lr 0.0001 --min-lr 0.00001 "
        f"--lr-decay-style cosine --num-experts 128 --moe-expert-parallel-size 4 {_COMMON} --fp16 --deepspeed_config ds_config.json",
        8,
        {
            "train_batch_size": 256, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8,
            "optimizer": {"type": "Adam", "params": {"lr": 0.0001, "betas": [0.9, 0.999], "eps": 1e-8}},
            "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "fp16_master_weights_and_grads": False},
            "bf16": {"enabled": False}, "gradient_clipping": 1.0, "steps_per_print": 2000, "wall_clock_breakdown": False,
            "zero_optimization": {
                "stage": 2, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50000000,
                "reduce_bucket_size": "5e8", "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False,
                "offload_optimizer": {"device": "none", "pin_memory": True},
            },
        },
    ),
    "experts-8": Launch(
        "deepspeed --num_gpus 8 pretrain_moe.py --model-parallel-size 1 --num-layers 32 --hidden-size 4096 --num-attention-heads 32 "
        "--seq-length 2048 --max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 256 --train-iters 500000 "
        "--save-interval 5000 --eval-interval 1000 --eval-iters 100 --lr 0.0001 --min-lr 0.00001 --lr-decay-style cosine "
        f"--lr-warmup-iters 2000 --clip-grad 1.0 --weight-decay 0.1 --num-experts 8 --moe-expert-parallel-size 4 {_COMMON} "
        "--disable-moe-token-dropping --fp16 --deepspeed --deepspeed_config ds_config_moe.json --data-path /path/to/data "
        "--vocab-file /path/to/vocab.json --merge-file /path/to/merges.txt",
        8,
        {
            "train_batch_size": 256, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "fp16": {"enabled": True},
            "moe": {
                "enabled": True, "num_experts": 8, "expert_parallel_size": 4, "moe_loss_coeff": 0.01, "train_capacity_factor": 1.25,
                "eval_capacity_factor": 2.0, "min_capacity": 4, "drop_tokens": False, "use_residual": False, "use_tutel": False,
            },
        },
    ),
    "falling-pyramid": Launch(
        'deepspeed pretrain_gpt_moe.py --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --num-experts "[128, 64, 32, 16]" '
        "--mlp-type residual --moe-expert-parallel-size 4 --moe-loss-coeff 0.01 --fp16",
        4,
    ),
}  # fmt: skip

ALL = EXAMPLES | TUTORIALS
