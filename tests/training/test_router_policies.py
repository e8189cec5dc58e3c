"""Runs with each routing policy: they train, log what the policy promises, keep their bias, and name the layer whose logits break."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.checkpoint.files import read_manifest
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.flags import ConfigError
from megatron_moe.metrics.reader import read_records
from megatron_moe.moe.layer import moe_layers
from megatron_moe.training import pretrain
from training import launches, runs

pytestmark = pytest.mark.distributed

RUN = "--mock-data --vocab-size 64 --eval-interval 10 --mlp-type standard"
BIAS = (
    "--topk 1 --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.03 --moe-loss-coeff 0 "
    "--moe-router-topk-scaling-factor 2.0"
)


@pytest.mark.parametrize("policy", ["topk", "expert_choice", "hash", "sinkhorn", "balanced", "zipf"])
@pytest.mark.parametrize("k", [1, 2])
def test_twenty_iterations_train_and_the_log_shows_what_the_layer_does(policy, k, tmp_path):
    flags = f"{RUN} --num-experts 1 4 4 --topk {k} --moe-router-policy {policy} --train-iters 20 --save {tmp_path}/run"
    done = run_distributed(runs.train_here, 1, flags)[0]
    assert done["progress"].iteration == 20
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [r["lm_loss"] for r in records if r["event"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    evaluations = [r["lm_loss"] for r in records if r["event"] == "eval"]
    assert evaluations[-1] < evaluations[0] and all(map(math.isfinite, evaluations))
    layers = [layer for r in records if r["event"] == "train" for layer in r["moe"]]
    if policy in ("expert_choice", "balanced"):
        assert {layer["load_max_over_mean"] for layer in layers} == {1.0}
    if policy == "zipf":
        assert sum(layer["load_max_over_mean"] for layer in layers) / len(layers) > 1.2
    gate = done["tensors"]["optimizer.exp_avg.layers.2.moe.gate.weight"]
    assert gate.any() != (policy == "hash")  # moments of the router: zero where it decides nothing


@pytest.mark.parametrize("policy", ["expert_choice", "hash"])
def test_the_program_trains_the_preset_and_says_what_has_to_be_said(policy, tmp_path):
    flags = f"--preset tiny --mock-data --train-iters 20 --moe-router-policy {policy} --num-workers 0"
    code, said = launches.end(launches.start(flags, scratch=tmp_path), tmp_path, 200)
    assert code == 0, said[-3000:]
    assert ("looks ahead in a causal model" in said) == (policy == "expert_choice")
    assert "iteration" in said


def train(world, save, flags):
    return run_distributed(runs.train_here, world, f"{RUN} --num-experts 1 4 4 {BIAS} --save {save} {flags}")[0]["tensors"]


def biases(tensors):
    return {name: t for name, t in tensors.items() if name.endswith("expert_bias")}


@pytest.mark.parametrize("flags", ["--bf16", f"{runs.FP64} --zero-stage 3"])
def test_the_bias_moves_stays_float32_and_resumes_exactly(flags, tmp_path):
    straight = train(1, tmp_path / "straight", f"{flags} --train-iters 8")
    train(1, tmp_path / "stopped", f"{flags} --train-iters 8 --exit-interval 4")
    resumed = train(1, tmp_path / "stopped", f"{flags} --train-iters 8 --load {tmp_path / 'stopped'}")
    assert len(biases(straight)) == 2
    for bias in biases(straight).values():
        assert bias.dtype == torch.float32
        assert bias.any()
        assert (bias.abs() / 0.03 - (bias.abs() / 0.03).round()).abs().max() < 1e-4  # whole steps
    assert all(torch.equal(t, resumed[name]) for name, t in straight.items())


def test_the_bias_is_saved_once_and_loads_under_another_layout(tmp_path):
    ep2 = "--zero-stage 3 --moe-expert-parallel-size 2"
    saved = train(2, tmp_path / "run", f"{runs.FP64} {ep2} --train-iters 4")
    entries = read_manifest(tmp_path / "run" / "iter_0000004").tensors
    assert [(e["shape"], e["dtype"]) for name, e in entries.items() if name.endswith("expert_bias")] == [([4], "float32")] * 2
    tp2 = "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2"
    loaded = train(2, tmp_path / "loaded", f"{runs.FP64} {tp2} --load {tmp_path / 'run'} --train-iters 4")
    assert biases(saved) and all(torch.equal(b, loaded[name]) for name, b in biases(saved).items())


def test_a_checkpoint_is_not_read_without_its_bias(tmp_path):
    train(1, tmp_path / "run", "--train-iters 4")
    flags = f"{RUN} --num-experts 1 4 4 --topk 1 --train-iters 6 --load {tmp_path / 'run'}"
    with pytest.raises(ConfigError, match=r"--moe-router-enable-expert-bias +True +-"):
        run_distributed(runs.train_here, 1, flags)


def _broken_from_layer(layer: int, step: int, flags: str) -> str:
    """A run in which the router of one layer breaks before a step."""
    original = pretrain.train_step

    def train_step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest):
        if iteration == step - 1:
            for moe in (m for m in moe_layers(model) if m.layer == layer):  # on one stage of a pipeline
                weight = model_state(moe)["model.gate.weight"]
                with torch.no_grad():
                    (weight.to_local() if hasattr(weight, "to_local") else weight).fill_(float("nan"))
        return original(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest)

    with mock.patch.object(pretrain, "train_step", train_step):
        try:
            runs.train_here(flags)
        except FloatingPointError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(("world", "layout"), [(1, ""), (2, "--moe-expert-parallel-size 2"), (2, "--pipeline-model-parallel-size 2")])
def test_broken_logits_stop_the_run_and_name_layer_step_and_remedy(world, layout, tmp_path):
    flags = f"{RUN} --num-experts 4 --topk 2 --train-iters 6 --log-interval 1 {layout} --save {tmp_path}/run --save-interval 2"
    for told in run_distributed(_broken_from_layer, world, 2, 4, flags):
        assert "iteration 4" in told and "layer 2 is the first whose router logits are not finite" in told and "--lr" in told, told
    stop = next(r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "stop")
    assert stop["reason"].endswith("layer 2 is the first whose router logits are not finite")
    assert not (tmp_path / "run" / "iter_0000004").exists()
