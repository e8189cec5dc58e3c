"""The command line of the converter, before any file is touched."""

import subprocess
import sys
from pathlib import Path

import pytest
from conversion.small import save_small

from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def problems(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        convert_checkpoint.main(list(words))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_reported_together_with_the_nearest_valid_value(capsys):
    err = problems(capsys, "--from", "nativ", "--to", "safetensor", "--lod", "x", "--max-shard-size", "5XB")
    for part in (
        "4 problems",
        "--from must be one of native, hf, safetensors, megatron-deepspeed, not 'nativ' (did you mean 'native'?)",
        "(did you mean 'safetensors'?)",
        "unknown flag --lod; did you mean --load?",
        "--max-shard-size: wants a size such as 5GB, 500MB or 2GiB, not '5XB'",
    ):
        assert part in err


def test_what_is_missing_is_said(capsys):
    err = problems(capsys)
    assert [line.split()[1] for line in err.splitlines()[1:]] == ["--from", "--to", "--load", "--save"]


def test_flags_without_effect_are_refused(capsys):
    err = problems(
        capsys, "--from", "safetensors", "--to", "native", "--load", "a", "--save", "b", "--max-shard-size", "1GB", "--dtype", "float32"
    )
    assert "--max-shard-size is for --to safetensors or --to hf" in err
    assert "--dtype is for --to safetensors or --to hf" in err
    assert "--from and --to are both native" in problems(capsys, "--from", "native", "--to", "native", "--load", "a", "--save", "b")
    words = ["--from", "native", "--to", "safetensors", "--load", "a", "--save", "b", "--dtype", "bfloat16", "--include-optimizer"]
    assert "drop one of them" in problems(capsys, *words)
    words = ["--from", "hf", "--to", "safetensors", "--load", "a", "--save", "b", "--include-optimizer", "--hf-model-type", "llama"]
    err = problems(capsys, *words)
    assert "a transformers folder has no optimizer state" in err
    assert "--hf-model-type is for --to hf" in err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2 GiB", 2 << 30), ("1.5mb", 1_500_000), ("800", 800), ("70B", 70)])
def test_sizes_are_read_as_people_write_them(text, size):
    assert convert_checkpoint.byte_count(text.split()) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "5 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="wants a size"):
        convert_checkpoint.byte_count([text])


def test_the_program_converts_what_a_fresh_process_finds(tmp_path):
    run = save_small(tmp_path / "run")
    command = [sys.executable, "tools/convert_checkpoint.py", "--from", "native", "--to", "safetensors", "--load", str(run)]
    done = subprocess.run([*command, "--save", str(tmp_path / "flat"), "--verify"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, "equal in every bit" in done.stdout) == (0, True), done.stderr
    assert "%" not in done.stderr  # no progress bar where there is no terminal
