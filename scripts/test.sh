#!/usr/bin/env bash
# Formatting, lint, and the tests, in an environment that this script sets up. Needs no GPU and, once set up, no network.
#
#   bash scripts/test.sh                       the tests, with some layouts
#   bash scripts/test.sh --full                every other layout and the longest runs as well: what continuous integration runs
#   bash scripts/test.sh tests/data -k index   further words go to pytest; formatting and lint are checked all the same
#
# Ends with the counts. Exit code 1: something failed, or was skipped for a reason that tests/allowed_skips.txt does not list.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$REPO"
set_up

lint=0
say "ruff format --check"
"$PYTHON" -m ruff format --check . || lint=$?
say "ruff check"
"$PYTHON" -m ruff check . || lint=$?

# Two pytest processes, each with whole files: much of a test of several ranks is waiting, and the gloo workers are started once per
# process and kept (tests/distributed_pool.py).
say "pytest"
report=$(mktemp)
trap 'rm -f "$report"' EXIT
tests=0
"$PYTHON" -m pytest -n 2 --dist loadfile -ra --durations=15 --durations-min=1 --allowed-skips tests/allowed_skips.txt --junit-xml "$report" "$@" || tests=$?
case "$tests" in
  0 | 1) ;; # 1: failures, or skips that are not allowed; pytest has named them
  5) say "pytest found no test to run" ;;
  *) say "pytest ended with exit code $tests: see above" ;;
esac
if [ "$lint" -ne 0 ]; then say "ruff found something: see the top"; fi

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
[ "$lint" -eq 0 ] && [ "$tests" -eq 0 ] # the exit code
