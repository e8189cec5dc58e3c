"""Half precision: one overflow anywhere is one decision everywhere; the scale follows DeepSpeed's rule."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from engine_models import ADAM, batch, check, config_of, loss_of, our_net, plain_run, train, whole

from megatron_moe import deepspeed
from megatron_moe.training import step as steps

FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 3}


def start(stage, ep=1, dtype=torch.float32, fp16=FP16, scheduler=None, optimizer=ADAM, **sections):
    config = config_of(dist.get_world_size(), 1, stage, optimizer=optimizer, **({"fp16": fp16} if fp16 else {}), **sections)
    if scheduler:
        config["scheduler"] = scheduler
    return deepspeed.initialize(model=our_net(dtype, ep), config=config)[0]


def state_here(engine) -> dict[str, torch.Tensor]:
    """Shards of weights and moments."""
    local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).detach().clone()  # noqa: E731
    names = {p: n for n, p in engine.module.named_parameters()}
    out = {n: local(p) for p, n in names.items()}
    for p, slots in engine.optimizer.state.items():
        out |= {f"{slot} {names[p]}": local(torch.as_tensor(value)) for slot, value in slots.items()}
    return out


def one_step(engine, step, factor=1.0):
    x, target = batch(step, 0, dist.get_rank(), torch.float32)
    loss = loss_of(engine, x, target)
    engine.backward(loss * factor)
    engine.step()
    return float(loss)


# ---------------------------------------------------------------- overflow


def bad_shard(is_bad, is_seen_alone):
    """One element of a reduced gradient here is no number. `is_seen_alone` is a fault by hand: each rank looks at its own shards."""
    original = steps.gradient_norm

    def norm(parameters, ranks):
        grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters]
        if is_bad:
            next(g for g in grads if g.numel()).view(-1)[0] = math.nan
        return torch.stack([g.float().norm() for g in grads]).norm() if is_seen_alone else original(parameters, ranks)

    return mock.patch.object(steps, "gradient_norm", norm)


def _overflow_on_the_last_rank(stage, kind, is_seen_alone=False):
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 10, "warmup_type": "linear"}}
    engine = start(stage, ep=min(2, dist.get_world_size()), scheduler=warmup)
    out = []
    for step in range(4):
        before, rates = state_here(engine), engine.get_lr()
        is_bad = step == 2 and dist.get_rank() == dist.get_world_size() - 1
        with bad_shard(is_bad and kind == "shard", is_seen_alone):
            one_step(engine, step, {"inf": math.inf, "nan": math.nan}.get(kind, 1.0) if is_bad else 1.0)
        after = state_here(engine)
        out.append({
            "moved": before.keys() != after.keys() or any(not torch.equal(t, after[n]) for n, t in before.items()),
            "rate": engine.get_lr() != rates, "scale": engine.loss_scale, "skipped": engine.skipped_steps, "applied": engine.was_step_applied(),
            "norm": math.isfinite(engine.get_global_grad_norm()), "steps": engine.global_steps,
        })  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["inf", "nan", "shard"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_is_counted(ranks, stage, kind):
    for seen in run_distributed(_overflow_on_the_last_rank, ranks, stage, kind):
        assert [s["applied"] for s in seen] == [s["norm"] for s in seen] == [True, True, False, True]
        assert not seen[2]["moved"] and not seen[2]["rate"], "a skipped step moves nothing, not the schedule either"
        assert seen[3]["moved"] and seen[3]["rate"]
        assert [s["skipped"] for s in seen] == [0, 0, 1, 1] and [s["steps"] for s in seen] == [1, 2, 3, 4]
        assert [s["scale"] for s in seen] == [1024.0, 1024.0, 512.0, 512.0]


def _scales(fp16, bad, steps):
    engine = start(1, fp16=fp16)
    scales = []
    for step in range(steps):
        one_step(engine, step, math.inf if step in bad else 1.0)
        scales.append(engine.loss_scale)
    return scales, engine.skipped_steps


def test_hysteresis_and_window_are_those_of_the_config():
    """The example at the top of optimizer/loss_scale.py."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 2, "loss_scale_window": 3}
    scales, skipped = run_distributed(_scales, 2, fp16, (1, 2, 6), 8)[0]
    assert scales == [16, 16, 8, 8, 8, 16, 16, 16] and skipped == 3


def test_a_fixed_scale_stays():
    scales, skipped = run_distributed(_scales, 1, {"enabled": True, "loss_scale": 128}, (1,), 3)[0]
    assert scales == [128, 128, 128] and skipped == 1


def test_the_first_scale_is_deepspeeds():
    assert run_distributed(_scales, 1, {"enabled": True}, (), 1)[0][0] == [2.0**16]


def test_a_decision_of_each_rank_by_itself_is_seen():
    seen = run_distributed(_overflow_on_the_last_rank, 4, 2, "shard", True)
    assert [of_rank[2]["scale"] for of_rank in seen] == [2048.0, 2048.0, 2048.0, 512.0]  # three good steps double it


# ---------------------------------------------------------------- what it trains


def _half(section, stage, ep):
    engine = start(stage, ep, **({"fp16": None} | section))
    out = train(engine, range(4), torch.float32)
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    return out if dist.get_rank() == 0 else None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("section", [{"fp16": FP16}, {"bf16": {"enabled": True}}], ids=["fp16", "bf16"])
def test_sixteen_bits_follow_the_plain_loop(section, stage):
    """Losses to the accuracy of the type: gates far apart keep every route."""
    found = run_distributed(_half, 2, section, stage, 2)[0]
    expected = plain_run(2, 1, dtype=torch.float32)
    tolerance = 0.02 if "fp16" in section else 0.1
    for name, loss in found.items():
        if name.startswith("loss"):
            assert abs(float(loss) - float(expected[name])) < tolerance * max(1.0, abs(float(expected[name]))), name


def test_no_stage_differs_from_stage_0_in_fp16():
    found = [run_distributed(_half, 2, {"fp16": FP16}, stage, 2)[0] for stage in range(4)]
    for other in found[1:]:
        check(other, found[0], 1e-2)


def _stored_in_half(stage):
    engine = start(stage, 2, fp16=FP16 | {"fp16_master_weights_and_grads": True})
    before = {n: whole(p) for n, p in engine.module.named_parameters()}
    losses = [one_step(engine, 0) for _ in range(12)]
    kinds = {n: p.dtype for n, p in engine.module.named_parameters()}
    moved = [n for n, p in engine.module.named_parameters() if not torch.equal(whole(p), before[n])]
    moments = {t.dtype for slots in engine.optimizer.state.values() for s, t in slots.items() if s != "step"}
    return losses, kinds, moved, moments


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_and_gradients_stored_in_float16(stage):
    losses, kinds, moved, moments = run_distributed(_stored_in_half, 2, stage)[0]
    assert losses[-1] < losses[0] - 0.05
    assert {d for n, d in kinds.items() if "gate" not in n} == {torch.float16} and {d for n, d in kinds.items() if "gate" in n} == {
        torch.float32
    }
    assert set(moved) == set(kinds) and moments == {torch.float32}


def test_the_routers_stay_float32_in_fp16():
    assert run_distributed(_router_type, 2) == [torch.float32] * 2


def _router_type():
    engine = start(2, 2)
    seen = []
    engine.module.moe.core.gate.register_forward_hook(lambda gate, args, out: seen.append(out.dtype))
    one_step(engine, 0)
    return seen[0]
