"""A flag without effect is a lie: every field of every config class is read by code that does something."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from config.config_reads import reads, used

from megatron_moe.config.flags import fields_of
from megatron_moe.config.run import GROUPS

ROOT = Path(__file__).resolve().parents[2]


def source_files() -> list[Path]:
    return [f for folder in ("megatron_moe", "tools", "scripts") for f in sorted((ROOT / folder).rglob("*.py"))] + [
        ROOT / "pretrain_gpt_moe.py"
    ]


def declaring_files() -> list[Path]:
    """Files with a field that is a flag."""
    return [f for f in source_files() if "= flag(" in f.read_text(encoding="utf-8")]


def config_classes() -> dict[str, type]:
    """Every class with flags, of the trainer and of the tools."""
    classes = {}
    for path in declaring_files():
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and fields_of_class(getattr(module, node.name)):
                classes[node.name] = getattr(module, node.name)
    return classes


def fields_of_class(cls: type) -> list:
    return fields_of(cls) if hasattr(cls, "__dataclass_fields__") else []


def unread(files: list[Path], classes: dict[str, type]) -> list[tuple[str, str]]:
    """Fields without effect. Upstream leftovers, and flags of features that are not built yet, have no field at all."""
    alive = used(reads(files, {*classes, "RunConfig"}))
    built = [(name, spec.name) for name, cls in classes.items() for spec in fields_of(cls)]
    return [field for field in built if field not in alive]


def read_by_name(files: list[Path], names: list[str]) -> list[str]:
    """Of the keys of a mapping, those that some code names: as text, as a parameter (what `f(**section)` fills), or in two parts of text."""
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts}
    texts |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    endings = {part.value for part in parts if isinstance(part, ast.Constant)}
    return [name for name in names if name in texts or any(name == text + ending for text in texts for ending in endings)]


def looked_up(path: Path) -> set[str]:
    """What stands in x["..."] and x.get("..."): where keys are declared too, texts alone say nothing."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_get = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args
        key = node.args[0] if is_get else node.slice if isinstance(node, ast.Subscript) else None
        if isinstance(key, ast.Constant):
            found.add(key.value)
    return found


def is_mapping(cls: type) -> bool:
    """Sections of an engine's JSON: what was given of them travels as a dict, for what is missing means the default of somebody else."""
    return cls.__module__ == "megatron_moe.deepspeed.config"


def test_every_field_is_read_outside_of_its_checks():
    classes = config_classes()
    assert set(GROUPS.values()) <= set(classes.values())
    assert unread(source_files(), {name: cls for name, cls in classes.items() if not is_mapping(cls)}) == []


def test_every_key_of_an_engines_json_is_read():
    names = [spec.name for cls in config_classes().values() if is_mapping(cls) for spec in fields_of(cls)]
    declaring = ROOT / "megatron_moe" / "deepspeed" / "config.py"
    files = [path for path in sorted(declaring.parent.rglob("*.py")) if path != declaring]
    assert len(names) > 30
    assert sorted(set(names) - set(read_by_name(files, names)) - looked_up(declaring)) == []


def test_names_that_nothing_reads_are_found(tmp_path):
    (tmp_path / "reader.py").write_text('def f(section, rate):\n    return section["kind"], section[f"{section}_path"], f("csv", 1)\n')
    assert read_by_name([tmp_path / "reader.py"], ["rate", "kind", "csv_path", "path", "_path", "lost"]) == ["rate", "kind", "csv_path"]
    (tmp_path / "config.py").write_text('KEYS = {"kind": sets("rate")}\n\ndef f(v):\n    return v.get("rate"), v["lost"]\n')
    assert looked_up(tmp_path / "config.py") == {"rate", "lost"}


# ---------------------------------------------------------------- the walk itself

CONFIGS = """
from dataclasses import dataclass
from megatron_moe.config.flags import flag

@dataclass(frozen=True)
class Inner:
    used: int = flag(0, "read outside")
    dead: int = flag(0, "read nowhere")
    checked: int = flag(0, "read by checks alone")
    through: int = flag(0, "read by a property that is used")
    lost: int = flag(0, "read by a property that nobody uses")
    renamed: int = flag(0, "sets another field")
    namesake: int = flag(0, "something else has an attribute of this name")
    by_name: int = flag(0, "read by a name that is put together")

    def __post_init__(self):
        if self.renamed:
            object.__setattr__(self, "used", 1)

    def problems(self):
        if self.checked or self.dead > self.checked:
            yield "no"

    @property
    def alias(self):
        return self.through

    @property
    def forgotten(self):
        return self.lost

@dataclass(frozen=True)
class RunConfig:
    inner: Inner
"""
READERS = {
    "a parameter": 'def f(c: Inner):\n    return c.used, c.alias, getattr(c, f\'{"by"}_{"name"}\')\n',
    "a group": "def f(run: RunConfig):\n    return run.inner.used, run.inner.alias, getattr(run.inner, 'by_name')\n",
    "a local name": "def f(run: RunConfig):\n    c, n = run.inner, 1\n    return c.used + c.alias, getattr(c, 'by_name')\n",
    "an attribute": "class A:\n    def __init__(self, run: RunConfig):\n        self.c = run.inner\n    def g(self):\n"
    "        return self.c.used, self.c.alias, self.c.by_name\n",
    "what a function gives": "def make() -> RunConfig: ...\ndef f():\n    c = make().inner\n    return c.used, c.alias, c.by_name\n",
    "an element": "def f(cs: list[Inner]):\n    return [(c.used, c.alias, c.by_name) for c in cs]\n",
    "a function inside": "def f(c: Inner):\n    def g():\n        return c.used, c.alias, c.by_name\n    return g\n",
}
NAMESAKE = "import x\n\ndef unknown(thing, c: Inner):\n    c.problems()\n    return thing.namesake, x.dead, x.lost, x.forgotten\n"


@pytest.mark.parametrize("how", list(READERS))
def test_the_walk_follows_configs_and_nothing_else(how, tmp_path, monkeypatch):
    (tmp_path / "sample_configs.py").write_text(CONFIGS)
    (tmp_path / "reader.py").write_text(NAMESAKE + READERS[how])
    monkeypatch.syspath_prepend(str(tmp_path))
    cls = importlib.import_module("sample_configs").Inner
    found = unread([tmp_path / "sample_configs.py", tmp_path / "reader.py"], {"Inner": cls})
    assert [name for _, name in found] == ["dead", "checked", "lost", "namesake"]
