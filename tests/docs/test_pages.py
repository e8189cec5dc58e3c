"""Documents: plain characters, links that lead somewhere, commands that name files which exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.fixture(params=PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


def test_is_ascii(page):
    text = page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if not line.isascii()] == []


def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_named_tests_exist(page):
    """`test_x_is_y`, or its beginning: `test_x_...`."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_\w+)(\.\.\.)?`", page.read_text(encoding="utf-8"))
    assert [name for name, cut in names if not re.search(rf"def {name}" + ("" if cut else r"\("), sources)] == []


def test_named_files_exist(page):
    """`tools/x.py`, `docs/y.md`, ... wherever a page mentions them."""
    names = re.findall(r"\b((?:tools|scripts|docs|tests|megatron_moe)/[\w./-]*\w\.(?:py|sh|md|txt))\b", page.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []
