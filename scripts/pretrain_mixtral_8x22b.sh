#!/usr/bin/env bash
# Mixtral 8x22B: 140.6 billion parameters, of which a token meets 39.2.
#
#   DRY_RUN=1 bash scripts/pretrain_mixtral_8x22b.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_mixtral_8x22b.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_mixtral_8x22b.sh --log-interval 1
#
# One preset (--preset mixtral-8x22b): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-query-groups 2 --num-experts 4 --moe-expert-parallel-size 2 --tensor-model-parallel-size 2 \
  --pipeline-model-parallel-size 1
preset mixtral-8x22b 128 "$@"
