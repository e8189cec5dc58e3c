"""Start-up: the benchmark runs, and what need not be imported is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import startup
from benchmarks.harness import missing

ROOT = Path(__file__).resolve().parents[2]


def imported_by(code: str) -> set[str]:
    code += "\nimport sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_it_runs_and_compares_with_the_import_of_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, "reasons", lambda: dict.fromkeys(startup.PEERS, "not asked for"))
    monkeypatch.setattr(startup, "OURS", {name: text for name, text in startup.OURS.items() if "--help" in text})
    assert command.main(["startup", "--quick", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("startup-*.json")
    told = json.loads(file.read_text())
    assert set(told["samples"]["whole commands"]) == {startup.TORCH, "ours: --help"}
    assert told["figures"]["cpu over import torch"]["ours: --help"]["median"] < 0.5  # no torch
    assert "skipped: deepspeed" in capsys.readouterr().out


def test_help_imports_no_torch():
    code = "import sys, pretrain_gpt_moe as p; sys.argv = ['p', '--help']\ntry: p.main()\nexcept SystemExit: pass"
    assert not {"torch", "numpy"} & imported_by(code)


def test_building_a_model_on_meta_imports_no_compiler():
    """Modules that draw their first values on meta would."""
    code = "import sys, pretrain_gpt_moe as p; sys.argv = 'p --preset tiny --mock-data --dry-run'.split(); p.main()"
    found = imported_by(code)
    assert "torch" in found and "torch._dynamo" not in found


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1.*no such thing"):
        startup.call(["-c", "raise SystemExit('no such thing')"])


def test_a_part_of_a_package_that_is_not_here_is_missing():
    assert set(missing({"no_such_package.core": "a peer", "json.decoder": "there"})) == {"no_such_package.core"}
