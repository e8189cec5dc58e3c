"""Multi-token prediction from the command line: what is logged, resumed, resharded, started from, generated and refused."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.inference.generate import generate
from megatron_moe.inference.load import load_for_inference
from megatron_moe.inference.sampling import SamplingConfig
from megatron_moe.metrics.reader import read_records
from megatron_moe.training.preflight import prepare
from training import runs

pytestmark = pytest.mark.distributed

AHEAD = "--mtp-num-layers 2 --untie-embeddings-and-output-weights"
PLAIN = "--untie-embeddings-and-output-weights"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def train(world, save, text, flags):
    data = f"--data-path {text} --vocab-size 64 --split 80,20,0"
    return run_distributed(runs.train_here, world, f"{data} --save {save} {runs.FP64} {flags}")[0]["tensors"]


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    save = tmp_path_factory.mktemp("straight")
    return train(1, save, text, f"{AHEAD} --train-iters 8"), save


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    save = tmp_path_factory.mktemp("plain")
    return train(1, save, text, f"{PLAIN} --train-iters 3"), save


def test_losses_are_logged_and_evaluation_is_of_the_next_token_alone(straight):
    records = read_records(straight[1] / "metrics.jsonl")
    steps = [r for r in records if r["event"] == "train"]
    assert [sorted(k for k in r if k.startswith("mtp_")) for r in steps] == [["mtp_1_loss", "mtp_2_loss"]] * 8
    assert all(r[key] == pytest.approx(4.17, abs=0.1) for r in steps for key in ("lm_loss", "mtp_1_loss", "mtp_2_loss"))  # log 64: noise
    assert len({round(steps[0][key], 6) for key in ("lm_loss", "mtp_1_loss", "mtp_2_loss")}) == 3
    assert [layer["layer"] for layer in steps[0]["moe"]] == [2, 3, 4, 5]
    assert all(sum(layer["expert_load"]) == pytest.approx(1, abs=1e-3) for layer in steps[0]["moe"])
    assert all(not any(k.startswith("mtp_") for k in r) for r in records if r["event"] == "eval")


def test_modules_learn(tmp_path):
    """Text whose next words depend on the last one."""
    flags = f"--mock-data --save {tmp_path} --vocab-size 64 {AHEAD} --train-iters 40 --global-batch-size 8 --lr 1e-2 --disable-moe-token-dropping"
    run_distributed(runs.train_here, 1, flags)
    steps = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    for key in ("lm_loss", "mtp_1_loss", "mtp_2_loss"):
        late = sum(r[key] for r in steps[-5:]) / 5
        assert late < steps[0][key] - 0.3, (key, steps[0][key], late)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (2, "--pipeline-model-parallel-size 2"),
        pytest.param(2, "--zero-stage 3 --moe-expert-parallel-size 2", marks=pytest.mark.matrix),
    ],
)
def test_a_run_goes_on_in_another_layout(world, flags, straight, text, tmp_path):
    expected = straight[0]
    train(1, tmp_path, text, f"{AHEAD} --train-iters 8 --exit-interval 4")
    found = train(world, tmp_path, text, f"{AHEAD} --train-iters 8 --load {tmp_path} {flags}")
    for name in found:
        if world == 1:
            assert torch.equal(found[name], expected[name]), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9, msg=name)
    assert world > 1 or found.keys() == expected.keys()


def problems(text, flags) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(parse_args(f"{runs.SMALL} --data-path {text} --vocab-size 64 --train-iters 8 {runs.FP64} {flags}".split()).run, 1)
    return str(error.value)


def test_a_checkpoint_of_another_number_of_modules_is_refused_by_name(straight, plain, text):
    message = problems(text, f"{AHEAD} --load {plain[1]}")
    assert "--mtp-num-layers  -           2" in message
    assert "the checkpoint has no model.mtp.1.*, model.mtp.2.*; give --mtp-num-layers 0 to go on, or --finetune to start" in message
    assert "this run has no model.mtp.2.*; give --mtp-num-layers 2" in problems(text, f"{PLAIN} --mtp-num-layers 1 --load {straight[1]}")
    other = problems(text, f"{AHEAD} --finetune --num-attention-heads 2 --load {plain[1]}")
    assert "num-attention-heads" in other and "mtp" not in other


def test_finetuning_takes_what_both_have_and_says_what_it_has_not(straight, plain, text, tmp_path):
    still = "--finetune --train-iters 1 --lr 1e-30 --min-lr 0 --lr-warmup-iters 0"
    for name, flags, start in (("with", f"{AHEAD} --load {plain[1]}", plain[0]), ("without", f"{PLAIN} --load {straight[1]}", straight[0])):
        found = train(1, tmp_path / name, text, f"{flags} {still}")
        shared = {n for n in found if n.startswith("model.") and ".mtp." not in n}
        assert len(shared) > 20
        for n in shared:
            torch.testing.assert_close(found[n], start[n], rtol=0, atol=1e-20, msg=n)
        assert any(n.startswith("model.mtp.") for n in found) is (name == "with")
        said = [r["reason"] for r in read_records(tmp_path / name / "metrics.jsonl") if r["event"] == "alert"]
        assert any("--mtp-num-layers is " in reason for reason in said), said


def test_generation_has_no_modules_and_the_model_s_own_logits(straight):
    loaded = load_for_inference(straight[1])
    assert loaded.run.model.mtp_num_layers == 2 and len(loaded.model.mtp) == 0
    for name, p in loaded.model.named_parameters():
        assert torch.equal(p, straight[0][f"model.{name}"]), name
    assert len(generate(loaded.model, [[1, 2]], 5, SamplingConfig(greedy=True))[0]) == 5


def test_the_tree_of_a_checkpoint_shows_the_modules(straight, capsys):
    from tools import inspect_checkpoint

    assert inspect_checkpoint.main(["--load", str(straight[1])]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {"mtp.1", "mtp.2", "layers.3", "block.attn.q_proj.weight", "embedding_norm.weight"} <= set(lines)


def test_settings_that_cannot_be_meant():
    parsed = parse_args(f"{runs.SMALL} --mock-data --train-iters 1 --mtp-loss-scaling-factor 0.3".split())
    assert "--mtp-loss-scaling-factor has no effect: it is a setting of --mtp-num-layers" in " ".join(parsed.warnings)
    with pytest.raises(ConfigError, match=r"--mtp-num-layers \(16\) must be less than --seq-length \(16\)"):
        parse_args(f"{runs.SMALL} --mock-data --train-iters 1 --mtp-num-layers 16".split())


def test_zero_bubble_is_refused_with_the_reason():
    flags = "--mtp-num-layers 1 --pipeline-model-parallel-size 2 --enable-zbh1-pipeline"
    with pytest.raises(ConfigError, match="does not go with the zero-bubble schedule: torch splits the backward of the last stage"):
        parse_args(f"{runs.SMALL} --mock-data --train-iters 1 {flags}".split())
