"""The annotated tree of the README: every path in it exists, and every file that a reader could look for is in it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LISTED_WHOLLY = ("megatron_moe", "tools", "scripts", "docs")


def tree_paths() -> list[str]:
    """Paths of the tree; two blanks deeper is inside the folder above."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## The tree\n")[1]
    block = section.split("```\n")[1]
    folders, paths = [], []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        del folders[len(indent) // 2 :]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_every_path_of_the_tree_exists():
    paths = tree_paths()
    assert len(paths) > 50
    assert [p for p in paths if not (ROOT / p).exists() or (ROOT / p).is_dir() != p.endswith("/")] == []


def test_no_path_is_listed_twice():
    assert len(set(tree_paths())) == len(tree_paths())


def test_every_file_is_in_the_tree():
    listed = set(tree_paths())
    files = [f for folder in LISTED_WHOLLY for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".sh", ".md")]
    files += [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]
    names = {f.relative_to(ROOT).as_posix() for f in files if f.name != "__init__.py"}
    assert names - listed == set(), "add it to the tree of the README"


def test_packages_stand_in_the_order_of_the_layers():
    from test_layering import LEVEL

    order = [p.split("/")[1].removesuffix(".py") for p in tree_paths() if re.fullmatch(r"megatron_moe/\w+(/|\.py)", p)]
    assert [LEVEL[name] for name in order] == sorted(LEVEL[name] for name in order)
