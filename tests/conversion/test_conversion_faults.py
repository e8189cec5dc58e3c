"""A conversion that goes wrong is noticed, named, and leaves nothing behind."""

import json
import os
import pickle
import shutil

import pytest
import torch

from conversion.small import save_small, to_native, to_safetensors
from megatron_moe.checkpoint.files import Manifest, describe_file, read_manifest, write_manifest
from megatron_moe.checkpoint.one_by_one import FetchingPlanner
from megatron_moe.conversion import flat, native
from megatron_moe.conversion.convert import target_problems
from megatron_moe.conversion.fit import tensors_to_write
from megatron_moe.conversion.source import Selection
from megatron_moe.conversion.verify import logits_difference, tensor_differences

pytestmark = pytest.mark.fault
EXPERTS, Q, K = "model.layers.2.moe.experts.w1", "model.layers.1.attn.q_proj.weight", "model.layers.1.attn.k_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A run directory and its safetensors; tests that damage them work on copies."""
    base = tmp_path_factory.mktemp("originals")
    run = save_small(base / "run", iterations=(5, 10))
    source = native.open_source(run)
    flat.write(Selection(source, tensors_to_write(source, True)), base / "flat", max_shard_size=10_000)
    return base


@pytest.fixture
def run(originals, tmp_path):
    return shutil.copytree(originals / "run", tmp_path / "run")


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "flat", tmp_path / "flat")


# ---------------------------------------------------------------- planted faults: --verify turns red


def spoil(name, change):
    """The tensor `name` comes out changed."""
    return lambda n, tensor: change(tensor).contiguous() if n == name else tensor


FAULTS = {
    "an expert is dropped": (
        spoil(EXPERTS, lambda t: t[:-1]),
        f"{EXPERTS.removeprefix('model.')}: float32 [3, 16, 24] was read, and float32 [4, 16, 24] was announced",
    ),
    "experts are shifted": (
        spoil(EXPERTS, lambda t: t.roll(1, 0)),
        f"values   {EXPERTS}: 1536 of 1536 elements differ, the first at [0, 0, 0]",
    ),
    "a matrix is transposed": (spoil(Q, lambda t: t.T), f"values   {Q}: 240 of 256 elements differ, the first at [0, 1]"),
    "a zero changes its sign": (spoil("model.layers.1.attn.q_proj.bias", lambda t: -t), "values   model.layers.1.attn.q_proj.bias"),
    "a type is changed": (
        spoil(Q, lambda t: t.bfloat16()),
        f"{Q.removeprefix('model.')}: bfloat16 [16, 16] was read, and float32 [16, 16] was announced",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_numbers_in_safetensors_are_named(fault, run, tmp_path, capsys, monkeypatch):
    change, message = FAULTS[fault]
    plain = flat._numbers
    monkeypatch.setattr(flat, "_numbers", lambda selection, names: (change(n, t) for n, t in zip(names, plain(selection, names))))
    code, _, err = to_safetensors(capsys, run, tmp_path / "out", "--verify")
    assert code == (2 if "announced" in message else 1)
    assert message in err
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("fault", ["experts are shifted", "a matrix is transposed"])
def test_wrong_numbers_in_a_run_directory_are_named(fault, folder, tmp_path, capsys, monkeypatch):
    change, message = FAULTS[fault]
    plain = FetchingPlanner.lookup_object
    monkeypatch.setattr(FetchingPlanner, "lookup_object", lambda self, index: change(index.fqn, plain(self, index)))
    code, _, err = to_native(capsys, folder, tmp_path / "out", "--verify", "--include-optimizer")
    assert code == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_swapped_names_are_named(run, tmp_path, capsys, monkeypatch):
    plain, swapped = flat.stored_name, {Q: K, K: Q}
    monkeypatch.setattr(flat, "stored_name", lambda name: plain(swapped.get(name, name)))
    code, _, err = to_safetensors(capsys, run, tmp_path / "out", "--verify")
    assert code == 1
    assert {line.split()[1] for line in err.splitlines() if line.startswith("  values")} == {f"{Q}:", f"{K}:"}


def test_a_forgotten_a_repeated_and_an_invented_tensor_are_counted_even_without_verify(run, tmp_path, capsys, monkeypatch):
    plain = flat.write_shards

    def write(directory, part, tensors, size, read, journal, behind):
        kept = {name: entry for name, entry in tensors.items() if f"model.{name}" != Q}
        extra = {"invented": tensors["norm.weight"]}
        plain(
            directory,
            part,
            kept | extra,
            size,
            lambda names: (t.clone() for t in read(["norm.weight" if n == "invented" else n for n in names])),
        )

    monkeypatch.setattr(flat, "write_shards", write)
    code, _, err = to_safetensors(capsys, run, tmp_path / "out")
    assert code == 1
    for line in (
        f"{Q}: read 0 times",
        f"{Q}: not written",
        "model.norm.weight: read 2 times",
        "model.invented: written, but not asked for",
    ):
        assert line in err
    assert not (tmp_path / "out").exists()


def test_logits_see_a_difference_that_is_there_and_none_that_is_not(originals):
    source, other = native.open_source(originals / "run"), flat.open_source(originals / "flat")
    selection = Selection(source, tensors_to_write(source, False))
    tokens = torch.arange(32).view(2, 16)
    assert tensor_differences(Selection(source, source.tensors), other) == []
    assert logits_difference(selection, other, tokens) == 0.0
    plain = other.read
    other.read = lambda names: ((n, t + 1e-3 if n == Q else t) for n, t in plain(names))
    assert 0 < logits_difference(selection, other, tokens) < 1
    other.read = lambda names: plain([n for n in names if n != Q])  # a weight that is not filled at all
    assert logits_difference(selection, other, tokens) == float("inf")


# ---------------------------------------------------------------- damage and misuse: exit 2, all of it at once


def flip(path, offset=-5):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def shard(folder, number=1):
    return sorted(folder.glob("model-*.safetensors"))[number - 1]


def index_says(folder, **changes):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= changes
    path.write_text(json.dumps(content))


def without_checksums(change):
    """Damage that a program could have written, so that no checksum speaks first."""

    def damage(folder):
        (folder / "checksums.json").unlink()
        change(folder)

    return damage


DAMAGED_FOLDERS = {
    "cut": (lambda f: os.truncate(shard(f), 1000), "model-00001-of-00005.safetensors: cut off or damaged"),
    "bit": (lambda f: flip(shard(f, 2)), "model-00002-of-00005.safetensors: CRC-32 mismatch"),
    "bit of the configuration": (lambda f: flip(f / "config.json", 60), "config.json"),
    "missing": (lambda f: shard(f, 3).unlink(), "model-00003-of-00005.safetensors: missing"),
    "unlisted": (lambda f: edit(f / "checksums.json", files={}), "has no entry in checksums.json"),
    "checksums cut": (lambda f: os.truncate(f / "checksums.json", 40), "checksums.json: cut off or damaged"),
    "index cut": (lambda f: os.truncate(f / "model.safetensors.index.json", 40), "index.json: cut off or damaged, not an index"),
    "index outside": (lambda f: index_says(f, x="../x.safetensors"), "refers to '../x.safetensors', outside the directory"),
    "index wrong": (lambda f: index_says(f, x=shard(f).name), "x: the index puts it into model-00001-of-00005.safetensors, where it is not"),
    "two models": (lambda f: shutil.copy(shard(f), f / "model.safetensors"), "has both model.safetensors and model.safetensors.index.json"),
    "no model": (lambda f: [p.unlink() for p in f.glob("model*")], "looked for model.safetensors or model.safetensors.index.json"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "looked for config.json"),
    "of another program": (lambda f: edit(f / "config.json", model_type="mixtral"), "of another program (model_type 'mixtral'"),
    "newer": (lambda f: edit(f / "config.json", format_version=9), "format 9 is newer than the 1 this version reads"),
    "keys": (
        without_checksums(lambda f: edit(f / "config.json", config=None, vocab_size=None)),
        "the configuration lacks config, vocab_size",
    ),
    "shape": (without_checksums(lambda f: edit(f / "config.json", vocab_size=600)),
              "shape    model.embedding.weight: [384, 16] in the checkpoint, [640, 16] now"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_FOLDERS)
def test_a_damaged_folder_is_refused_by_file_and_tensor(damage, folder, tmp_path, capsys):
    change, message = DAMAGED_FOLDERS[damage]
    change(folder)
    code, out, err = to_native(capsys, folder, tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_extra_and_missing_tensors_are_named(folder, tmp_path, capsys):
    """The folder of another depth: 3 layers are asked for, and there are 2 with an expert layer in another place."""
    content = json.loads((folder / "config.json").read_text())
    content["config"]["model"]["num_layers"] = 3
    content["config"]["moe"]["num_experts"] = [4, 1, 1]
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "checksums.json").unlink()
    code, _, err = to_native(capsys, folder, tmp_path / "out")
    assert code == 2
    assert "missing  model.layers.3.attn.q_proj.weight: not in the checkpoint" in err
    assert "missing  model.layers.1.moe.experts.w1" in err
    assert f"extra    {EXPERTS}: in the checkpoint, not in this model" in err
    assert "missing: 13 more" in err


def test_a_folder_without_checksums_is_converted_with_a_note(folder, tmp_path, capsys):
    (folder / "checksums.json").unlink()
    code, _, err = to_native(capsys, folder, tmp_path / "out")
    assert code == 0
    assert "no checksums.json: a flipped bit would not be noticed" in err


def test_a_damaged_run_directory_is_refused_and_an_intact_iteration_named(run, tmp_path, capsys):
    flip(run / "iter_0000010" / "__0_0.distcp")
    code, _, err = to_safetensors(capsys, run, tmp_path / "out")
    assert code == 2
    assert "iter_0000010/__0_0.distcp: CRC-32 mismatch" in err
    assert "--iteration 5 has all its files" in err
    assert to_safetensors(capsys, run, tmp_path / "out", "--iteration", "5")[0] == 0


def test_nothing_of_a_malicious_metadata_file_is_executed(run, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'flag'}",)

    path = run / "iter_0000010"
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = read_manifest(path)
    fitting = manifest.files | {".metadata": describe_file(path / ".metadata")}
    write_manifest(path, Manifest(manifest.iteration, 1, manifest.tensors, fitting, manifest.meta))
    code, _, err = to_safetensors(capsys, run, tmp_path / "out")
    assert code == 2
    assert "would import posix.system" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_everything_wrong_with_source_and_target_is_said_at_once(run, tmp_path, capsys):
    code, _, err = to_safetensors(capsys, run, run, "--iteration", "7")
    assert code == 2
    assert "2 problems" in err
    assert "no checkpoint of iteration 7; there are 5, 10" in err
    assert f"--save {run}: is not empty, and nothing is overwritten" in err


def test_the_wrong_format_and_no_checkpoint_at_all(run, folder, tmp_path, capsys):
    assert f"{run} holds native, not safetensors: pass --from native" in to_native(capsys, run, tmp_path / "out")[2]
    assert f"{folder} holds safetensors, not native: pass --from safetensors" in to_safetensors(capsys, folder, tmp_path / "out")[2]
    (tmp_path / "empty").mkdir()
    assert "looked for iter_0000100 or alike" in to_safetensors(capsys, tmp_path / "empty", tmp_path / "out")[2]
    assert "there is no such directory" in to_safetensors(capsys, tmp_path / "nowhere", tmp_path / "out")[2]
    assert "holds iteration 10, not 5" in to_native(capsys, folder, tmp_path / "out", "--iteration", "5")[2]


def test_optimizer_state_that_is_not_there_cannot_be_included(tmp_path, capsys):
    run = save_small(tmp_path / "run", with_optimizer=False)
    code, _, err = to_safetensors(capsys, run, tmp_path / "out", "--include-optimizer")
    assert code == 2
    assert "holds no optimizer state; leave the flag out" in err


def test_a_disk_too_small_and_a_file_in_the_way_are_seen_before_anything_is_written(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file; choose another name" in target_problems(tmp_path / "file", 0)[0]
    assert "cannot write in" in target_problems(tmp_path / "file" / "out", 0)[0]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = to_safetensors(capsys, run, tmp_path / "out")
    assert code == 2
    assert "needs 8.4 MB, the disk has 1.0 KB free" in err
    assert not (tmp_path / "out").exists()


class Interruption:
    """Ctrl-C at the n-th tensor that is read; `seen`: those before."""

    def __init__(self, monkeypatch, at):
        self.at, self.seen, plain = at, [], Selection.read

        def read(selection, names):
            for item in plain(selection, names):
                self.seen.append(item[0])
                if len(self.seen) == self.at:
                    raise KeyboardInterrupt
                yield item

        monkeypatch.setattr(Selection, "read", read)


@pytest.mark.parametrize("to", ["safetensors", "native"])
def test_a_conversion_interrupted_at_its_first_tensor_leaves_nothing(to, run, folder, tmp_path, capsys, monkeypatch):
    Interruption(monkeypatch, 1)
    convert, source = (to_safetensors, run) if to == "safetensors" else (to_native, folder)
    code, _, err = convert(capsys, source, tmp_path / "out")
    assert code == 130
    assert "nothing was written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat", "run"]


@pytest.mark.parametrize("to", ["safetensors", "native"])
def test_an_interrupted_conversion_goes_on_where_it_was(to, run, folder, tmp_path, capsys, monkeypatch):
    convert, source = (to_safetensors, run) if to == "safetensors" else (to_native, folder)
    sizes = ("--max-shard-size", "10KB") if to == "safetensors" else ()
    assert convert(capsys, source, tmp_path / "whole", *sizes)[0] == 0
    with monkeypatch.context() as patch:
        interruption = Interruption(patch, 20)
        code, _, err = convert(capsys, source, tmp_path / "out", *sizes)
        assert (code, "the same command goes on" in err, (tmp_path / "out").exists()) == (130, True, False)
    with monkeypatch.context() as patch:
        others = tmp_path / "out.partial" / "half a file"
        others.write_text("x")
        again = Interruption(patch, None)
        code, _, err = convert(capsys, source, tmp_path / "out", *sizes)
        assert code == 0, err
        assert "what is finished there is not written again" in err
        assert 0 < len(set(again.seen) & set(interruption.seen)) < len(interruption.seen)  # the unfinished file's, no more
    same = lambda p: p.is_file() and p.name not in (".metadata", "manifest.json")  # noqa: E731 - torch writes an id of each save into its own
    files = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*") if same(p)}
    assert files == {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").rglob("*") if same(p)}
    assert not (tmp_path / "out.partial").exists()


def test_what_is_left_of_another_conversion_or_damaged_is_not_taken(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        Interruption(patch, 20)
        assert to_safetensors(capsys, run, tmp_path / "out", "--max-shard-size", "10KB")[0] == 130
    finished = sorted((tmp_path / "out.partial").glob("model-*"))
    code, _, err = to_safetensors(capsys, run, tmp_path / "out", "--max-shard-size", "20KB")
    assert (code, "is left of another conversion" in err) == (2, True)
    assert sorted((tmp_path / "out.partial").glob("model-*")) == finished
    flip(finished[0])
    code, out, err = to_safetensors(capsys, run, tmp_path / "out", "--max-shard-size", "10KB", "--verify")
    assert (code, "equal in every bit" in out) == (0, True), err


def test_an_empty_target_directory_is_taken(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert to_safetensors(capsys, run, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "config.json").exists()
