"""Skips fail the run unless their reason is on the list, and what --full adds: a real pytest over small files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from skip_policy import read_allowed

TESTS = Path(__file__).resolve().parent


def run_pytest(folder: Path, tests: str, allowed: str, *words: str) -> subprocess.CompletedProcess:
    for name in ("conftest.py", "skip_policy.py", "hypothesis_stand_in.py"):
        (folder / name).write_text((TESTS / name).read_text())
    (folder / "distributed_pool.py").write_text("def close_pools(): pass\n")
    (folder / "allowed.txt").write_text(allowed)
    (folder / "test_sample.py").write_text(tests)
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "--allowed-skips",
        "allowed.txt",
    ]
    return subprocess.run([*command, *words, "test_sample.py"], cwd=folder, capture_output=True, text=True, timeout=120)


SKIPS = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no llama here')\n"


def test_a_listed_reason_passes(tmp_path):
    done = run_pytest(tmp_path, SKIPS, "no (llama|alpaca) # neither is a dependency\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize(
    "tests",
    [
        SKIPS,
        "import pytest\npytest.skip('no llama here', allow_module_level=True)\n",
        "import pytest\ndef test_a(): pass\n@pytest.mark.skipif(True, reason='no llama here')\ndef test_b(): pass\n",
        "import pytest\ndef test_a(): pass\n@pytest.mark.xfail(reason='no llama here')\ndef test_b(): assert False\n",
    ],
    ids=["in a test", "whole file", "mark", "expected failure"],
)
@pytest.mark.parametrize("processes", [0, 2])
def test_an_unlisted_reason_fails_and_is_named(tmp_path, tests, processes):
    if processes:
        pytest.importorskip("xdist.plugin", reason="pytest-xdist is not installed")
    words = ("-n", str(processes), "--dist", "loadfile") if processes else ()
    done = run_pytest(tmp_path, tests, "no alpaca # not a dependency\n", *words)
    assert done.returncode != 0
    assert "test_sample.py" in done.stdout
    assert "no llama here" in done.stdout
    assert "not allowed" in done.stdout


def test_failures_stay_failures(tmp_path):
    done = run_pytest(tmp_path, "def test_a(): assert False\n", "")
    assert done.returncode == 1
    assert "1 failed" in done.stdout


def test_a_line_without_its_why_is_refused(tmp_path):
    done = run_pytest(tmp_path, SKIPS, "no llama\n")
    assert done.returncode == 4
    assert "line 1" in done.stdout + done.stderr


def test_the_committed_list_is_readable_and_not_a_wildcard():
    patterns = read_allowed(TESTS / "allowed_skips.txt")
    assert patterns
    assert not any(re.match(p, "any other reason at all") for p in patterns)


MATRIX = "import pytest\n@pytest.mark.matrix\ndef test_a(): pass\ndef test_b(): pass\n"


@pytest.mark.parametrize(("words", "counts"), [((), "1 passed, 1 deselected"), (("--full",), "2 passed")])
def test_the_matrix_runs_with_full_alone(tmp_path, words, counts):
    assert counts in run_pytest(tmp_path, MATRIX, "", *words).stdout
