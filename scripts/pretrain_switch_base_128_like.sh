#!/usr/bin/env bash
# Switch-Base as a decoder: 3.7 billion parameters, of which a token meets 110 million (arXiv 2101.03961).
#
#   DRY_RUN=1 bash scripts/pretrain_switch_base_128_like.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_switch_base_128_like.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_switch_base_128_like.sh --log-interval 1
#
# One preset (--preset switch-base-128-like): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, TOKENIZER, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TOKENIZER="${TOKENIZER:-data/tokenizer.json}"
small --num-experts 4 --moe-expert-parallel-size 2
preset switch-base-128-like 64 "$@"
