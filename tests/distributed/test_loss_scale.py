"""A loss scale is not seen by a run that does not overflow, and an overflow anywhere skips the step everywhere.

The first part is in float64, where a power of two changes no digit: what differs is a factor that was forgotten. The second part
provokes overflows on one rank alone, before the gradients are reduced or in one shard behind it.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from host_syncs import HostSyncs
from training import runs

from distributed import parity
from megatron_moe.checkpoint.state import model_state, optimizer_state
from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.moe.layer import MoELayer
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training import step as steps
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

EP2, EP4, TP2 = "--moe-expert-parallel-size 2", "--moe-expert-parallel-size 4", "--tensor-model-parallel-size 2"
SCALE = 2.0**16

# ---------------------------------------------------------------- not seen

SCALED = [
    ("losses", 1, ""),
    ("losses", 2, f"--zero-stage 2 {EP2}"),
    ("pyramid", 4, f"--zero-stage 3 {TP2} {EP4} --recompute-granularity full"),
    ("deepseek", 2, f"--zero-stage 1 {TP2} {EP2}"),
    ("student", 2, f"--zero-stage 1 {EP2}"),
    ("muon", 2, f"--zero-stage 3 {TP2}"),
    ("ahead_untied", 2, f"--pipeline-model-parallel-size 2 {parity.DOCUMENTS}"),
]


@pytest.mark.parametrize(("model", "world", "flags"), SCALED, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_a_scaled_layout_equals_one_process_without_a_scale(model, world, flags):
    found = run_distributed(parity.layout, world, model, f"{parity.FP64} {flags}", SCALE)[0]
    parity.check(found, parity.expected(model, world, flags), 1e-10)


# ---------------------------------------------------------------- overflows


def bad_loss(at: int):
    """The last rank's loss is infinite in step `at`."""
    original = steps.language_model_loss

    def objective(model, batch, keys, divisor):
        loss, lm_loss = original(model, batch, keys, divisor)
        return (loss * float("inf") if step_of.number == at and dist.get_rank() == dist.get_world_size() - 1 else loss), lm_loss

    return mock.patch.object(steps, "language_model_loss", objective)


def bad_shard(at: int):
    """One element of a reduced gradient of the last rank is no number in step `at`."""
    original = steps.gradient_norm

    def norm(parameters, ranks):
        parameters = list(parameters)
        if step_of.number == at and dist.get_rank() == dist.get_world_size() - 1:
            grads = [parity_local(p.grad) for p in parameters]
            next(g for g in grads if g.numel()).view(-1)[0] = float("nan")
        return original(parameters, ranks)

    return mock.patch.object(steps, "gradient_norm", norm)


def parity_local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


class step_of:  # noqa: N801 - a place for one number that the patches above read
    number = 0


def moved(model_name: str, flags: str, where: str, fault=None) -> tuple[list[list[str]], float, int]:
    """Names of the local tensors that each of four steps has changed; the scale and the number of skipped steps after them."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    optimizer, loss_scale = build_optimizer(model, c.optimizer), LossScale(LossScaleConfig(initial_loss_scale=1024.0, hysteresis=1))
    changed = []

    def everything() -> dict[str, torch.Tensor]:
        return {n: parity_local(t).detach().clone() for n, t in (model_state(model) | optimizer_state(model, optimizer)).items()}

    with {"loss": bad_loss, "shard": bad_shard}[where](2), fault() if fault else mock.patch.dict({}):
        for step_of.number in range(4):
            batches = parity.microbatches(step_of.number, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
            before = everything()
            train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, step_of.number, loss_scale=loss_scale)
            after = everything()
            changed.append([n for n, t in before.items() if not torch.equal(t, after[n])])
    scale, skipped, _ = loss_scale.numbers()
    return changed, scale, skipped


OVERFLOWS = [
    ("deepseek", 2, f"--zero-stage 1 {EP2}", "loss"),
    ("deepseek", 2, f"--zero-stage 0 {TP2} {EP2}", "shard"),
    ("pyramid", 4, f"--zero-stage 3 {TP2} {EP4}", "shard"),
    ("pyramid", 4, f"--zero-stage 3 {EP4} --fp16", "loss"),
    ("muon", 2, f"--zero-stage 3 {EP2}", "shard"),
    ("sgd", 2, f"--zero-stage 2 {EP2}", "loss"),
]


@pytest.mark.parametrize(("model", "world", "flags", "where"), OVERFLOWS, ids=lambda v: str(v).replace("--", "").replace(" ", "_"))
def test_an_overflow_on_one_rank_skips_the_step_on_all(model, world, flags, where):
    for changed, scale, skipped in run_distributed(moved, world, model, flags, where):
        assert changed[2] == []
        assert (scale, skipped) == (512.0, 1)
        for step in (0, 1, 3):
            assert any(n.startswith("model.") for n in changed[step]) and any(n.startswith("optimizer.") for n in changed[step])
            assert model != "deepseek" or any(n.endswith("expert_bias") for n in changed[step])


# ---------------------------------------------------------------- planted faults


@contextmanager
def auxiliary_losses_not_scaled():
    original = MoELayer.begin_step
    with mock.patch.object(MoELayer, "begin_step", lambda self, weight: original(self, weight / SCALE)):
        yield


@contextmanager
def scale_not_undone_before_the_norm():
    with mock.patch.object(LossScale, "unscaled", lambda self, norm: (norm, (~norm.isfinite()).float())):
        yield


@contextmanager
def scale_not_undone_in_the_gradients():
    original = steps.clip_gradients
    with mock.patch.object(steps, "clip_gradients", lambda grads, norm, most, scale=None: original(grads, norm, most)):
        yield


@contextmanager
def overflow_not_shared():
    """Each rank looks at its own gradients alone, as after a norm that was not reduced."""

    def unscaled(self, norm):
        own = step_of.number == 2 and dist.get_rank() == dist.get_world_size() - 1
        return norm / self.scale, torch.tensor(float(own))

    with mock.patch.object(LossScale, "unscaled", unscaled):
        yield


@contextmanager
def moments_moved_in_a_skipped_step():
    """The gradients are zeroed and the step is made."""

    def update(optimizer, found_inf):
        for group in optimizer.param_groups:
            for p in group["params"]:
                parity_local(p.grad).masked_fill_(found_inf > 0, 0.0)
        optimizer.step()

    with mock.patch.object(steps, "update_weights", update):
        yield


@contextmanager
def bias_moved_in_a_skipped_step():
    original = steps.move_expert_biases
    with mock.patch.object(steps, "move_expert_biases", lambda model, mesh, found_inf=None: original(model, mesh)):
        yield


def layout_with(fault, model: str, flags: str):
    with fault():
        return parity.layout(model, flags, SCALE)


@pytest.mark.parametrize(
    ("fault", "seen_in", "at_least"),
    [
        (auxiliary_losses_not_scaled, "gradient layers.3.moe.gate.weight", 0.01),
        (scale_not_undone_before_the_norm, "norm 1", 1e4),
        (scale_not_undone_in_the_gradients, "weight layers.1.mlp.fc1.weight", 1e-3),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_planted_fault_is_seen_in_a_scaled_layout(fault, seen_in, at_least):
    model, world, flags = SCALED[1]
    found = run_distributed(layout_with, world, fault, model, f"{parity.FP64} {flags}")[0]
    assert parity.errors(found, parity.expected(model, world, flags))[seen_in] > at_least


@pytest.mark.parametrize("fault", [overflow_not_shared, moments_moved_in_a_skipped_step, bias_moved_in_a_skipped_step],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_planted_fault_is_seen_in_a_skipped_step(fault):
    model, world, flags, where = OVERFLOWS[1]
    assert any(changed[2] for changed, *_ in run_distributed(moved, world, model, flags, where, fault))


# ---------------------------------------------------------------- without a wait, and in whole runs


def waits(optimizer: str) -> list[str]:
    c = parity.config("deepseek", f"--optimizer {optimizer} --fp16 {EP2} --moe-token-dispatcher allgather")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    optimizer, loss_scale = build_optimizer(model, c.optimizer), LossScale(LossScaleConfig())
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, 0, loss_scale=loss_scale)
    with HostSyncs() as syncs:
        train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, 1, loss_scale=loss_scale)
    return syncs.seen


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_decision_costs_no_wait(optimizer):
    assert run_distributed(waits, 2, optimizer) == [[], []]


FP16 = "--mock-data --fp16 --eval-iters 0 --loss-scale-window 3 --moe-expert-parallel-size 2"


def records(directory) -> list[dict]:
    lines = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    return [r for r in lines if r["event"] == "train"]


def test_a_run_in_float16_skips_until_the_scale_fits_and_resumes_exactly(tmp_path):
    whole = run_distributed(runs.train_here, 2, f"{FP16} --train-iters 30 --lr-decay-iters 30 --save {tmp_path}/whole")[0]
    flags = f"{FP16} --lr-decay-iters 30 --save {tmp_path}/parts --load {tmp_path}/parts"
    run_distributed(runs.train_here, 2, f"{flags} --train-iters 19")
    parts = run_distributed(runs.train_here, 2, f"{flags} --train-iters 30")[0]
    assert [n for n, t in whole["tensors"].items() if not torch.equal(t, parts["tensors"][n])] == []
    seen, again = records(tmp_path / "whole"), records(tmp_path / "parts")
    numbers = [(r["iteration"], r["loss_scale"], r["skipped_iterations"], r["lm_loss"], r["grad_norm"]) for r in seen]
    assert numbers == [(r["iteration"], r["loss_scale"], r["skipped_iterations"], r["lm_loss"], r["grad_norm"]) for r in again]
    # 2^32 is too much, and each skipped step but the first (hysteresis 2) halves it
    first = next(i for i, r in enumerate(seen) if r["grad_norm"] is not None)
    assert 3 <= first < 28
    assert [r["skipped_iterations"] for r in seen[:first]] == list(range(1, first + 1))
    assert [r["loss_scale"] for r in seen[:first]] == [2.0**32, *(2.0 ** (32 - i) for i in range(1, first))]
    assert all(r["lm_loss"] is not None for r in seen)
    assert seen[-1]["lm_loss"] < seen[0]["lm_loss"]


def test_a_run_ends_where_the_scale_cannot_fall(tmp_path):
    flags = f"{FP16} --train-iters 9 --initial-loss-scale 1e12 --min-loss-scale 1e12 --save {tmp_path}"
    with pytest.raises(FloatingPointError, match=r"loss scale is down at --min-loss-scale \(1e\+12\)"):
        run_distributed(runs.train_here, 2, flags)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "stop"
