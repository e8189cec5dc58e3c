"""The benchmark of a conversion's memory: that it runs, and what it concludes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import convert_memory
from benchmarks.__main__ import NAMES
from benchmarks.harness import Report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_runs_both_ways_and_writes_what_it_found(tmp_path):
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "convert_memory", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "scratch")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("convert_memory-*.json")
    figures = json.loads(file.read_text())["figures"]
    assert 2_000_000 < figures["bytes"] < 3_000_000
    for way in ("hf -> native", "native -> hf"):
        (conversion,) = figures[way]["conversions"]
        assert (conversion["code"], conversion["largest"]) == (0, 8 * 64 * 224 * 4)  # a stack of experts, float32
        assert conversion["bytes"] > 0
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))  # 20 GB at the full size


@pytest.mark.slow
def test_a_conversion_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with code 1:(.|\n)*nowhere"):
        convert_memory.converted(["--from", "hf", "--to", "native", "--load", str(tmp_path / "nowhere"), "--save", str(tmp_path / "out")])


def test_the_peak_is_that_of_the_process_alone():
    """A process that was started by a larger one."""
    held = b"x" * 400_000_000
    code = "from benchmarks.convert_memory import peak; print(peak())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 5_000_000 < int(said) < len(held)


def test_memory_is_compared_with_the_largest_tensor():
    report = Report("convert_memory")
    conversions = [{"bytes": b, "largest": 100_000_000, "seconds": 2.0} for b in (100_000_000, 150_000_000, 300_000_000)]
    convert_memory.conclude(report, {"hf -> native": conversions}, 500_000_000)
    assert report.figures["hf -> native"]["beyond_over_largest"] == pytest.approx(1.5)
    assert "500 MB of bfloat16" in report.tables[0] and "150" in report.tables[0] and "1.50" in report.tables[0]


def test_the_list_of_benchmarks_has_it():
    assert "convert_memory" in NAMES and convert_memory.PEERS == {}
    assert convert_memory.__doc__.splitlines()[0].startswith("memory of a conversion")
