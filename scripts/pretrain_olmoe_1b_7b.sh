#!/usr/bin/env bash
# OLMoE-1B-7B: 6.9 billion parameters, of which a token meets 1.3 (arXiv 2409.02060).
#
#   DRY_RUN=1 bash scripts/pretrain_olmoe_1b_7b.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_olmoe_1b_7b.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_olmoe_1b_7b.sh --log-interval 1
#
# One preset (--preset olmoe-1b-7b): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-experts 4 --moe-expert-parallel-size 2 --topk 2
preset olmoe-1b-7b 64 "$@"
