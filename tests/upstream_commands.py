"""Command lines that people have, as they type them: the launcher and script left out, paths shortened.

UPSTREAM: what the MoE example scripts of Megatron-DeepSpeed start, by model. RANKS: on how many GPUs, where it is not 64.
TEXTS: commands that write-ups of DeepSpeed-MoE show.
"""

UPSTREAM = {
    "gpt-125m-moe-64": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 64 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens 375000000 --micro-batch-size 4 --exit-duration-in-mins "
        "30000000 --global-batch-size 256 --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 2048 "
        "--max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 1716613 --lr 4.5e-4 --min-lr 4.5e-06 --lr-decay-style "
        "cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000 --weight-decay 0.1 --clip-grad "
        "1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 --log-timers-to-tensorboard "
        "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard --checkpoint-activations "
        "--create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 --no-pipeline-parallel "
        "--deepspeed-activation-checkpointing"
    ),
    "gpt-350m-moe-128": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 128 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens 375000000 --micro-batch-size 4 --exit-duration-in-mins "
        "30000000 --global-batch-size 256 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 1716613 --lr 2.0e-4 --min-lr 2e-06 --lr-decay-style "
        "cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000 --weight-decay 0.1 --clip-grad "
        "1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 --log-timers-to-tensorboard "
        "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard --checkpoint-activations "
        "--create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 --no-pipeline-parallel "
        "--deepspeed-activation-checkpointing"
    ),
    "gpt-350m-pr-moe-32-64-mos": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 32 32 32 32 32 32 32 32 64 64 --moe-loss-coeff 0.01 --mlp-type residual --moe-train-capacity-factor 1.0 "
        "--moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens "
        "375000000 --micro-batch-size 4 --exit-duration-in-mins 30000000 --global-batch-size 256 --num-layers 21 --hidden-size 1024 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 1716613 --lr "
        "3.0e-4 --min-lr 1.0e-06 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 "
        "--save-interval 10000 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --mos "
        "--kd-beta-ce 1 --num-layers-teacher 24 --num-experts-teacher 32 32 32 32 32 32 32 32 32 32 64 64 --hidden-size-teacher 1024 "
        "--num-attention-heads-teacher 16 --load-teacher teacher --tensorboard-queue-size 1 --log-timers-to-tensorboard "
        "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard --checkpoint-activations "
        "--create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path 0.14336 data/part1 "
        "0.08962 data/part2 0.19336 data/part3 0.05689 data/part4 0.00859 data/part5 0.02897 data/part6 0.04771 data/part7 0.00873 "
        "data/part8 0.01007 data/part9 0.00208 data/part10 0.13017 data/part11 0.09446 data/part12 0.15652 data/part13 0.01359 "
        "data/part14 0.01588 data/part15 --data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        "--no-pipeline-parallel --deepspeed-activation-checkpointing"
    ),
    "gpt-350m-pr-moe-32-64": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 32 32 32 32 32 32 32 32 32 32 64 64 --moe-loss-coeff 0.01 --mlp-type residual --moe-train-capacity-factor 1.0 "
        "--moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens "
        "375000000 --micro-batch-size 4 --exit-duration-in-mins 30000000 --global-batch-size 256 --num-layers 24 --hidden-size 1024 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 1716613 --lr "
        "3.0e-4 --min-lr 1.0e-06 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 "
        "--save-interval 10000 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run "
        "--tensorboard-queue-size 1 --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--tensorboard-dir tensorboard --checkpoint-activations --create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file "
        "data/gpt2-merges.txt --data-path data/pile_text_document --data-impl mmap --deepspeed --deepspeed_config ds_config.json "
        "--pipeline-model-parallel-size 1 --no-pipeline-parallel --deepspeed-activation-checkpointing"
    ),
    "gpt-350m": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 1 "
        "--num-experts 1 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.014 --lr-decay-tokens 260000000000 --lr-warmup-tokens 375000000 --micro-batch-size 4 --exit-duration-in-mins "
        "30000000 --global-batch-size 256 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --train-tokens 300000000000 --train-samples 439453125 --lr 3.0e-4 --min-lr 3.0e-5 "
        "--lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 1000 --weight-decay "
        "0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 "
        "--log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard "
        "--checkpoint-activations --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        "--deepspeed-activation-checkpointing"
    ),
    "gpt-1.3b-moe-128": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 128 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens 375000000 --micro-batch-size 8 --exit-duration-in-mins "
        "30000000 --global-batch-size 512 --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 "
        "--max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 858306 --lr 1.2e-4 --min-lr 1.0e-6 --lr-decay-style "
        "cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000 --weight-decay 0.1 --clip-grad "
        "1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 --log-timers-to-tensorboard "
        "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard --checkpoint-activations "
        "--create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 --no-pipeline-parallel "
        "--deepspeed-activation-checkpointing"
    ),
    "gpt-1.3b-pr-moe-64-128-mos": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 128 "
        "--num-experts 64 64 64 64 64 64 64 64 128 128 --moe-loss-coeff 0.01 --mlp-type residual --moe-train-capacity-factor 1.0 "
        "--moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens "
        "375000000 --micro-batch-size 4 --exit-duration-in-mins 30000000 --global-batch-size 512 --num-layers 21 --hidden-size 2048 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 858306 --lr "
        "1.2e-4 --min-lr 1.0e-6 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 "
        "--save-interval 10000 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --mos "
        "--kd-beta-ce 1 --num-layers-teacher 24 --num-experts-teacher 64 64 64 64 64 64 64 64 64 64 128 128 --hidden-size-teacher 2048 "
        "--num-attention-heads-teacher 16 --load-teacher teacher --tensorboard-queue-size 1 --log-timers-to-tensorboard "
        "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard --checkpoint-activations "
        "--create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path 0.14336 data/part1 "
        "0.08962 data/part2 0.19336 data/part3 0.05689 data/part4 0.00859 data/part5 0.02897 data/part6 0.04771 data/part7 0.00873 "
        "data/part8 0.01007 data/part9 0.00208 data/part10 0.13017 data/part11 0.09446 data/part12 0.15652 data/part13 0.01359 "
        "data/part14 0.01588 data/part15 --data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        "--no-pipeline-parallel --deepspeed-activation-checkpointing"
    ),
    "gpt-1.3b-pr-moe-64-128": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 1 --moe-expert-parallel-size 64 "
        "--num-experts 64 64 64 64 64 64 64 64 64 64 128 128 --moe-loss-coeff 0.01 --mlp-type residual --moe-train-capacity-factor 1.0 "
        "--moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --init-method-std 0.014 --lr-decay-tokens 300000000000 --lr-warmup-tokens "
        "375000000 --micro-batch-size 8 --exit-duration-in-mins 30000000 --global-batch-size 512 --num-layers 24 --hidden-size 2048 "
        "--num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-iters 858306 --lr "
        "1.2e-4 --min-lr 1.0e-6 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 "
        "--save-interval 10000 --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run "
        "--tensorboard-queue-size 1 --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--tensorboard-dir tensorboard --checkpoint-activations --create-moe-param-group --vocab-file data/gpt2-vocab.json --merge-file "
        "data/gpt2-merges.txt --data-path data/pile_text_document --data-impl mmap --deepspeed --deepspeed_config ds_config.json "
        "--pipeline-model-parallel-size 1 --no-pipeline-parallel --deepspeed-activation-checkpointing"
    ),
    "gpt-1.3b": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 4 --moe-expert-parallel-size 1 "
        "--num-experts 1 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.014 --lr-decay-tokens 260000000000 --lr-warmup-tokens 375000000 --micro-batch-size 2 --exit-duration-in-mins "
        "30000000 --rampup-batch-size 32 32 1953125 --global-batch-size 512 --num-layers 24 --hidden-size 2048 --num-attention-heads 16 "
        "--seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-samples 439453125 --lr 2.0e-4 --min-lr "
        "2.0e-5 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 1000 "
        "--weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 "
        "--log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard "
        "--checkpoint-activations --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        "--deepspeed-activation-checkpointing"
    ),
    "gpt-6.7b": (
        "--override-opt_param-scheduler --adam-beta1 0.9 --adam-beta2 0.95 --tensor-model-parallel-size 8 --moe-expert-parallel-size 1 "
        "--num-experts 1 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 "
        "--init-method-std 0.01 --lr-decay-tokens 260000000000 --lr-warmup-tokens 375000000 --micro-batch-size 4 --exit-duration-in-mins "
        "30000000 --rampup-batch-size 32 32 4882812 --global-batch-size 1024 --num-layers 32 --hidden-size 4096 --num-attention-heads 32 "
        "--seq-length 2048 --max-position-embeddings 2048 --train-tokens 300000000000 --train-samples 439453125 --lr 1.2e-4 --min-lr "
        "1.2e-5 --lr-decay-style cosine --split 98,2,0 --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 1000 "
        "--weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 --load run --save run --tensorboard-queue-size 1 "
        "--log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --tensorboard-dir tensorboard "
        "--checkpoint-activations --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt --data-path data/pile_text_document "
        "--data-impl mmap --deepspeed --deepspeed_config ds_config.json --pipeline-model-parallel-size 1 "
        "--deepspeed-activation-checkpointing"
    ),
}
RANKS = {"gpt-1.3b-pr-moe-64-128-mos": 128}
TEXTS = {
    "experts-128": (
        "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 "
        "--micro-batch-size 4 --global-batch-size 256 --train-iters 500000 --lr 0.0001 --min-lr 0.00001 --lr-decay-style cosine "
        "--num-experts 128 --moe-expert-parallel-size 4 --moe-loss-coeff 0.01 --moe-train-capacity-factor 1.25 "
        "--moe-eval-capacity-factor 2.0 --fp16 --deepspeed_config ds_config.json"
    ),
    "experts-8": (
        "--model-parallel-size 1 --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 2048 "
        "--max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 256 --train-iters 500000 --save-interval 5000 "
        "--eval-interval 1000 --eval-iters 100 --lr 0.0001 --min-lr 0.00001 --lr-decay-style cosine --lr-warmup-iters 2000 "
        "--clip-grad 1.0 --weight-decay 0.1 --num-experts 8 --moe-expert-parallel-size 4 --moe-loss-coeff 0.01 "
        "--moe-train-capacity-factor 1.25 --moe-eval-capacity-factor 2.0 --disable-moe-token-dropping --fp16 --deepspeed "
        "--deepspeed_config ds_config_moe.json --data-path /path/to/data --vocab-file /path/to/vocab.json --merge-file "
        "/path/to/merges.txt"
    ),
    "falling-pyramid": (
        "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --num-experts '[128, 64, 32, 16]' --mlp-type residual "
        "--moe-expert-parallel-size 4 --moe-loss-coeff 0.01 --fp16"
    ),
}
