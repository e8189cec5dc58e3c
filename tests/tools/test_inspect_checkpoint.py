"""Looking inside a checkpoint: what is shown is what is there, and no tensor is read for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion.small import native_tensors, save_small, to_safetensors

from tools import inspect_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("inspected") / "run", iterations=(5, 10), moe_expert_parallel_size=2)


def inspect(capsys, *words):
    code = inspect_checkpoint.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys, *words):
    return json.loads(inspect(capsys, *words, "--json")[1])


def test_the_tree_shows_layers_with_totals_and_slots_in_one_line(run, capsys):
    code, out, _ = inspect(capsys, "--load", run)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["moe.experts.w1", "[4,", "16,", "24]", "float32", "6.1", "KB"] in rows
    tensors = native_tensors(run / "iter_0000010")
    layer = [t for name, t in tensors.items() if name.startswith("model.layers.2.")]
    total = sum(t.numel() for t in layer)
    assert ["layers.2", f"{total:,}", "elements", f"{len(layer)}", "tensors", f"{total * 4 / 1000:.1f}", "KB"] in rows
    moments = [t for name, t in tensors.items() if name.startswith("optimizer.exp_avg.")]
    assert ["optimizer.exp_avg", f"{sum(t.numel() for t in moments):,}", "elements", f"{len(moments)}", "tensors"] == next(
        row[:5] for row in rows if row[:1] == ["optimizer.exp_avg"]
    )
    for line in (
        "  iteration     10, after 40 samples, 640 tokens",
        "  trained on    1 rank(s): TP 1, EP 2, ZeRO 1",
        "  experts       1 4 by layer, residual",
        "  tokenizer     ByteTokenizer (fingerprint",
        "  optimizer     exp_avg, exp_avg_sq, step",
        "sizes are right (--verify reads their contents)",
    ):
        assert line in out


def test_json_has_every_tensor_of_the_iteration_that_was_asked_for(run, capsys):
    figures = as_json(capsys, "--load", run, "--iteration", 5)
    tensors = native_tensors(run / "iter_0000005")
    assert figures["iteration"] == 5
    assert figures["tensors"] == {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "bytes": t.nbytes} for name, t in tensors.items()
    }
    assert figures["parameters"] == sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    assert figures["architecture"]["experts_per_layer"] == [1, 4]
    assert figures["files"]["verified"] == "size"


def test_safetensors_show_the_same_model(run, tmp_path, capsys):
    assert to_safetensors(capsys, run, tmp_path / "flat", "--include-optimizer", "--max-shard-size", "9KB")[0] == 0
    ours, theirs = as_json(capsys, "--load", run), as_json(capsys, "--load", tmp_path / "flat", "--verify")
    assert (theirs["format"], theirs["files"]["verified"], theirs["files"]["problems"]) == ("safetensors", "crc", [])
    for same in ("iteration", "progress", "layout", "architecture", "tensors", "parameters", "optimizer", "versions"):
        assert ours[same] == theirs[same]
    (tmp_path / "flat" / "checksums.json").unlink()
    code, out, _ = inspect(capsys, "--load", tmp_path / "flat")
    assert code == 0
    assert "no checksums beside them" in out


def test_filter_and_norms(run, capsys):
    figures = as_json(capsys, "--load", run, "--filter", r"^model.*experts\.w[12]$", "--norms")
    tensors = native_tensors(run / "iter_0000010")
    assert list(figures["tensors"]) == ["model.layers.2.moe.experts.w1", "model.layers.2.moe.experts.w2"]
    for name, entry in figures["tensors"].items():
        assert entry["norm"] == pytest.approx(float(torch.sqrt((tensors[name].double() ** 2).sum())), rel=1e-12)
    code, out, _ = inspect(capsys, "--load", run, "--filter", "exp_avg.layers.2.moe.gate")
    assert code == 0
    assert "moe.gate.weight" in out
    assert "no tensor has such a name" in inspect(capsys, "--load", run, "--filter", "nothing")[1]


def test_damage_is_shown_and_exits_with_1(tmp_path, capsys):
    run = save_small(tmp_path / "run")
    shard = run / "iter_0000010" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    assert inspect(capsys, "--load", run)[0] == 0
    code, out, _ = inspect(capsys, "--load", run, "--verify")
    assert code == 1
    assert "__0_0.distcp: CRC-32 mismatch" in out
    shard.write_bytes(data[:-1])
    code, out, _ = inspect(capsys, "--load", run)
    assert code == 1
    assert "size mismatch" in out


def test_nothing_to_look_at_exits_with_2(run, tmp_path, capsys):
    assert "looked for iter_0000100" in inspect(capsys, "--load", tmp_path)[2]
    code, _, err = inspect(capsys, "--load", run, "--iteration", "7")
    assert (code, "there are 5, 10" in err) == (2, True)
    assert "there is no such directory" in inspect(capsys, "--load", tmp_path / "x")[2]
    with pytest.raises(SystemExit):
        inspect_checkpoint.main(["--filter", "("])
    err = capsys.readouterr().err
    assert "--load DIR is missing" in err
    assert "not a regular expression" in err


def test_torch_is_not_imported_to_look(run):
    code = (
        "import sys\nfrom tools import inspect_checkpoint\n"
        f"code = inspect_checkpoint.main(['--load', {str(run)!r}, '--verify'])\nsys.exit(code or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
