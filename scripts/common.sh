# shellcheck shell=bash
# Sourced by the other scripts: finds or makes the Python environment.
#
#   set_up     leaves the interpreter in $PYTHON, with everything of requirements.txt importable
#   launch     torchrun on this machine, listening on the loopback interface only; on several with NNODES
#   smoke      small sizes for a pretrain_*.sh script, when SMOKE=1
#   small      what SMOKE=1 changes in a script of one preset, beside the sizes
#   preset     the training command of a script of one preset
#   pretrain   the training command of a pretrain_*.sh script, or its plan with DRY_RUN=1
#
# The active virtual environment is used if there is one, else .venv in this repository; the system's Python is left as it is.
# A torch >= 2.11 that is already there is kept. When the requirements have not changed since the last time, nothing is run.
# This package itself is not installed: scripts, tools and tests run from the clone.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # per process; several processes share the cores
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # else workers that torchrun restarts read stale peer addresses
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds between a signal and kill -9: a save takes time
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '== %s\n' "$*"; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Whether "$1" starts and is a version that torch and the pins know. Version managers put commands on the PATH that do not start.
is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# torch as it is needed here: importable, 2.11 or newer.
has_torch() {
  "$1" -c '
import sys, torch
sys.exit(tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in torch.__version__.split(".")[:2]) < (2, 11))
' >/dev/null 2>&1
}

# Environment directory of the active environment, or nothing. conda counts, its base does not: that one is the system's.
active_environment() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    printf '%s' "$VIRTUAL_ENV"
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    printf '%s' "$CONDA_PREFIX"
  else # an environment that is first on the PATH without having been activated
    python3 -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "", end="")' 2>/dev/null || true
  fi
}

# A Python for a new environment: it must bring venv and ensurepip, which Debian ships apart. One that has torch comes first.
find_base_python() {
  local name first=""
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && is_supported_python "$name" && "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      if has_torch "$name"; then
        printf '%s' "$name"
        return
      fi
      first="${first:-$name}"
    fi
  done
  printf '%s' "$first"
}

make_environment() {
  local base
  base=$(find_base_python)
  [ -n "$base" ] || die "no Python 3.10 to 3.13 with its venv module was found; install one (Debian, Ubuntu: apt install python3-venv) or activate an environment"
  if has_torch "$base"; then
    say "making $1 from $("$base" --version), keeping its torch"
    "$base" -m venv --clear --system-site-packages "$1"
  else
    say "making $1 from $("$base" --version)"
    "$base" -m venv --clear "$1"
  fi
}

# The pins; Python 3.10 has a file of its own, because newer releases of some packages do without it.
requirements_file() {
  if "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))'; then
    printf '%s' "$REPO/requirements-py310.txt"
  else
    printf '%s' "$REPO/requirements.txt"
  fi
}

# What of requirements.txt is missing or has another version, one pin per line. A torch that is good enough is never missing.
missing_requirements() {
  local keep_torch=0
  if has_torch "$PYTHON"; then keep_torch=1; fi
  "$PYTHON" - "$1" "$keep_torch" <<'PYTHON_CODE'
import sys
from importlib.metadata import PackageNotFoundError, version

path, keep_torch = sys.argv[1], sys.argv[2] == "1"
for line in open(path, encoding="utf-8"):
    pin, _, marker = (part.strip() for part in line.partition("#")[0].partition(";"))
    name, _, wanted = pin.partition("==")
    if not pin or (name == "torch" and keep_torch):
        continue
    if marker:  # the only kind that requirements.txt has; a reader of all of them is not part of Python
        variable, _, platform = marker.partition(" == ")
        assert variable == "sys_platform", f"{path}: {marker}"
        if platform.strip("'\"") != sys.platform:
            continue
    try:
        have = version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
    except PackageNotFoundError:
        have = None
    if have != wanted:
        print(pin)
PYTHON_CODE
}

install() { # FILE of pins
  if "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1; then
    "$PYTHON" -m pip install -r "$1"
  elif command -v uv >/dev/null; then # environments of uv have no pip
    uv pip install --python "$PYTHON" -r "$1"
  else
    die "$PYTHON has neither pip nor ensurepip; install pip into it, or deactivate it and let this script make .venv"
  fi
}

set_up() {
  local environment stamp now pins missing
  environment=$(active_environment)
  if [ -z "$environment" ]; then
    environment="$REPO/.venv"
    is_supported_python "$environment/bin/python" || make_environment "$environment"
  fi
  PYTHON="$environment/bin/python"
  is_supported_python "$PYTHON" ||
    die "the active environment $environment has $("$PYTHON" --version 2>&1), but 3.10 to 3.13 is needed; deactivate it, and .venv will be made here"
  export PYTHON

  stamp="$environment/.megatron_moe_is_set_up"
  now="$("$PYTHON" --version) $(cat "$REPO"/requirements*.txt "$REPO/pyproject.toml" | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then
    return
  fi
  pins=$(requirements_file)
  missing=$(missing_requirements "$pins")
  if [ -n "$missing" ]; then
    say "to be installed into $environment with pip, downloading what is not cached:"
    printf '%s\n' "$missing" | sed 's/^/     /'
    case "$missing" in *torch==*)
      say "torch is by far the largest, gigabytes where it comes with CUDA; for a small one stop here, and first run"
      say "     '$PYTHON' -m pip install torch --index-url https://download.pytorch.org/whl/cpu"
      ;;
    esac
    local list
    list=$(mktemp)
    printf '%s\n' "$missing" >"$list"
    install "$list"
    rm -f "$list"
    missing=$(missing_requirements "$pins")
    [ -z "$missing" ] || die "still missing after the installation: ${missing//$'\n'/ }"
  fi
  printf '%s' "$now" >"$stamp" 2>/dev/null || true # an environment that cannot be written to is looked through every time
}

# torchrun --nproc-per-node $1 with the other arguments. Rendezvous is a file and addresses are 127.0.0.1: `--standalone` would open a
# port on every interface of the machine. With NNODES above 1 the nodes meet at MASTER_ADDR:MASTER_PORT instead.
launch() {
  local ranks="$1" meeting status=0
  shift
  if [ "${NNODES:-1}" -gt 1 ]; then
    launch_node "$ranks" "$@"
    return
  fi
  meeting=$(mktemp -d)
  "$PYTHON" -m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint "$meeting/store" --rdzv-conf store_type=file \
    --local-addr 127.0.0.1 --nproc-per-node "$ranks" "$@" || status=$?
  rm -rf "$meeting"
  return "$status"
}

# This node's part of a launch on NNODES nodes. The same command runs on each, with NODE_RANK 0 on the one that is MASTER_ADDR.
launch_node() {
  local ranks="$1" host=false
  shift
  [ -n "${MASTER_ADDR:-}" ] || die "NNODES is $NNODES: set MASTER_ADDR, the same on every node, to the name or address of the first"
  [ -n "${NODE_RANK:-}" ] || die "NNODES is $NNODES: set NODE_RANK, to 0 on the node that is MASTER_ADDR ($MASTER_ADDR), to 1, 2, ... on the others"
  if [ "$NODE_RANK" -eq 0 ]; then host=true; fi
  # read_timeout: how long the others wait for the first one
  "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --rdzv-id "${RDZV_ID:-megatron_moe}" --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-conf "is_host=$host,read_timeout=600" --nproc-per-node "$ranks" "$@"
}

# ---------------------------------------------------------------- what the pretrain_*.sh scripts share

# With SMOKE=1: sizes that a laptop trains in seconds on made-up tokens. What makes the recipe stays: experts, a pyramid, the
# residual branch, expert and tensor parallelism, precision, recomputation, schedule.
smoke() {
  if [ "${SMOKE:-0}" != 1 ]; then return; fi
  NUM_GPUS=1
  if [ "${MP_SIZE:-1}" -gt 1 ]; then MP_SIZE=2 NUM_GPUS=2; fi
  case "${NUM_EXPERTS:-1}" in
    1) ;;
    *\ *) NUM_EXPERTS="2 4" EP_SIZE=2 NUM_GPUS=2 ;;
    *) NUM_EXPERTS=4 EP_SIZE=2 NUM_GPUS=2 ;;
  esac
  NUM_LAYERS=4 HIDDEN_SIZE=64 NUM_ATTN_HEADS=4 SEQ_LEN=32 MICRO_BATCH_SIZE=1 GLOBAL_BATCH_SIZE=4
  TRAIN_TOKENS=640 LR_DECAY_TOKENS=640 WARMUP_TOKENS=128 # 5 steps
  if [ -n "${RAMPUP:-}" ]; then RAMPUP="2 2 4" TRAIN_TOKENS=512; fi # 2, 2, 4, 4, 4 sequences
  LOG_INTERVAL=1 EVAL_INTERVAL=1000 EVAL_ITERS=1
  DATA=(--mock-data)
  ON_CPU=1
  SAVE=$(mktemp -d)
  trap 'rm -rf "$SAVE"; say "SMOKE=1 keeps nothing: $SAVE is gone" >&2' EXIT
}

# pretrain_gpt_moe.py with these flags, on NUM_GPUS processes over NNODES nodes. DRY_RUN=1 prints the plan for them instead. With ON_CPU=1
# the processes leave GPUs alone.
pretrain() {
  local each have
  set_up >&2 # standard output belongs to the plan
  if [ "${DRY_RUN:-0}" = 1 ]; then
    "$PYTHON" "$REPO/pretrain_gpt_moe.py" --dry-run --dry-run-world-size "$NUM_GPUS" "$@"
    return
  fi
  [ $((NUM_GPUS % ${NNODES:-1})) -eq 0 ] || die "NUM_GPUS ($NUM_GPUS, of all nodes together) must be divisible by NNODES ($NNODES)"
  each=$((NUM_GPUS / ${NNODES:-1}))
  if [ "${ON_CPU:-0}" = 1 ]; then
    set -- --distributed-backend gloo "$@"
  else
    have=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$have" -ge "$each" ] || die "this machine has $have GPUs, and NUM_GPUS ($NUM_GPUS) / NNODES (${NNODES:-1}) asks for $each; change them, or \
start with SMOKE=1 (a small version, on CPUs), ON_CPU=1 (this one, on CPUs) or DRY_RUN=1 (what it would be)"
  fi
  launch "$each" "$REPO/pretrain_gpt_moe.py" "$@"
}

# ---------------------------------------------------------------- scripts that are one preset

SMALL=()

# Flags of SMOKE=1 beside the sizes that all such scripts share: experts, degrees, widths of parts that only some models have.
small() { SMALL=("$@"); }

# preset NAME RANKS WORD ...: trains the preset on NUM_GPUS (RANKS) processes; further words are flags, and win. The tokenizer is a
# tokenizer.json or a SentencePiece model where the script sets TOKENIZER, else GPT-2's two files.
preset() {
  local name="$1" smaller=() data
  NUM_GPUS="${NUM_GPUS:-$2}" # of all nodes together
  shift 2
  SAVE="${SAVE:-runs/$name}" SAVE_INTERVAL="${SAVE_INTERVAL:-1000}"
  # shellcheck disable=SC2206 # a blend is several words
  data=(--data-path ${DATA_PATH:-data/pile_text_document})
  if [ -n "${TOKENIZER:-}" ]; then
    data+=(--tokenizer-model "$TOKENIZER")
  else
    data+=(--vocab-file "${VOCAB_FILE:-data/gpt2-vocab.json}" --merge-file "${MERGE_FILE:-data/gpt2-merges.txt}")
  fi
  if [ "${SMOKE:-0}" = 1 ]; then
    smoke # a directory that goes away, and CPUs
    case " ${SMALL[*]:-} " in *parallel-size\ 2*) NUM_GPUS=2 ;; esac
    data=(--mock-data)
    smaller=(
      --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 96 --seq-length 32 --max-position-embeddings 32
      --vocab-size 300 --micro-batch-size 1 --global-batch-size 4 --train-tokens 640 --lr-decay-tokens 640 --lr-warmup-tokens 128
      --log-interval 1 --eval-interval 1000 --eval-iters 1 ${SMALL[@]+"${SMALL[@]}"}
    )
  fi
  pretrain --preset "$name" --save "$SAVE" --load "$SAVE" --save-interval "$SAVE_INTERVAL" "${data[@]}" ${smaller[@]+"${smaller[@]}"} "$@"
}
