"""Runs whose steps grow: the batch with the samples, the length with the iterations, the weight decay with both."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.metrics.reader import read_records
from training import runs

pytestmark = pytest.mark.distributed

RAMP = "--global-batch-size 12 --rampup-batch-size 4 4 16"  # 4 4 8 12 12 ...
CURRICULUM = "--curriculum-learning --curriculum-min-difficulty 4 --curriculum-total-step 4 --curriculum-difficulty-step 4"  # 4 8 12 16 ...
DECAY = "--weight-decay-incr-style cosine --start-weight-decay 0.01 --end-weight-decay 0.3"
EXPERTS = "--moe-expert-lr-mult 0.5 --moe-expert-wd-mult 2"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


def data_of(text) -> str:
    return f"--data-path {text} --vocab-size 64 --split 80,20,0"


def train(world, save, text, flags):
    return run_distributed(runs.train_here, world, f"{data_of(text)} --save {save} {flags}")[0]


def logged(save, *keys, event="train") -> list[tuple]:
    return [tuple(r[k] for k in keys) for r in read_records(save / "metrics.jsonl") if r["event"] == event]


def different(a, b) -> list[str]:
    assert a["tensors"].keys() == b["tensors"].keys()
    return [name for name, t in a["tensors"].items() if not torch.equal(t, b["tensors"][name])]


@pytest.mark.parametrize(("world", "flags"), [(1, ""), (2, "--zero-stage 3 --moe-expert-parallel-size 2")])
def test_a_run_stopped_in_the_middle_of_every_ramp_resumes_bit_for_bit(world, flags, text, tmp_path):
    flags = f"{runs.FP64} {RAMP} {CURRICULUM} {DECAY} {EXPERTS} {flags} --train-samples 60 --lr-decay-tokens 900 --lr-warmup-tokens 60 --lr-warmup-iters 0"
    straight = train(world, tmp_path / "straight", text, flags)
    train(world, tmp_path / "stopped", text, f"{flags} --exit-interval 2")
    resumed = train(world, tmp_path / "stopped", text, f"{flags} --load {tmp_path / 'stopped'}")
    assert resumed["progress"].consumed == (7, 64, 4 * 4 + 4 * 8 + 8 * 12 + 4 * 12 * 16)
    assert different(straight, resumed) == []
    keys = ("iteration", "lm_loss", "grad_norm", "learning_rate", "weight_decay", "global_batch_size", "seq_length")
    assert logged(tmp_path / "straight", *keys) == logged(tmp_path / "stopped", *keys)
    assert logged(tmp_path / "straight", *keys[-2:]) == [(4, 4), (4, 8), (8, 12), (12, 16), (12, 16), (12, 16), (12, 16)]
    decays = [decay for (decay,) in logged(tmp_path / "straight", "weight_decay")]
    assert decays == sorted(decays) and decays[0] > 0.01 and decays[-1] == pytest.approx(0.3)
    rates = logged(tmp_path / "straight", "consumed_tokens", "learning_rate")
    assert rates[0] == (16, pytest.approx(1e-2 * 16 / 60)) and rates[1] == (
        48,
        pytest.approx(1e-2 * 48 / 60),
    )  # tokens that were trained on


@pytest.mark.parametrize("order", ["stable", "megatron"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_order_of_the_data_does_not_depend_on_the_ramp(order, world, text):
    """In every step each rank has its part of the next samples, and what a sample holds is what it holds without the ramp."""
    flags = f"{data_of(text)} --data-order {order} --train-samples 52 --eval-iters 0"
    ramped = run_distributed(runs.read_here, world, f"{flags} {RAMP}")
    plain = run_distributed(runs.read_here, world, f"{flags} --global-batch-size 4")
    by_step = [dict(pair for rank in ramped for pair in rank["steps"][s].items()) for s in range(6)]
    assert [len(step) for step in by_step] == [4, 4, 8, 12, 12, 12]
    numbers = [n for step in by_step for n in sorted(step)]
    assert numbers == list(range(52))
    without = {n: text for rank in plain for step in rank["steps"] for n, text in step.items()}
    assert {n: text for step in by_step for n, text in step.items()} == without


def test_a_curriculum_cuts_samples_and_leaves_evaluation_whole(text, tmp_path):
    flags = f"{data_of(text)} --train-iters 5"
    short = run_distributed(runs.read_here, 1, f"{flags} {CURRICULUM} --save {tmp_path / 'short'}")[0]
    whole = run_distributed(runs.read_here, 1, f"{flags} --save {tmp_path / 'whole'}")[0]
    for length, (cut, full) in zip((4, 8, 12, 16, 16), zip(short["steps"], whole["steps"])):
        assert cut == {n: tokens[: length + 1] for n, tokens in full.items()}
    assert logged(tmp_path / "short", "tokens", event="eval") == logged(tmp_path / "whole", "tokens", event="eval")


def test_a_curriculum_at_full_length_is_none(text, tmp_path):
    flags = f"{runs.FP64} --train-iters 4"
    always = "--curriculum-learning --curriculum-min-difficulty 16 --curriculum-total-step 2"
    assert different(train(1, tmp_path / "a", text, flags), train(1, tmp_path / "b", text, f"{flags} {always}")) == []
