"""Looking inside a checkpoint: what is shown is what is there, and no tensor is read for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion.megatron_files import Plan, our_weights, write_files
from conversion.small import convert, native_tensors, save_small, to_safetensors

from megatron_moe.checkpoint.files import Best, read_manifest, write_best
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.conversion.convert import FORMATS
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


def test_best_is_the_checkpoint_that_the_note_names(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    write_best(copy, Best(5, 2.5))
    assert as_json(capsys, "--load", copy / "best")["iteration"] == 5
    (copy / "best_checkpoint.json").write_text("{")
    code, _, err = inspect(capsys, "--load", copy / "best")
    assert code == 2 and "cannot be understood" in err


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


def changed_copy(run, directory, change):
    """A run directory with the tensors of another, changed in place."""
    manifest = read_manifest(run / "iter_0000010")
    tensors = native_tensors(run / "iter_0000010")
    change(tensors)
    CheckpointManager(directory).save(10, tensors, manifest.meta)
    return directory


def test_diff_finds_every_kind_of_difference(run, tmp_path, capsys):
    w1, norm, step = "model.layers.2.moe.experts.w1", "model.norm.weight", "optimizer.step.norm.weight"
    count = "optimizer.step.norm.bias"

    def change(tensors):
        tensors[w1][1, 2, 3] += 0.5
        tensors[w1][3, 0, 0] -= 2.0
        tensors[count] = tensors[count].bfloat16()  # one step: the value is the same
        tensors[norm] = tensors[norm][:-1].clone()
        tensors["model.extra"] = tensors.pop(step)

    other, before = changed_copy(run, tmp_path / "other", change), native_tensors(run / "iter_0000010")
    code, out, _ = inspect(capsys, "--diff", run, other, "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["only_in_first"], found["only_in_second"]) == ([step], ["model.extra"])
    assert found["shapes"] == {norm: [[16], [15]]}
    assert found["dtypes"] == {count: ["float32", "bfloat16"]}
    assert list(found["values"]) == [w1]
    figures = found["values"][w1]
    assert (figures["max_abs"], figures["elements"]) == (pytest.approx(2.0, rel=1e-6), 2)
    assert figures["relative"] == pytest.approx(4.25**0.5 / float(before[w1].double().norm()), rel=1e-6)
    assert found["equal"] == len(before) - 3
    out = inspect(capsys, "--diff", run, other)[1]
    for line in ("shape: 1 tensor(s)", "[16] and [15]", "float32 and bfloat16", "up to 2 apart", "only in the second: 1 tensor(s)"):
        assert line in out
    code, out, _ = inspect(capsys, "--diff", run, other, "--filter", "attn")
    assert code == 0


def test_diff_of_two_formats_of_one_model_finds_none(run, tmp_path, capsys):
    assert to_safetensors(capsys, run, tmp_path / "flat", "--include-optimizer")[0] == 0
    assert convert(capsys, "native", "megatron-deepspeed", run, tmp_path / "theirs")[0] == 0
    code, out, _ = inspect(capsys, "--diff", run, tmp_path / "flat")
    assert (code, "172 tensors have the same values" in out) == (0, True)
    code, out, _ = inspect(capsys, "--diff", tmp_path / "flat", tmp_path / "theirs", "--filter", "^model")
    assert (code, "43 tensors have the same values" in out) == (0, True)


def test_a_nan_is_a_difference_to_a_number_and_none_to_itself(run, tmp_path, capsys):
    def damage(tensors):
        tensors["model.norm.weight"][2] = float("nan")

    first, second = (changed_copy(run, tmp_path / name, damage) for name in ("a", "b"))
    assert inspect(capsys, "--diff", first, second)[0] == 0
    found = json.loads(inspect(capsys, "--diff", run, first, "--json")[1])
    assert found["values"]["model.norm.weight"] == {"max_abs": float("inf"), "relative": float("inf"), "elements": 1}


def test_one_expert_its_shapes_norms_and_likeness(run, tmp_path, capsys):
    def make_alike(tensors):
        for name in ("w1", "w2", "b1", "b2"):
            stack = tensors[f"model.layers.2.moe.experts.{name}"]
            stack[1] = stack[3] * 2  # the same direction, twice as long

    other = changed_copy(run, tmp_path / "alike", make_alike)
    figures = as_json(capsys, "--load", other, "--layer", 2, "--expert", 3, "--norms")
    stacks = {n: t for n, t in native_tensors(other / "iter_0000010").items() if ".layers.2.moe." in n and t.ndim}
    assert figures["tensors"].keys() == stacks.keys()
    for name, entry in figures["tensors"].items():
        assert entry["shape"] == list(stacks[name].shape[1:])
        assert entry["norm"] == pytest.approx(float(stacks[name][3].double().norm()), rel=1e-9)
    vectors = torch.cat([t.double().flatten(1) for n, t in stacks.items() if n.startswith("model") and "experts" in n], 1)
    wanted = torch.cosine_similarity(vectors[3], vectors.mean(0), 0)
    assert figures["expert"] == {
        "layer": 2, "expert": 3, "most_similar": 1, "cosine_to_most_similar": pytest.approx(1.0), "cosine_to_mean": pytest.approx(float(wanted)),
    }  # fmt: skip
    code, out, _ = inspect(capsys, "--load", run, "--layer", 2, "--expert", 0)
    assert code == 0
    assert "expert        0 of layer 2" in out
    assert "moe.experts.w1" in out and "norm " not in out.split("moe.experts.w1")[1].splitlines()[0]
    for words, message in (
        (("--layer", 1, "--expert", 0), "--layer 1 has no experts; MoE layers are 2"),
        (("--layer", 9, "--expert", 0), "--layer 9 does not exist"),
        (("--layer", 2, "--expert", 4), "layer 2 has experts 0 to 3"),
    ):
        code, _, err = inspect(capsys, "--load", run, *words)
        assert (code, message in err) == (2, True)


def test_words_that_do_not_go_together_are_named(run, capsys):
    with pytest.raises(SystemExit):
        inspect_checkpoint.main(["--diff", "a", "--expert", "3", "--norms"])
    err = capsys.readouterr().err
    for message in ("two directories, not 1", "--expert and --layer belong together", "--norms is about one checkpoint"):
        assert message in err


def test_no_tensor_is_read_in_any_format_unless_asked(run, tmp_path, capsys, monkeypatch):
    assert to_safetensors(capsys, run, tmp_path / "flat")[0] == 0
    plan = Plan(experts=(1, 4), num_experts=(4,))
    write_files(tmp_path / "theirs", plan, our_weights(plan))
    reads = []
    for directory, kind in ((run, "native"), (tmp_path / "flat", "safetensors"), (tmp_path / "theirs", "megatron-deepspeed")):
        source = FORMATS[kind].open_source(directory)
        original = type(source).read
        counted = lambda self, names, original=original: reads.extend(names) or original(self, names)  # noqa: E731
        monkeypatch.setattr(type(source), "read", counted)
        code, out, _ = inspect(capsys, "--load", directory, "--filter", "experts")
        assert (code, f"({kind})" in out, reads) == (0, True, [])
        assert inspect(capsys, "--load", directory, "--filter", "experts.w1$", "--norms")[0] == 0
        assert any(name.endswith("experts.w1") for name in reads)
        reads.clear()
