"""Every benchmark is in the list, and what docs/performance.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, listing

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
MODULES = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_")}


def defined(path: Path) -> set[str]:
    """What a module defines at its top level. Read, not run: a peer may be missing."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_a_module_with_run_is_listed_and_the_other_way_round():
    assert set(NAMES) == {name for name, path in MODULES.items() if "run" in defined(path)}
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_is_and_which_peers_it_has(name):
    first = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))).splitlines()[0]
    assert "PEERS" in defined(MODULES[name]) and re.search(rf"^  {name} +{re.escape(first)}$", listing(), re.MULTILINE)


def test_the_page_names_benchmarks_and_results_that_exist():
    named = set(re.findall(r"python -m benchmarks (\w+)", PAGE))
    assert named and named <= set(NAMES), named - set(NAMES)
    files = re.findall(r"benchmarks/results/([\w.-]+\.json)", PAGE)
    assert files and [file for file in files if not (ROOT / "benchmarks" / "results" / file).exists()] == []


def test_each_claim_leads_to_a_section_of_the_page():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    links = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert links and [link for link in links if link not in anchors] == []
