"""Run directory -> safetensors -> run directory: every tensor keeps its bits, and training does not notice."""

import json
import weakref

import numpy as np
import pytest
import torch
from distributed_pool import run_distributed
from safetensors.torch import load_file
from training import runs

from conversion.small import convert, hashes, native_tensors, save_small, to_native, to_safetensors
from megatron_moe.checkpoint.files import read_manifest
from megatron_moe.checkpoint.one_by_one import save_one_by_one
from megatron_moe.conversion import native
from megatron_moe.conversion.shards import write_shards
from megatron_moe.inference.load import load_for_inference
from megatron_moe.metrics.reader import read_records
from megatron_moe.model.plain import build_plain


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(world, save, text, flags):
    data = f"--data-path {text} --vocab-size 64 --split 80,20,0"
    return run_distributed(runs.train_here, world, f"{data} --save {save} {flags}")[0]


SHARED_LATENT = (
    "--mlp-type standard --squared-relu --moe-shared-expert-intermediate-size 12 --moe-shared-expert-gate --moe-latent-size 8 "
    "--moe-ffn-hidden-size 20"
)
LAYOUTS = [
    # world, flags, then another layout to load the result
    (1, "--zero-stage 1", 2, "--tensor-model-parallel-size 2"),
    (2, "--zero-stage 3 --moe-expert-parallel-size 2", 1, ""),
    (4, "--zero-stage 2 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2", 2, "--zero-stage 3"),
    (2, f"--zero-stage 3 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2 {SHARED_LATENT}", 1, SHARED_LATENT),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "flags", "other_world", "other_flags"), LAYOUTS, ids=["1", "ep2_zero3", "tp2_ep2_dp2", "shared_latent"])
def test_there_and_back_is_bit_equal_from_any_layout_and_loads_under_another(
    world, flags, other_world, other_flags, text, tmp_path, capsys
):
    trained = train(world, tmp_path / "run", text, f"{flags} --train-iters 4")["tensors"]
    keep = ("--include-optimizer", "--verify")
    assert to_safetensors(capsys, tmp_path / "run", tmp_path / "flat", *keep, "--max-shard-size", "20KB")[0] == 0
    assert to_native(capsys, tmp_path / "flat", tmp_path / "back", *keep)[0] == 0
    back = native_tensors(tmp_path / "back" / "iter_0000004")
    assert hashes(back) == hashes(trained) == hashes(native_tensors(tmp_path / "run" / "iter_0000004"))
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in back)
    loaded = train(other_world, tmp_path / "loaded", text, f"{other_flags} --load {tmp_path / 'back'} --train-iters 4")
    assert hashes(loaded["tensors"]) == hashes(trained)


@pytest.mark.distributed
def test_training_goes_on_from_a_converted_checkpoint_as_from_the_original(text, tmp_path, capsys):
    flags = "--zero-stage 3 --moe-expert-parallel-size 2 --train-iters 6"
    train(2, tmp_path / "run", text, f"{flags} --exit-interval 3")
    assert to_safetensors(capsys, tmp_path / "run", tmp_path / "flat", "--include-optimizer")[0] == 0
    assert to_native(capsys, tmp_path / "flat", tmp_path / "back", "--include-optimizer")[0] == 0
    results = {name: train(2, tmp_path / f"on_{name}", text, f"{flags} --load {tmp_path / name}") for name in ("run", "back")}
    assert results["run"]["progress"] == results["back"]["progress"]
    assert results["run"]["progress"].iteration == 6
    assert hashes(results["run"]["tensors"]) == hashes(results["back"]["tensors"])
    losses = [
        [
            (r["iteration"], r["lm_loss"], r["grad_norm"])
            for r in read_records(tmp_path / f"on_{name}" / "metrics.jsonl")
            if r["event"] == "train"
        ]
        for name in results
    ]
    assert losses[0] == losses[1]
    assert [loss[0] for loss in losses[0]] == [4, 5, 6]


@pytest.mark.distributed
def test_weights_alone_go_on_with_a_fresh_optimizer_only_when_that_is_said(text, tmp_path, capsys):
    trained = train(1, tmp_path / "run", text, "--train-iters 4")
    assert to_safetensors(capsys, tmp_path / "run", tmp_path / "flat")[0] == 0
    code, out, _ = to_native(capsys, tmp_path / "flat", tmp_path / "back")
    assert code == 0
    assert "--no-load-optim (or --finetune)" in out
    with pytest.raises(
        ValueError, match=r"iter_0000004 holds weights without optimizer state .* add --no-load-optim to go on .* or --finetune"
    ):
        train(1, tmp_path / "refused", text, f"--load {tmp_path / 'back'} --train-iters 5")
    for flag, iteration, steps in (("--no-load-optim", 4, 0), ("--finetune", 0, 4)):
        result = train(1, tmp_path / flag, text, f"--load {tmp_path / 'back'} {flag} --train-iters {iteration + steps}")
        assert result["progress"].iteration == iteration + steps
        if not steps:
            weights = {name: t for name, t in trained["tensors"].items() if name.startswith("model.")}
            assert hashes({name: result["tensors"][name] for name in weights}) == hashes(weights)


def test_the_file_holds_parameters_under_their_own_names(tmp_path, capsys):
    """Read by the library alone: a wrong name on both ways would survive every round trip."""
    run = save_small(tmp_path / "run")
    assert to_safetensors(capsys, run, tmp_path / "flat")[0] == 0
    loaded = load_for_inference(run)
    model = build_plain(loaded.run, loaded.vocab_size).to_empty(device="cpu").eval()
    model.load_state_dict(load_file(tmp_path / "flat" / "model.safetensors"), strict=True)
    tokens = torch.arange(16)[None]
    assert torch.equal(model(tokens, tokens), loaded.model(tokens, tokens))
    assert (tmp_path / "flat" / "model.safetensors").stat().st_mode == (tmp_path / "flat" / "config.json").stat().st_mode


def test_shards_are_cut_between_tensors_and_indexed(tmp_path, capsys):
    run = save_small(tmp_path / "run")
    assert to_safetensors(capsys, run, tmp_path / "flat", "--max-shard-size", "8000")[0] == 0
    index = json.loads((tmp_path / "flat" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "flat").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file: load_file(tmp_path / "flat" / file) for file in files}
    for file, tensors in held.items():
        assert {name for name, f in index["weight_map"].items() if f == file} == tensors.keys()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 8000
    largest = max(held.values(), key=lambda tensors: max(t.nbytes for t in tensors.values()))
    assert len(largest) == 1  # a tensor larger than the limit is alone
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())


def test_what_is_known_beside_the_tensors_comes_back_too(tmp_path, capsys):
    run = save_small(tmp_path / "run", iterations=(10, 20))
    assert to_safetensors(capsys, run, tmp_path / "flat", "--iteration", "10")[0] == 0
    assert to_native(capsys, tmp_path / "flat", tmp_path / "back")[0] == 0
    before, after = read_manifest(run / "iter_0000010"), read_manifest(tmp_path / "back" / "iter_0000010")
    assert after.meta == before.meta | {"world_size": 1}
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert load_for_inference(tmp_path / "back").tokenizer.encode("a") == [97]


def test_rounding_is_said_and_widening_back_is_exact(tmp_path, capsys):
    run = save_small(tmp_path / "run")
    code, out, err = to_safetensors(capsys, run, tmp_path / "flat", "--dtype", "bfloat16", "--verify")
    assert code == 0
    assert "weights go from float32 to bfloat16: rounded" in err
    assert "verified against the source rounded to bfloat16" in out
    code, _, err = to_native(capsys, tmp_path / "flat", tmp_path / "back", "--verify")
    assert code == 0
    assert "from bfloat16 to float32: widened, which is exact" in err
    original, back = native_tensors(run / "iter_0000010"), native_tensors(tmp_path / "back" / "iter_0000010")
    rounded = {name: t.bfloat16().float() for name, t in original.items() if name.startswith("model.")}
    assert hashes(back) == hashes(rounded)


def test_verify_reads_the_training_text_when_its_tokenizer_is_there(tmp_path, capsys):
    assert "logits   of 2 x 16 tokens of README.md" in to_safetensors(capsys, save_small(tmp_path / "a"), tmp_path / "b", "--verify")[1]
    numbers = save_small(tmp_path / "c", tokenizer_type="NullTokenizer", vocab_size=50)
    assert "token ids drawn with seed 1234" in to_safetensors(capsys, numbers, tmp_path / "d", "--verify")[1]


def test_tensors_are_read_in_groups_of_limited_size(tmp_path, monkeypatch):
    source = native.open_source(save_small(tmp_path / "run"))
    monkeypatch.setattr(native, "AT_ONCE", 3000)
    groups = list(native._groups(list(source.tensors), source.tensors))
    assert [name for group in groups for name in group] == list(source.tensors)
    assert len(groups) > 10
    assert hashes(dict(source.read(list(source.tensors)))) == hashes(native_tensors(source.path))


class Watched:
    """Numbers whose lifetime is seen: how many are in memory whenever the next is asked for."""

    def __init__(self):
        self.arrays, self.most = [], 0

    def next(self) -> torch.Tensor:
        self.arrays = [a for a in self.arrays if a() is not None]
        self.most = max(self.most, len(self.arrays))
        array = np.zeros(100, np.float32)
        self.arrays.append(weakref.ref(array))
        return torch.from_numpy(array)


def test_a_run_directory_is_written_with_one_or_two_tensors_in_memory(tmp_path):
    watched = Watched()
    content = {f"model.{i}": {"shape": [100], "dtype": "float32"} for i in range(30)}
    save_one_by_one(tmp_path, 1, content, {}, lambda name: watched.next(), {}, lambda *_: None)
    assert watched.most <= 2
    assert hashes(native_tensors(tmp_path / "iter_0000001")) == hashes({name: torch.zeros(100) for name in content})


def test_safetensors_are_written_with_one_or_two_tensors_in_memory(tmp_path):
    watched = Watched()
    tensors = {str(i): {"shape": [100], "dtype": "float32"} for i in range(30)}
    write_shards(tmp_path, "model", tensors, 5 * 400, lambda names: (watched.next() for _ in names))
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert watched.most <= 2


def test_one_iteration_directory_can_be_named(tmp_path, capsys):
    run = save_small(tmp_path / "run", iterations=(10, 20))
    assert "iteration 10," in convert(capsys, "native", "safetensors", run / "iter_0000010", tmp_path / "flat")[1]
