#!/usr/bin/env bash
# GLaM 64B/64E: 1.15 trillion parameters, of which a token meets 88 billion (arXiv 2112.06905).
#
#   DRY_RUN=1 bash scripts/pretrain_glam_64b_64e_like.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_glam_64b_64e_like.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_glam_64b_64e_like.sh --log-interval 1
#
# One preset (--preset glam-64b-64e-like): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --kv-channels 16 --num-experts 4 --moe-expert-parallel-size 2 --tensor-model-parallel-size 2 \
  --pipeline-model-parallel-size 1
preset glam-64b-64e-like 1024 "$@"
