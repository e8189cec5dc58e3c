"""tools/edit_experts.py from its command line; what it writes is trained on, in one process and in two, and generates."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversion.small import native_tensors, save_small
from distributed_pool import run_distributed
from training import runs

from megatron_moe.checkpoint.files import read_manifest
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference
from megatron_moe.metrics.reader import read_records
from tools import edit_experts

SMALL = {"num_experts": (4,), "mlp_type": "standard", "topk": 2, "moe_top2_2nd_expert_sampling": False}


def edit(capsys, *words) -> tuple[int, str, str]:
    try:
        code = edit_experts.main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    out = capsys.readouterr()
    return code, out.out, out.err


def log_loads(directory, *loads) -> None:
    """As a run logs them: of the layers in order."""
    moe = [{"layer": i, "expert_load": shares} for i, shares in enumerate(loads, start=1)]
    (directory / "metrics.jsonl").write_text(json.dumps({"event": "train", "iteration": 10, "moe": moe}) + "\n")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    directory = save_small(tmp_path_factory.mktemp("runs") / "run", **SMALL)
    log_loads(directory, [0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4])
    return directory


@pytest.fixture
def small(tmp_path, unchanged):
    return shutil.copytree(unchanged, tmp_path / "run")


def experts_of(directory) -> list[int]:
    return read_manifest(directory / "iter_0000010").meta["architecture"]["experts_per_layer"]


def test_prune_by_the_load_that_the_run_has_logged(capsys, small, tmp_path):
    code, out, _ = edit(capsys, "prune", "--load", small, "--save", tmp_path / "new", "--keep", 3, "--verify")
    assert code == 0 and experts_of(tmp_path / "new") == [3, 3]
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "4", "3", "-1", "(10", "%)"] in rows and ["2", "4", "3", "-0", "(10", "%)"] in rows
    assert "logits of 32 tokens of README.md: up to" in out and "nats per token" in out and "compared bit by bit" in out
    assert f"--load {tmp_path / 'new'} --save {tmp_path / 'new'} --num-experts 3" in out


def test_load_that_is_measured_on_a_text(capsys, small, tmp_path):
    (tmp_path / "text").write_text("To be or not to be, that is the question. " * 40)
    code, out, _ = edit(capsys, "prune", "--load", small, "--keep", 3, "--text", tmp_path / "text", "--measure-tokens", 1000, "--dry-run")
    assert code == 0 and "load: measured on 992 tokens of" in out and "nothing was written" in out
    code, _, err = edit(capsys, "prune", "--load", small, "--keep", 3, "--data-prefix", tmp_path / "no", "--dry-run")
    assert code == 2 and "no.idx" in err


def test_load_that_is_not_known_is_asked_for(capsys, small, tmp_path):
    (small / "metrics.jsonl").unlink()
    code, _, err = edit(capsys, "prune", "--load", small, "--keep", 3, "--save", tmp_path / "new")
    assert code == 2 and "the load of the experts is not known" in err and "--text FILE" in err
    code, out, _ = edit(capsys, "prune", "--load", small, "--experts", "all:0", "2:3", "--save", tmp_path / "new")
    assert code == 0 and experts_of(tmp_path / "new") == [3, 2]
    assert "--equal-weights" in edit(capsys, "merge", "--load", small, "--keep", 3, "--save", tmp_path / "b")[2]
    assert edit(capsys, "merge", "--load", small, "--keep", 3, "--save", tmp_path / "b", "--equal-weights", "--layers", 2)[0] == 0
    assert experts_of(tmp_path / "b") == [4, 3]


def test_every_action_says_what_it_did(capsys, small, tmp_path):
    shown = {
        ("merge", "--pairs", "2:0+3"): "0 (10 %) + 3 (40 %)",
        ("duplicate", "--experts", "1:3"): "3 (30 %) again",
        ("add", "--count", "2", "--layers", "2"): "2 new",
    }
    for i, (words, changed) in enumerate(shown.items()):
        code, out, _ = edit(capsys, *words, "--load", small, "--save", tmp_path / str(i))
        assert code == 0 and changed in out, words
    assert [experts_of(tmp_path / str(i)) for i in range(3)] == [[4, 3], [5, 4], [4, 6]]


def test_without_a_report_no_model_is_built(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setattr(edit_experts, "read_with", lambda *_: pytest.fail("a model was built"))
    code, out, _ = edit(capsys, "prune", "--load", small, "--save", tmp_path / "new", "--keep", 3, "--no-report")
    assert code == 0 and "load: the mean of 1 logged steps" in out and "logits" not in out
    assert "--no-report reads no text" in edit(capsys, "prune", "--load", small, "--keep", 3, "--no-report", "--data-prefix", "x")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "--keep", "3", "--experts", "1:0"], "give either --keep or --experts, not both"),
        (["prune"], "give either --keep or --experts"),
        (["prune", "--experts", "1-0"], "--experts wants LAYER:EXPERT,EXPERT such as 2:1,5 or all:0, not '1-0'"),
        (["merge", "--pairs", "1:0"], "--pairs wants LAYER:EXPERT+EXPERT"),
        (["duplicate"], "--experts is missing"),
        (["add"], "--count is missing"),
        (["grow"], "one of prune, merge, duplicate, add, not 'grow'"),
        (["prune", "--experts", "3:0"], "layer 3 has no experts; these have: 1, 2"),
        (["prune", "--experts", "2:4"], "layer 2 has 4 experts, from 0 on: there is no 4"),
        (["duplicate", "--experts", "2:1,1"], "layer 2: 1 named twice"),
        (["merge", "--pairs", "2:0+1,1+2"], "layer 2: 1 named twice"),
        (["prune", "--keep", "4"], "nothing to prune"),
        (["prune", "--keep", "2", "--topk", "3"], "--topk (3) cannot exceed"),
        (["prune", "--experts", "2:0,1,2"], "at least two"),
        (["prune", "--keep", "3", "--iteration", "7"], "no checkpoint of iteration 7; there are 10"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(capsys, small, tmp_path, words, said):
    code, _, err = edit(capsys, words[0], "--load", small, "--save", tmp_path / "new", *words[1:])
    assert code == 2 and said in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_target_that_is_there_and_a_dense_model_are_refused(capsys, small, tmp_path):
    assert "is not empty" in edit(capsys, "prune", "--keep", 3, "--load", small, "--save", small)[2]
    dense = save_small(tmp_path / "dense", num_experts=(1,), mlp_type="standard", topk=1)
    assert "is a dense model" in edit(capsys, "prune", "--keep", 3, "--load", dense, "--save", tmp_path / "new")[2]
    assert not (tmp_path / "new").exists()


def test_a_changed_byte_of_the_source_is_named(capsys, small, tmp_path):
    shard = next((small / "iter_0000010").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, err = edit(capsys, "prune", "--keep", 3, "--load", small, "--save", tmp_path / "new")
    assert code == 2 and "CRC-32 mismatch" in err and not (tmp_path / "new").exists()


# ---------------------------------------------------------------- multi-token prediction


def test_blocks_of_multi_token_prediction_keep_step_with_the_last_layer(capsys, tmp_path):
    run = save_small(tmp_path / "run", num_experts=(4,), topk=1, mtp_num_layers=1)  # layer 3 is the module's
    log_loads(run, [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.3, 0.1, 0.2, 0.4])
    code, out, err = edit(capsys, "prune", "--load", run, "--save", tmp_path / "new", "--keep", "2")
    assert code == 0, err
    before, after = (native_tensors(next(d.glob("iter_*"))) for d in (run, tmp_path / "new"))
    for slot in ("model", "optimizer.exp_avg"):
        for name in ("moe.gate.weight", "moe.experts.w1", "moe.experts.b2"):
            for layer, rows in (("layers.1", [0, 1]), ("layers.2", [2, 3]), ("mtp.1.block", [0, 3])):
                assert torch.equal(after[f"{slot}.{layer}.{name}"], before[f"{slot}.{layer}.{name}"][rows]), (slot, layer, name)
    assert torch.equal(after["model.mtp.1.proj.weight"], before["model.mtp.1.proj.weight"])
    code, _, err = edit(capsys, "prune", "--load", run, "--save", tmp_path / "other", "--experts", "2:0")
    assert code == 2 and "layer 3 is a block of multi-token prediction" in err and "would have 4 where layer 2 has 3" in err
    assert edit(capsys, "prune", "--load", run, "--save", tmp_path / "both", "--experts", "2:0", "3:1")[0] == 0
    assert edit(capsys, "merge", "--load", run, "--save", tmp_path / "merged", "--keep", "3")[0] == 0
    (tmp_path / "text").write_text("of which a module says nothing " * 20)
    code, _, err = edit(capsys, "prune", "--load", run, "--save", tmp_path / "third", "--keep", "2", "--text", tmp_path / "text")
    assert code == 2 and "layer 3, of multi-token prediction, does not run on a text" in err
    assert len(generate(load_for_inference(tmp_path / "new").model, [[1, 2]], 3, SamplingConfig(greedy=True))[0]) == 3


# ---------------------------------------------------------------- what comes after


FLAGS = (
    f"{runs.FP64} --mlp-type residual --num-layers 2 --topk 2 --disable-moe-top2-2nd-expert-sampling --lr-warmup-iters 0 --mock-data "
    "--vocab-size 64 --eval-iters 0 --lr-decay-iters 9"
)


@pytest.mark.distributed
def test_the_edited_run_trains_on_in_any_layout_and_generates(capsys, tmp_path):
    first, new = tmp_path / "first", tmp_path / "new"
    run_distributed(runs.train_here, 2, f"{FLAGS} --num-experts 4 --moe-expert-parallel-size 2 --train-iters 3 --save {first}")
    for words in (["prune", "--experts", "1:2,3"], ["duplicate", "--experts", "1:0,1", "2:3,1"]):
        source, first = first, (new if words[0] == "duplicate" else tmp_path / "pruned")
        assert edit(capsys, words[0], "--load", source, "--save", first, *words[1:])[0] == 0
    on = f"{FLAGS} --num-experts 4 6 --load {new} --train-iters 5"
    alone = run_distributed(runs.train_here, 1, f"{on} --save {tmp_path / 'alone'}")[0]
    spread = run_distributed(runs.train_here, 2, f"{on} --save {tmp_path / 'spread'} --moe-expert-parallel-size 2 --zero-stage 2")[0]
    assert alone["progress"].iteration == spread["progress"].iteration == 5
    for name, t in alone["tensors"].items():
        assert torch.allclose(t, spread["tensors"][name], rtol=0, atol=1e-10), name
    logged = [r["iteration"] for r in read_records(tmp_path / "alone" / "metrics.jsonl") if r["event"] == "train"]
    assert logged == [4, 5], "it goes on where the run was"
    loaded = load_for_inference(new)
    assert loaded.run.moe.num_experts == (4, 6)
    (answer,) = generate(loaded.model, [[1, 2, 3]], 5, SamplingConfig(greedy=True))
    assert len(answer) == 5
