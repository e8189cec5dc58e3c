"""--load-hf: training starts from a transformers folder, in any layout, and what contradicts the folder is an error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversion.small import convert, native_tensors
from conversion.test_hf import F, V, mixtral_tensors, write_folder, write_tokenizer
from distributed_pool import run_distributed

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from megatron_moe.metrics.reader import read_records
from megatron_moe.training.preflight import prepare
from training import runs

TRAINING = (
    "--micro-batch-size 2 --global-batch-size 4 --seq-length 16 --lr 1e-30 --weight-decay 0 --eval-iters 0 --log-interval 1 --num-workers 0 "
    "--split 100,0,0 --params-dtype float32 --train-iters 1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("hf") / "mixtral", mixtral_tensors())
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document", vocab_size=60)


def start(world, folder, save, text, flags=""):
    """Tensors of all ranks together, and the loss of the first step; the rate is so small that no weight moves."""
    ranks = run_distributed(runs.train_here, world, f"--load-hf {folder} --data-path {text} --save {save} {TRAINING} {flags}", "")
    (loss,) = (r["lm_loss"] for r in read_records(save / "metrics.jsonl") if r["event"] == "train")
    return {name: t for rank in ranks for name, t in rank["tensors"].items() if name.startswith("model.")}, loss


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (2, "--zero-stage 3 --moe-expert-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        pytest.param(2, "--tensor-model-parallel-size 2 --zero-stage 0", marks=pytest.mark.matrix),
        pytest.param(4, "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --zero-stage 2", marks=pytest.mark.matrix),
    ],
)
def test_training_starts_with_the_weights_of_the_folder_in_any_layout(world, flags, folder, text, tmp_path, capsys):
    assert convert(capsys, "hf", "native", folder, tmp_path / "native")[0] == 0
    expected = native_tensors(tmp_path / "native" / "iter_0000000")
    tensors, loss = start(world, folder, tmp_path / "run", text, flags)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())
    again = f"--load {tmp_path / 'native'} --finetune --data-path {text} --save {tmp_path / 'again'} {TRAINING} --load-hf {folder}"
    run_distributed(runs.train_here, 1, again, "")
    (plain,) = (r["lm_loss"] for r in read_records(tmp_path / "again" / "metrics.jsonl") if r["event"] == "train")
    assert abs(loss - plain) < 2e-2  # bfloat16


@pytest.mark.distributed
def test_modules_of_multi_token_prediction_start_from_initial_weights(folder, text, tmp_path, capsys):
    assert convert(capsys, "hf", "native", folder, tmp_path / "native")[0] == 0
    expected = native_tensors(tmp_path / "native" / "iter_0000000")
    tensors, _ = start(1, folder, tmp_path / "run", text, "--mtp-num-layers 1")
    assert {name for name in tensors if ".mtp." not in name} == expected.keys()
    assert all(torch.equal(tensors[name], t) for name, t in expected.items())
    assert 0 < float(tensors["model.mtp.1.proj.weight"].std()) < 1 and bool((tensors["model.mtp.1.norm.weight"] == 1).all())


@pytest.mark.distributed
def test_the_run_goes_on_from_its_own_checkpoint_and_says_so(folder, text, tmp_path):
    flags = f"--load-hf {folder} --data-path {text} --save {tmp_path / 'run'} --load {tmp_path / 'run'} {TRAINING}"
    first = run_distributed(runs.train_here, 1, flags.replace("--lr 1e-30", "--lr 1e-2"), "")[0]
    second = run_distributed(runs.train_here, 1, flags.replace("--train-iters 1", "--train-iters 2"), "")[0]
    assert second["progress"].iteration == 2
    name = "model.layers.1.attn.q_proj.weight"
    assert torch.equal(first["tensors"][name], second["tensors"][name])
    notes = [r["reason"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "alert"]
    assert any("is for a first start: the run goes on from" in note for note in notes)


def parsed(folder, flags=""):
    return parse_args(f"--load-hf {folder} --mock-data --train-iters 1 --micro-batch-size 1 {flags}".split()).run


def test_the_folder_says_what_the_model_is_and_training_stays_free(folder):
    run = parsed(folder, "--hidden-dropout 0.1 --lr 1e-4 --moe-loss-coeff 0.02 --num-experts 4 --make-vocab-size-divisible-by 64")
    assert (run.model.hidden_size, run.moe.num_experts, run.moe.topk, run.training.bf16) == (16, (4,), 2, True)
    assert (run.model.hidden_dropout, run.moe.moe_loss_coeff, run.training.seq_length) == (0.1, 0.02, 64)
    assert run.tokenizer.tokenizer_model == str(folder / "tokenizer.json")
    assert prepare(run, 1).vocab_size == V
    assert parsed(folder, "--tokenizer-type ByteTokenizer").tokenizer.tokenizer_model is None
    assert not parsed(folder, "--fp16").training.bf16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden-size 32", "--hidden-size 32 on the command line contradicts {}/config.json, which makes it --hidden-size 16; drop it"),
        ("--num-experts 8", "--num-experts 8 on the command line contradicts {}/config.json, which makes it --num-experts 4"),
        ("--rope-theta 500", "--rotary-base 500.0 on the command line contradicts {}/config.json, which makes it --rotary-base 1000000.0"),
        ("--activation-func relu", "the activation is asked to be relu and swiglu"),
        ("--moe-router-score-function sigmoid", "--moe-router-score-function is sigmoid in this command, and softmax in {}/config.json"),
        ("--qk-layernorm", "--qk-layernorm is True in this command, and False in {}/config.json; drop what changes it"),
        (
            "--moe-use-upcycling",
            "--load-hf {} has experts already (4, says config.json), and --moe-use-upcycling starts from a dense model",
        ),
    ],
)
def test_a_flag_that_contradicts_the_folder_is_named_with_what_it_says(flags, message, folder):
    with pytest.raises(ConfigError) as refused:
        parsed(folder, flags)
    assert message.format(folder) in str(refused.value)


def test_a_broken_folder_is_named_before_anything_starts(folder, tmp_path):
    with pytest.raises(ConfigError, match="there is no such directory"):
        parsed(tmp_path / "nowhere")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors: missing"):
        prepare(parsed(broken), 1)
    content = json.loads((broken / "config.json").read_text()) | {"hidden_size": "x", "intermediate_size": F}
    (broken / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="hidden_size must be a whole number"):
        parsed(broken)
