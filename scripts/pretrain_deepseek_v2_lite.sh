#!/usr/bin/env bash
# DeepSeek-V2-Lite: 15.7 billion parameters, of which a token meets 2.7 (arXiv 2405.04434).
#
#   DRY_RUN=1 bash scripts/pretrain_deepseek_v2_lite.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_deepseek_v2_lite.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_deepseek_v2_lite.sh --log-interval 1
#
# One preset (--preset deepseek-v2-lite): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 --num-experts 4 \
  --moe-expert-parallel-size 2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --topk 2
preset deepseek-v2-lite 64 "$@"
