#!/usr/bin/env bash
# 1.3B + PR-MoE + MoS: a student of 21 layers learns from the PR-MoE-64/128 of 24 layers (DeepSpeed-MoE, arXiv 2201.05596, section 4.2).
# Train the teacher first, with pretrain_gpt_1.3b_pr_moe_64_128.sh; it is read from LOAD_TEACHER.
#
#   DRY_RUN=1 bash scripts/pretrain_gpt_1.3b_pr_moe_64_128_mos.sh          what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_gpt_1.3b_pr_moe_64_128_mos.sh            the same shape in small with its own teacher, on a laptop
#   NUM_GPUS=16 DATA_PATH=... bash scripts/pretrain_gpt_1.3b_pr_moe_64_128_mos.sh --log-interval 1
#
# Variables are taken from the environment where they are set; further words are flags, and win. On several nodes: NNODES, NODE_RANK,
# MASTER_ADDR, MASTER_PORT (docs/launching.md). Interrupted, it goes on from the last checkpoint in SAVE: just start it again.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# model
NUM_LAYERS="${NUM_LAYERS:-21}"
HIDDEN_SIZE="${HIDDEN_SIZE:-2048}"
NUM_ATTN_HEADS="${NUM_ATTN_HEADS:-16}"
SEQ_LEN="${SEQ_LEN:-2048}"
INIT_STD="${INIT_STD:-0.014}"

# experts
NUM_EXPERTS="${NUM_EXPERTS:-64 64 64 64 64 64 64 64 128 128}" # in layers 2, 4, ...: a pyramid has more of them in the last ones
MLP_TYPE="${MLP_TYPE:-residual}" # a dense MLP beside the experts
MLC="${MLC:-0.01}" # weight of the load-balancing loss
MOE_TRAIN_CAP_FACTOR="${MOE_TRAIN_CAP_FACTOR:-1.0}" # a larger one drops fewer tokens and costs throughput
MOE_EVAL_CAP_FACTOR="${MOE_EVAL_CAP_FACTOR:-1.0}"
MOE_MIN_CAP="${MOE_MIN_CAP:-4}"

# teacher
NUM_LAYERS_TEACHER="${NUM_LAYERS_TEACHER:-24}"
NUM_EXPERTS_TEACHER="${NUM_EXPERTS_TEACHER:-64 64 64 64 64 64 64 64 64 64 128 128}"
HIDDEN_SIZE_TEACHER="${HIDDEN_SIZE_TEACHER:-2048}"
NUM_ATTN_HEADS_TEACHER="${NUM_ATTN_HEADS_TEACHER:-16}"
LOAD_TEACHER="${LOAD_TEACHER:-runs/gpt-1.3b-pr-moe-64-128}"
KD_BETA_CE="${KD_BETA_CE:-1}" # weight of the distillation loss
KD_STOP_ITERS="${KD_STOP_ITERS:-400000}" # afterwards the language-model loss alone: a student has less room than its teacher

# ranks
NUM_GPUS="${NUM_GPUS:-128}" # of all nodes together
EP_SIZE="${EP_SIZE:-$((NUM_GPUS < 128 ? NUM_GPUS : 128))}" # expert parallel

# batches, length, learning rate
MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-4}" # sequences per data rank
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-512}"
TRAIN_TOKENS="${TRAIN_TOKENS:-300000000000}"
LR="${LR:-1.2e-4}"
MIN_LR="${MIN_LR:-1.0e-6}"
LR_DECAY_TOKENS="${LR_DECAY_TOKENS:-300000000000}"
WARMUP_TOKENS="${WARMUP_TOKENS:-375000000}"

# output, input
LOG_INTERVAL="${LOG_INTERVAL:-10}"
EVAL_INTERVAL="${EVAL_INTERVAL:-100}"
EVAL_ITERS="${EVAL_ITERS:-10}"
SAVE_INTERVAL="${SAVE_INTERVAL:-10000}"
SAVE="${SAVE:-runs/gpt-1.3b-pr-moe-64-128-mos}"
DATA_PATH="${DATA_PATH:-data/pile_text_document}" # a prefix of tools/preprocess_data.py, or a blend: 0.7 a 0.3 b
VOCAB_FILE="${VOCAB_FILE:-data/gpt2-vocab.json}"
MERGE_FILE="${MERGE_FILE:-data/gpt2-merges.txt}"
# shellcheck disable=SC2206 # a blend is several words
DATA=(--data-path $DATA_PATH --split 98,2,0 --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")

smoke # nothing without SMOKE=1
if [ "${SMOKE:-0}" = 1 ]; then
  NUM_LAYERS_TEACHER=6 NUM_EXPERTS_TEACHER="2 2 4" HIDDEN_SIZE_TEACHER="$HIDDEN_SIZE" NUM_ATTN_HEADS_TEACHER="$NUM_ATTN_HEADS"
  KD_STOP_ITERS=3 LOAD_TEACHER="$SAVE/teacher"
fi

recipe=( # what both models share
  --seq-length "$SEQ_LEN" --max-position-embeddings "$SEQ_LEN" --init-method-std "$INIT_STD"
  --mlp-type "$MLP_TYPE" --moe-loss-coeff "$MLC"
  --moe-train-capacity-factor "$MOE_TRAIN_CAP_FACTOR" --moe-eval-capacity-factor "$MOE_EVAL_CAP_FACTOR" --moe-min-capacity "$MOE_MIN_CAP"
  --moe-expert-parallel-size "$EP_SIZE"
  --bf16 --checkpoint-activations
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-tokens "$TRAIN_TOKENS"
  --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-decay-tokens "$LR_DECAY_TOKENS" --lr-warmup-tokens "$WARMUP_TOKENS"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
  --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
  --save-interval "$SAVE_INTERVAL"
  "${DATA[@]}"
)

if [ "${SMOKE:-0}" = 1 ] && [ "${DRY_RUN:-0}" != 1 ]; then
  say "SMOKE=1: the teacher first" >&2
  pretrain "${recipe[@]}" --num-layers "$NUM_LAYERS_TEACHER" --num-experts "$NUM_EXPERTS_TEACHER" --hidden-size "$HIDDEN_SIZE_TEACHER" \
    --num-attention-heads "$NUM_ATTN_HEADS_TEACHER" --save "$LOAD_TEACHER"
fi

pretrain "${recipe[@]}" \
  --num-layers "$NUM_LAYERS" --num-experts "$NUM_EXPERTS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_ATTN_HEADS" \
  --mos --kd-beta-ce "$KD_BETA_CE" --kd-stop-iters "$KD_STOP_ITERS" --load-teacher "$LOAD_TEACHER" \
  --num-layers-teacher "$NUM_LAYERS_TEACHER" --num-experts-teacher "$NUM_EXPERTS_TEACHER" \
  --hidden-size-teacher "$HIDDEN_SIZE_TEACHER" --num-attention-heads-teacher "$NUM_ATTN_HEADS_TEACHER" \
  --save "$SAVE" --load "$SAVE" "$@"
