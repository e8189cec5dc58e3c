"""What scripts/common.sh finds missing of requirements.txt."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def missing(folder: Path, *lines: str) -> list[str]:
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n")
    script = 'source scripts/common.sh; PYTHON=$0; has_torch() { return 1; }; missing_requirements "$1"'
    words = ["bash", "-c", script, sys.executable, str(folder / "requirements.txt")]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")[:-1]


def test_another_version_and_an_absent_package_are_missing(tmp_path):
    pins = [f"numpy=={version('numpy')}  # comment", "pytest==0.1", "no-such-package==1.0", "# pytest==0.2"]
    assert missing(tmp_path, *pins) == ["pytest==0.1", "no-such-package==1.0"]


def test_a_pin_for_another_platform_is_not_missing(tmp_path):
    here, pytest_pin = f'sys_platform == "{sys.platform}"', f"pytest=={version('pytest')}"
    assert missing(tmp_path, f"{pytest_pin}; {here}", 'pytest==0.1; sys_platform == "none"', f"pytest==0.1; {here}") == ["pytest==0.1"]
