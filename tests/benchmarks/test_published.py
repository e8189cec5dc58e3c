"""The page shows what the script says."""

from __future__ import annotations

from pathlib import Path

from benchmarks.published import MODELS, ROWS, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


def test_the_table_of_errors_is_that_of_the_page():
    assert table() in PAGE.read_text(encoding="utf-8"), "python -m benchmarks.published prints the new one"


def test_every_model_has_a_row():
    assert {row.model for row in ROWS} == set(MODELS)
