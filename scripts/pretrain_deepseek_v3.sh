#!/usr/bin/env bash
# DeepSeek-V3 (and R1): 671 billion parameters, of which a token meets 37 (arXiv 2412.19437).
#
#   DRY_RUN=1 bash scripts/pretrain_deepseek_v3.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_deepseek_v3.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_deepseek_v3.sh --log-interval 1
#
# One preset (--preset deepseek-v3): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 --num-experts 4 \
  --moe-expert-parallel-size 2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --topk 2 \
  --moe-router-num-groups 2 --moe-router-group-topk 1 --pipeline-model-parallel-size 1
preset deepseek-v3 2048 "$@"
