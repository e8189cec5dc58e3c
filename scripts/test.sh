#!/usr/bin/env bash
# Formatting, lint, and every test, in an environment that this script sets up. Needs no GPU and, once set up, no network.
#
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh tests/data -k index   further words go to pytest; formatting and lint are checked all the same
#
# Ends with the counts. Exit code 1: something failed, or was skipped for a reason that tests/allowed_skips.txt does not list.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"
set_up

status=0
say "ruff format --check"
"$PYTHON" -m ruff format --check . || status=1
say "ruff check"
"$PYTHON" -m ruff check . || status=1

# One pytest process: the gloo workers of the distributed tests are started once per process and kept (tests/distributed_pool.py).
say "pytest"
report=$(mktemp)
trap 'rm -f "$report"' EXIT
tests=0
"$PYTHON" -m pytest -ra --durations=15 --durations-min=1 --allowed-skips tests/allowed_skips.txt --junit-xml "$report" "$@" || tests=$?
if [ "$tests" -eq 5 ]; then say "pytest found no test to run"; fi
[ "$tests" -eq 0 ] || status=1
[ "$status" -eq "$tests" ] || say "ruff found something: see the top"

"$PYTHON" - "$report" <<'PYTHON_CODE'
import sys
import xml.etree.ElementTree as tree

try:
    suites = list(tree.parse(sys.argv[1]).iter("testsuite"))
except tree.ParseError:  # pytest ended before it could write
    suites = []
total, failures, errors, skipped = (sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
print(f"{total - failures - errors - skipped} passed, {failures + errors} failed, {skipped} skipped")
PYTHON_CODE
exit "$status"
