"""Parameters, gradients and optimizer state by formula are those of the model that the recipe builds."""

from __future__ import annotations

import itertools

import pytest
from distributed import parity

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.training.plan import rank_footprint
from megatron_moe.training.planning.layout import of_run
from megatron_moe.training.planning.states import states

COMPONENTS = ("parameters", "gathered", "gradients", "whole_gradients", "optimizer")
MODELS = ("pyramid", "modern", "shared", "latent", "qk_heads", "qk_hidden", "latent_heads", "windows")
# (TP, EP, ETP, CP, PP, replicas): what is not built yet is refused by the configuration, and left out below
DEGREES = [
    (1, 1, 1, 1, 1, 1), (1, 2, 1, 1, 1, 1), (1, 4, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1), (2, 4, 1, 1, 1, 1), (4, 2, 1, 1, 1, 1),
    (2, 2, 2, 1, 1, 1), (1, 2, 1, 2, 1, 1), (1, 2, 1, 1, 3, 1), (1, 2, 1, 1, 1, 2), (2, 2, 1, 1, 1, 2),
]  # fmt: skip


def laid_out(model: str, world: int, degrees: tuple[int, ...], zero: int, more: str = "") -> RunConfig | None:
    tp, ep, etp, cp, pp, replicas = degrees
    flags = (
        f"--tensor-model-parallel-size {tp} --moe-expert-parallel-size {ep} --expert-tensor-parallel-size {etp} --context-parallel-size {cp} "
        f"--pipeline-model-parallel-size {pp} --num-distributed-optimizer-instances {replicas} --zero-stage {zero} --micro-batch-size 1 "
        f"--global-batch-size {world} --seq-length 16 {more}"
    )
    try:
        run = parity.config(model, flags)
    except ConfigError:
        return None
    return None if list(run.world_problems(world)) else run


def compare(model: str, world: int, degrees: tuple[int, ...], zero: int, more: str = "") -> bool:
    run = laid_out(model, world, degrees, zero, more)
    if run is None:
        return False
    built, counted = rank_footprint(run, world, parity.VOCAB, 0), states(run, of_run(run, world), parity.VOCAB)
    for name in COMPONENTS:
        assert getattr(counted, name) == getattr(built, name), f"{name}: {model} on {world}, {degrees}, ZeRO {zero} {more}"
    assert counted.elements == built.dense_parameters + built.expert_parameters
    return True


@pytest.mark.parametrize("model", MODELS)
def test_states_are_those_of_the_built_model(model):
    """A selection that differs from model to model and meets every degree, stage and type."""
    cases = list(itertools.product((1, 4, 8), DEGREES, (0, 1, 2, 3)))
    mine = cases[MODELS.index(model) :: len(MODELS)]
    compared = [compare(model, world, degrees, zero, ("", "--bf16")[i % 2]) for i, (world, degrees, zero) in enumerate(mine)]
    assert sum(compared) >= 6


@pytest.mark.parametrize("model", ["ahead", "ahead_untied"])
def test_states_of_the_last_stage_have_multi_token_prediction(model):
    for pp, zero in ((1, 1), (1, 3), (3, 0), (3, 3)):
        run = laid_out(model, 6, (1, 2, 1, 1, pp, 1), zero)
        built, counted = rank_footprint(run, 6, parity.VOCAB, 6 - 6 // pp), states(run, of_run(run, 6), parity.VOCAB, pp - 1)
        for name in COMPONENTS:
            assert getattr(counted, name) == getattr(built, name), f"{name}: {model}, PP {pp}, ZeRO {zero}"


def test_every_kind_of_optimizer_state_is_counted():
    for more in ("--optimizer sgd --sgd-momentum 0", "--optimizer sgd"):
        assert compare("modern", 4, (2, 2, 1, 1, 1, 1), 1, more)
