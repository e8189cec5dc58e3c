"""An environment with the core packages alone: python .ci/core_environment.py FOLDER [MORE ...]

Makes a virtual environment in FOLDER that finds the `dependencies` of pyproject.toml, MORE (pytest), what these require themselves, and
nothing else: links to where the running interpreter has them. So nothing is downloaded, and what is optional is really absent.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def core_packages() -> list[str]:
    """Names in `dependencies`; read line by line, because Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block, "pyproject.toml lists its dependencies one per line"
    return re.findall(r'^\s*"([A-Za-z0-9._-]+)', block.group(1), re.MULTILINE)


def with_requirements(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The named distributions and all that they require, as far as it is installed here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(name, True) for name in names]
    while waiting:
        name, is_named = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if is_named:
                raise SystemExit(f"{name} is not installed in {sys.prefix}") from None
            continue  # for another platform or Python
        for requirement in found[key].requires or []:
            if "extra ==" not in requirement:
                waiting.append((re.match(r"[A-Za-z0-9._-]+", requirement).group(), False))
    return found


def link(distributions: Iterable[metadata.Distribution], target: Path) -> None:
    """Each file or folder at the top of a distribution becomes a link in `target`."""
    for distribution in distributions:
        tops = {Path(f).parts[0] for f in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            place, there = target / top, Path(distribution.locate_file(top)).resolve()
            if there.exists() and not place.exists():
                place.symlink_to(there)


def main(folder: Path, more: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    distributions = with_requirements([*core_packages(), *more])
    ask = [str(folder / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    link(distributions.values(), Path(subprocess.check_output(ask, text=True).strip()))
    print("core packages alone:", " ".join(sorted(distributions)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
