#!/usr/bin/env bash
# Mixtral 8x7B: 46.7 billion parameters, of which a token meets 12.9 (arXiv 2401.04088).
#
#   DRY_RUN=1 bash scripts/pretrain_mixtral_8x7b.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_mixtral_8x7b.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_mixtral_8x7b.sh --log-interval 1
#
# One preset (--preset mixtral-8x7b): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-query-groups 2 --num-experts 4 --moe-expert-parallel-size 2 --tensor-model-parallel-size 2
preset mixtral-8x7b 64 "$@"
