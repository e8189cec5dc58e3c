"""The one device of --verify-parallelism is judge over the layout, so its code has nothing of a layout in it: the graph of imports."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from test_layering import imported_modules

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "megatron_moe.training.verify.reference"
PARALLEL = ("megatron_moe.parallel", "megatron_moe.mpu")


def file_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]
    return found[0] if found else None


def reached_from(module: str) -> Iterator[tuple[str, str]]:
    """(importer, imported) of our modules, over every import in every file on the way, in functions too."""
    waiting, seen = [module], set()
    while waiting:
        importer = waiting.pop()
        parts = importer.split(".")
        packages = [".".join(parts[:i]) for i in range(1, len(parts))]  # their __init__ runs first
        for target in [*packages, *(name for name, _ in imported_modules(file_of(importer)))]:
            if target.startswith("megatron_moe") and file_of(target) is not None:
                yield importer, target
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)


def test_no_import_leads_from_the_reference_to_a_layout():
    found = list(reached_from(REFERENCE))
    assert {"megatron_moe.model.gpt", "megatron_moe.moe.layer", "megatron_moe.moe.dispatch"} <= {target for _, target in found}
    assert [edge for edge in found if edge[1].startswith(PARALLEL)] == []


def test_the_walk_finds_what_the_layout_imports():
    found = list(reached_from("megatron_moe.training.verify.layout"))
    assert {"megatron_moe.parallel.apply", "megatron_moe.mpu.mesh"} <= {target for _, target in found}


def test_nothing_of_a_layout_is_loaded_with_the_reference():
    code = f"import sys, {REFERENCE}\nprint([m for m in sys.modules if m.startswith({PARALLEL!r})])"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
