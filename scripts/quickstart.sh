#!/usr/bin/env bash
# From text to a trained, evaluated, plotted and sampled Mixture-of-Experts GPT: about ten minutes on two CPU cores.
#
#   bash scripts/quickstart.sh                                    everything goes to runs/quickstart
#   QUICKSTART_ITERS=20 bash scripts/quickstart.sh                the same in about a minute, to see that it works
#   QUICKSTART_TEXT=~/notes RUN_DIR=runs/notes bash scripts/quickstart.sh      your own text or source files
#
# Steps whose output is there are skipped, and an interrupted training goes on from its last checkpoint: just run it again.
# GPUs are used when there are any; with a single one there is one process and therefore no expert parallelism.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ITERS="${QUICKSTART_ITERS:-600}"
case "$ITERS" in '' | 0* | *[!0-9]*) die "QUICKSTART_ITERS must be a whole number of at least 1, not '$ITERS'" ;; esac
# names that the user gave are meant from where the user is, and everything below runs in the repository
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac }
TEXT="${QUICKSTART_TEXT:+$(absolute "$QUICKSTART_TEXT")}"
RUN="${RUN_DIR:+$(absolute "$RUN_DIR")}"
cd "$REPO"
RUN="${RUN:-runs/quickstart}" # relative to the clone, for messages that are easy to read
DATA="$RUN/data"

set_up
START=$SECONDS

if [ ! -f "$DATA/corpus_text_document.idx" ]; then # written last of all
  mkdir -p "$DATA"
  if [ ! -f "$DATA/corpus.jsonl" ]; then
    say "1/6 text: ${TEXT:-the standard library of this Python}"
    if [ -n "$TEXT" ]; then
      "$PYTHON" tools/make_jsonl.py --input "$TEXT" --output "$DATA/corpus.jsonl"
    else
      "$PYTHON" tools/make_jsonl.py --output "$DATA/corpus.jsonl"
    fi
  fi
  if [ ! -f "$DATA/tokenizer.json" ]; then
    say "2/6 tokenizer: byte-level BPE with 8192 tokens"
    "$PYTHON" tools/train_tokenizer.py --input "$DATA/corpus.jsonl" --vocab-size 8192 --output "$DATA/tokenizer.json"
  fi
  say "3/6 dataset: tokens in a .bin file, documents in an .idx file"
  "$PYTHON" tools/preprocess_data.py --input "$DATA/corpus.jsonl" --tokenizer-model "$DATA/tokenizer.json" --append-eod --workers 2 \
    --output-prefix "$DATA/corpus"
fi

GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" -eq 1 ]; then RANKS=1; else RANKS=2; fi # NCCL takes one process per GPU; on CPUs the processes talk gloo
HALF=$(((ITERS + 1) / 2))
QUARTER=$(((ITERS + 3) / 4))

# A pyramid (4 experts in layer 2, 8 in layer 4) of residual experts (a dense MLP beside them), dropless, one expert per token.
# --load names the directory of --save: the first run starts there, later ones go on.
# Evaluation runs at the start, in the middle and at the end.
say "4/6 training: $ITERS steps of 2048 tokens on $RANKS process(es), experts split over them"
launch "$RANKS" pretrain_gpt_moe.py \
  --save "$RUN" --load "$RUN" --save-interval "$QUARTER" --keep-last 2 \
  --data-path "$DATA/corpus_text_document" --split 95,5,0 --tokenizer-model "$DATA/tokenizer.json" --num-workers 1 \
  --num-layers 4 --hidden-size 192 --num-attention-heads 6 --seq-length 128 --max-position-embeddings 128 \
  --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
  --hidden-dropout 0 --attention-dropout 0 \
  --num-experts 4 8 --mlp-type residual --topk 1 --disable-moe-token-dropping --moe-loss-coeff 0.01 \
  --moe-expert-parallel-size "$RANKS" \
  --micro-batch-size 8 --global-batch-size 16 --train-iters "$ITERS" \
  --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta2 0.95 \
  --log-interval "$((ITERS < 200 ? 5 : 20))" --eval-interval "$HALF" --eval-iters 10

say "5/6 plot"
"$PYTHON" tools/plot_run.py --run "$RUN"

say "6/6 sample: $RUN/sample.txt"
# beside, then renamed: an interrupted sample is no sample
"$PYTHON" tools/generate_text.py --load "$RUN" --prompt "def" "import os" "class" --max-new-tokens 80 --temperature 0.7 --top-p 0.9 \
  --seed 1 >"$RUN/sample.txt.tmp"
mv "$RUN/sample.txt.tmp" "$RUN/sample.txt"
cat "$RUN/sample.txt"

say "what came of it, after $((SECONDS - START)) s"
"$PYTHON" scripts/check_quickstart.py --run "$RUN"

case "$PYTHON" in "$REPO"/*) SHOWN="${PYTHON#"$REPO"/}" ;; *) SHOWN=python ;; esac
AGAIN="QUICKSTART_ITERS=$((ITERS * 2)) bash scripts/quickstart.sh        # trains on: twice as long"
if [ "$ITERS" -lt 600 ]; then AGAIN="bash scripts/quickstart.sh        # trains on, to 600 steps"; fi
if [ "$RUN" != runs/quickstart ]; then AGAIN="RUN_DIR=\"$RUN\" $AGAIN"; fi
cat <<END

Results are in $RUN:
  plot.png           loss, learning rate, gradient norm, load of every expert
  sample.txt         what the model writes
  metrics.jsonl      every logged number
  config.json        every setting
  iter_*/            checkpoints
  data/              text, tokenizer, dataset

Three commands to try next:
  $SHOWN tools/generate_text.py --load "$RUN" --prompt "for i in range(" --num-samples 3
  $AGAIN
  $SHOWN pretrain_gpt_moe.py --help        # every setting; docs/flags.md says more
END
