#!/usr/bin/env bash
# GPT-2 large: 774 million parameters.
#
#   DRY_RUN=1 bash scripts/pretrain_gpt2_774m.sh    what it would train, as JSON, on any machine
#   SMOKE=1 bash scripts/pretrain_gpt2_774m.sh      the same shape in small, on a laptop, seconds
#   DATA_PATH=... bash scripts/pretrain_gpt2_774m.sh --log-interval 1
#
# One preset (--preset gpt2-774m): its settings are in docs/flags.md. Words behind the script are flags, and win. Variables:
# NUM_GPUS, DATA_PATH, VOCAB_FILE, MERGE_FILE, SAVE, SAVE_INTERVAL; on several nodes NNODES, NODE_RANK, MASTER_ADDR (docs/launching.md).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset gpt2-774m 16 "$@"
