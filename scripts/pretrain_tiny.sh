#!/usr/bin/env bash
# A pyramid-residual model for a laptop: 2.5 million parameters, two processes, made-up tokens, about a minute. The script to start from
# for a model of your own.
#
#   DRY_RUN=1 bash scripts/pretrain_tiny.sh        what it would train, as JSON
#   SMOKE=1 bash scripts/pretrain_tiny.sh          the same shape in small, seconds
#   bash scripts/pretrain_tiny.sh --lr 1e-3
#
# Variables are taken from the environment where they are set; further words are flags, and win.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# model
NUM_LAYERS="${NUM_LAYERS:-4}"
HIDDEN_SIZE="${HIDDEN_SIZE:-128}"
NUM_ATTN_HEADS="${NUM_ATTN_HEADS:-4}"
SEQ_LEN="${SEQ_LEN:-128}"

# experts
NUM_EXPERTS="${NUM_EXPERTS:-4 8}" # in layers 2 and 4
MLC="${MLC:-0.01}"                # weight of the load-balancing loss

# ranks
NUM_GPUS="${NUM_GPUS:-2}" # or CPU cores
EP_SIZE="${EP_SIZE:-$NUM_GPUS}"
ON_CPU="${ON_CPU:-1}"

# batches, length, learning rate
MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-4}"
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-8}"
TRAIN_TOKENS="${TRAIN_TOKENS:-102400}" # 100 steps
LR="${LR:-3e-3}"
MIN_LR="${MIN_LR:-3e-4}"

# output, input
LOG_INTERVAL="${LOG_INTERVAL:-5}"
EVAL_INTERVAL="${EVAL_INTERVAL:-50}"
EVAL_ITERS="${EVAL_ITERS:-4}"
SAVE="${SAVE:-runs/tiny}"
DATA=(--mock-data)

smoke # nothing without SMOKE=1

pretrain \
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_ATTN_HEADS" \
  --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --hidden-dropout 0 --attention-dropout 0 \
  --num-experts "$NUM_EXPERTS" --mlp-type residual --topk 1 --disable-moe-token-dropping --moe-loss-coeff "$MLC" \
  --moe-expert-parallel-size "$EP_SIZE" \
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-tokens "$TRAIN_TOKENS" \
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95 --weight-decay 0.1 \
  --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" \
  --save "$SAVE" --load "$SAVE" --num-workers 0 \
  "${DATA[@]}" "$@"
