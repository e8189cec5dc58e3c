#!/usr/bin/env bash
# Qwen3-235B-A22B: 235 billion parameters, of which a token meets 22 (arXiv 2505.09388).
#
#   DRY_RUN=1 bash scripts/pretrain_qwen3_235b_a22b.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_qwen3_235b_a22b.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_qwen3_235b_a22b.sh --log-interval 1
#
# One preset (--preset qwen3-235b-a22b): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-query-groups 2 --kv-channels 16 --num-experts 4 --moe-expert-parallel-size 2 --moe-ffn-hidden-size 32 \
  --topk 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1
preset qwen3-235b-a22b 256 "$@"
