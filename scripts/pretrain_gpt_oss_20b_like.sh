#!/usr/bin/env bash
# The shape of gpt-oss-20b: 20.9 billion parameters, of which a token meets 4.2. Its clamped activation is plain SwiGLU here.
#
#   DRY_RUN=1 bash scripts/pretrain_gpt_oss_20b_like.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_gpt_oss_20b_like.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_gpt_oss_20b_like.sh --log-interval 1
#
# One preset (--preset gpt-oss-20b-like): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-query-groups 2 --kv-channels 16 --window-size 8 --num-experts 4 --moe-expert-parallel-size 2 --topk 2
preset gpt-oss-20b-like 64 "$@"
