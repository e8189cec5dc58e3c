#!/usr/bin/env bash
# GPT of 1.3 billion parameters: the dense base of 1.3B + MoE-128 and 1.3B + PR-MoE-64/128.
#
#   DRY_RUN=1 bash scripts/pretrain_gpt_1.3b.sh              what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_gpt_1.3b.sh                the same shape in small, 2 processes on a laptop, seconds
#   NUM_GPUS=8 DATA_PATH=... bash scripts/pretrain_gpt_1.3b.sh --log-interval 1
#
# Variables are taken from the environment where they are set; further words are flags, and win. On several nodes: NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT (docs/launching.md). Interrupted, it goes on from the last checkpoint in SAVE: just start it again.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# model
NUM_LAYERS="${NUM_LAYERS:-24}"
HIDDEN_SIZE="${HIDDEN_SIZE:-2048}"
NUM_ATTN_HEADS="${NUM_ATTN_HEADS:-16}"
SEQ_LEN="${SEQ_LEN:-2048}"
INIT_STD="${INIT_STD:-0.014}" # larger models want a smaller one

# ranks
NUM_GPUS="${NUM_GPUS:-64}" # of all nodes together
MP_SIZE="${MP_SIZE:-4}" # tensor parallel

# batches, length, learning rate
MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-2}" # sequences per data rank
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-512}"
RAMPUP="${RAMPUP:-32 32 1953125}" # the batch: from, by, over so many samples
TRAIN_TOKENS="${TRAIN_TOKENS:-300000000000}"
LR="${LR:-2.0e-4}"
MIN_LR="${MIN_LR:-2.0e-5}"
LR_DECAY_TOKENS="${LR_DECAY_TOKENS:-260000000000}"
WARMUP_TOKENS="${WARMUP_TOKENS:-375000000}"

# output, input
LOG_INTERVAL="${LOG_INTERVAL:-10}"
EVAL_INTERVAL="${EVAL_INTERVAL:-100}"
EVAL_ITERS="${EVAL_ITERS:-10}"
SAVE_INTERVAL="${SAVE_INTERVAL:-1000}"
SAVE="${SAVE:-runs/gpt-1.3b}"
DATA_PATH="${DATA_PATH:-data/pile_text_document}" # a prefix of tools/preprocess_data.py, or a blend: 0.7 a 0.3 b
VOCAB_FILE="${VOCAB_FILE:-data/gpt2-vocab.json}"
MERGE_FILE="${MERGE_FILE:-data/gpt2-merges.txt}"
# shellcheck disable=SC2206 # a blend is several words
DATA=(--data-path $DATA_PATH --split 98,2,0 --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")

smoke # nothing without SMOKE=1

# shellcheck disable=SC2086 # three words
pretrain \
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_ATTN_HEADS" \
  --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --init-method-std "$INIT_STD" \
  --tensor-model-parallel-size "$MP_SIZE" \
  --bf16 --checkpoint-activations \
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --rampup-batch-size $RAMPUP --train-tokens "$TRAIN_TOKENS" \
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-decay-tokens "$LR_DECAY_TOKENS" --lr-warmup-tokens "$WARMUP_TOKENS" \
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 \
  --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" \
  --save "$SAVE" --load "$SAVE" --save-interval "$SAVE_INTERVAL" \
  "${DATA[@]}" "$@"
