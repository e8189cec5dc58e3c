"""Imports point down only, so that each layer can be read, tested and taken out without those above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_moe"

# From the bottom. A package may import those of the lines before its own, and itself.
LAYERS = [
    {"config", "utils"},
    {"mpu", "tokenizers", "kernels"},
    {"moe", "optimizer", "data"},
    {"model"},
    {"parallel"},
    {"checkpoint", "metrics"},
    {"conversion"},
    {"training", "inference"},
    {"deepspeed"},
    {"arguments"},  # beside the entry points, which are everything outside of the package
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Imports between packages of one line, (from, to), each with its reason. There is none so far.
SIDEWAYS: set[tuple[str, str]] = set()

# The modules that may know argparse.
PARSERS = {"megatron_moe/arguments.py", "megatron_moe/config/flags.py"}
# Its Namespace is a value in files of Megatron.
HOLDS_A_NAMESPACE = {"megatron_moe/conversion/plain_data.py"}


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import in a file: also inside functions, and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def package_of(module: str) -> str | None:
    """megatron_moe.moe.gate -> moe; None for what is not ours, and for the root, which imports nothing."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_moe" and len(parts) > 1 and parts[1] in LEVEL else None


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def violations(path: Path) -> list[str]:
    source = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = []
    for module, line in imported_modules(path):
        target = package_of(module)
        if target is None or target == source:
            continue
        if source is None or LEVEL[target] > LEVEL[source]:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {module}, which is above it")
        elif LEVEL[target] == LEVEL[source] and (source, target) not in SIDEWAYS:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {module}, which is beside it")
    return found


def test_imports_point_down_only():
    assert [v for path in source_files() for v in violations(path)] == []


def test_every_package_has_a_layer():
    found = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in source_files()} - {"__init__"}
    assert found <= LEVEL.keys(), "name the layer of a new package in LAYERS"


def test_the_checker_sees_upward_sideways_and_local_imports(tmp_path, monkeypatch):
    folder = tmp_path / "megatron_moe" / "moe"
    folder.mkdir(parents=True)
    file = folder / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch, megatron_moe\n"
        "from megatron_moe.utils import random\n"  # fine
        "from megatron_moe.moe import gate\n"  # fine
        "from . import gate\n"  # fine
        "from megatron_moe import model\n"
        "def f():\n    from ..parallel.zero import reshard\n"
        "if TYPE_CHECKING:\n    import megatron_moe.data.batch\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert {v.partition(" ")[0].rpartition(":")[2] for v in violations(file)} == {"6", "8", "10"}


@pytest.mark.parametrize("package", ["model", "moe"])
def test_model_code_knows_no_process_groups(package):
    """`moe/dispatch/` speaks over groups that it is handed."""
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert [f.name for f in files if "mpu" in {package_of(m) for m, _ in imported_modules(f)}] == []
    with_collectives = {
        f.relative_to(PACKAGE).as_posix() for f in files if any(m.startswith("torch.distributed") for m, _ in imported_modules(f))
    }
    # init.py reads where a shard lies (DTensor); the dispatchers are those that communicate
    assert {f for f in with_collectives if not f.startswith("moe/dispatch/")} <= {"model/init.py"}


def test_argparse_is_known_to_two_files():
    users = {
        f.relative_to(ROOT).as_posix() for f in all_python_files() if "argparse" in {m.partition(".")[0] for m, _ in imported_modules(f)}
    }
    assert users <= PARSERS | HOLDS_A_NAMESPACE, "flags are fields of a config class: config/flags.py makes the parser"


def test_training_is_imported_by_entry_points_alone():
    inside = [f for f in source_files() if f.relative_to(PACKAGE).parts[0] not in ("training", "deepspeed")]
    assert [f.name for f in inside if "training" in {package_of(m) for m, _ in imported_modules(f)}] == []


def all_python_files() -> list[Path]:
    return [f for folder in ("megatron_moe", "tools", "scripts") for f in sorted((ROOT / folder).rglob("*.py"))] + [
        ROOT / "pretrain_gpt_moe.py"
    ]


# ---------------------------------------------------------------- what an import brings along

BLOCK = """
import importlib.metadata, pkgutil, sys
allowed = {"torch", "numpy"}
seen, waiting = set(), list(allowed)
while waiting:  # torch and numpy with whatever they require themselves
    name = waiting.pop()
    if name in seen:
        continue
    seen.add(name)
    try:
        wants = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    for want in wants:
        if "extra ==" not in want:
            waiting.append(__import__("re").match(r"[A-Za-z0-9._-]+", want).group())
owners = importlib.metadata.packages_distributions()
normal = lambda name: name.lower().replace("_", "-")
allowed_distributions = {normal(n) for n in seen}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in owners and top != "megatron_moe" and not {normal(d) for d in owners[top]} & allowed_distributions:
            raise ImportError(f"{name} is third-party and not torch or numpy")

sys.meta_path.insert(0, Refuse())
"""

IMPORT_ALL = """
import importlib
for package in {packages}:
    module = importlib.import_module("megatron_moe." + package)
    for info in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
        importlib.import_module(info.name)
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_model_layers_import_with_torch_and_numpy_alone():
    done = run_python(BLOCK + IMPORT_ALL.format(packages=("kernels", "moe", "model", "parallel")))
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    done = run_python(BLOCK + "import tokenizers")
    assert done.returncode != 0
    assert "tokenizers is third-party" in done.stderr


def test_command_line_is_parsed_without_torch():
    code = "import sys\nimport megatron_moe, megatron_moe.arguments as a\na.parse_args(['--preset', 'tiny', '--mock-data'])\n"
    done = run_python(code + "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers', 'yaml')))")
    assert done.returncode == 0, done.stderr
