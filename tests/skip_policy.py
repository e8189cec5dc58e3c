"""pytest plugin: a test may be skipped only for a reason that somebody has agreed to.

`--allowed-skips FILE` (scripts/test.sh gives tests/allowed_skips.txt) ends the session with exit code 1 when a test was skipped, or
expectedly failed, for a reason that matches no line of FILE. A line is a regular expression that matches from the start of the
reason; behind ` # ` stands why it is agreed to.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def read_allowed(path: str | Path) -> list[re.Pattern[str]]:
    """One pattern per line that is neither blank nor a comment. ValueError, naming the line, for one that is none or lacks its why."""
    patterns = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, hash_sign, why = line.partition(" # ")
        if not (hash_sign and why.strip()):
            raise ValueError(f"{path}, line {number}: say behind ' # ' why {pattern.strip()!r} is no loss")
        try:
            patterns.append(re.compile(pattern.strip()))
        except re.error as error:
            raise ValueError(f"{path}, line {number}: {pattern.strip()!r} is no regular expression: {error}") from None
    return patterns


class SkipPolicy:
    """Collects every skip; the session fails when one is not allowed."""

    def __init__(self, allowed: list[re.Pattern[str]]):
        self.allowed = allowed
        self.refused: list[tuple[str, str]] = []  # test, reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self._note(report.nodeid, getattr(report, "wasxfail", None) or _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:  # a file that skips itself
        if report.skipped:
            self._note(report.nodeid, _reason(report))

    def _note(self, test: str, reason: str) -> None:
        if not any(pattern.match(reason) for pattern in self.allowed):
            self.refused.append((test, reason))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.refused:
            terminalreporter.section("skipped for reasons that are not allowed", red=True, bold=True)
            for test, reason in self.refused:
                terminalreporter.line(f"{test}: {reason}")
            terminalreporter.line("make these tests run, or agree to the reason in tests/allowed_skips.txt")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """pytest keeps (file, line, "Skipped: reason")."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
