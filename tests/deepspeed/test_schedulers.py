"""The five schedules of DeepSpeed, by hand and against its own."""

import importlib

import pytest
import torch

from megatron_moe.deepspeed.config import SchedulerSection
from megatron_moe.deepspeed.schedulers import SCHEDULES, build_scheduler, scheduler_problems

EXAMPLES = {
    "WarmupLR": [{"warmup_max_lr": 0.1}, {"warmup_min_lr": 0.01, "warmup_num_steps": 7, "warmup_type": "linear"}],
    "WarmupDecayLR": [{"total_num_steps": 12, "warmup_num_steps": 5}, {"total_num_steps": 9, "warmup_min_lr": 0.01, "warmup_max_lr": 0.2,
                                                                      "warmup_num_steps": 3, "warmup_type": "linear"}],
    "WarmupCosineLR": [{"total_num_steps": 12, "warmup_num_steps": 4},
                       {"total_num_steps": 10, "warmup_num_steps": 4, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.2, "warmup_type": "linear"}],
    "OneCycle": [{"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4, "cycle_second_step_size": 6, "decay_step_size": 2,
                  "decay_lr_rate": 0.5}, {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 6, "cycle_first_stair_count": 3}],
    "LRRangeTest": [{"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 3},
                    {"lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.0, "lr_range_test_staircase": True}],
}  # fmt: skip
CASES = [(kind, params) for kind, several in EXAMPLES.items() for params in several]


def optimizer(kind=torch.optim.AdamW):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return kind([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}], lr=0.2)


def rates(schedule, opt, steps=16):
    """Of the steps as they are trained: the rate is read before the schedule moves."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in opt.param_groups])
        schedule.step()
    return found


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_a_schedule_is_deepspeeds(kind, params):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    pytest.importorskip("deepspeed.runtime.lr_schedules", reason="deepspeed is not installed")
    theirs = getattr(importlib.import_module("deepspeed.runtime.lr_schedules"), kind)
    a, b = optimizer(), optimizer()
    ours, of_deepspeed = rates(SCHEDULES[kind](a, **params), a), rates(theirs(b, **params), b)
    assert torch.allclose(torch.tensor(ours), torch.tensor(of_deepspeed), rtol=1e-12, atol=1e-15)


def first(kind, steps, **params):
    opt = optimizer()
    return [pair[0] for pair in rates(SCHEDULES[kind](opt, **params), opt, steps)]


def test_warmup_by_hand():
    """The example at the top of schedulers.py."""
    assert first("WarmupLR", 6, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear") == [0, 0, 0.25, 0.5, 0.75, 1.0]


def test_a_logarithmic_warmup_is_at_the_top_in_its_last_step():
    found = first("WarmupLR", 6, warmup_max_lr=1.0, warmup_num_steps=4)
    assert found[:3] == pytest.approx([0, 0, 0.5]) and found[4:] == [1.0, 1.0]


def test_decay_by_hand():
    found = first("WarmupDecayLR", 9, total_num_steps=6, warmup_num_steps=2, warmup_max_lr=1.0, warmup_type="linear")
    assert found == pytest.approx([0, 0, 0.5, 1.0, 0.75, 0.5, 0.25, 0, 0])


def test_cosine_ends_at_its_ratio_of_each_groups_rate():
    opt = optimizer()
    last = rates(SCHEDULES["WarmupCosineLR"](opt, total_num_steps=6, warmup_num_steps=2, cos_min_ratio=0.1), opt, 12)[-1]
    assert last == pytest.approx([0.02, 0.03])


def test_one_cycle_by_hand():
    found = first("OneCycle", 9, cycle_min_lr=1.0, cycle_max_lr=3.0, cycle_first_step_size=2, cycle_second_step_size=4)
    assert found == pytest.approx([1, 2, 3, 2.5, 2, 1.5, 1, 1, 1])


def test_one_cycle_turns_the_momentum_the_other_way():
    opt = optimizer(torch.optim.AdamW)
    schedule = SCHEDULES["OneCycle"](opt, 0.0, 1.0, cycle_first_step_size=2, cycle_min_mom=0.5, cycle_max_mom=0.9)
    seen = []
    for _ in range(5):
        seen.append(opt.param_groups[0]["betas"])
        schedule.step()
    assert [beta for beta, _ in seen] == pytest.approx([0.9, 0.7, 0.5, 0.7, 0.9]) and {second for _, second in seen} == {0.999}


def test_range_test_by_hand():
    assert first("LRRangeTest", 4, lr_range_test_min_lr=1.0, lr_range_test_step_size=2) == [1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_a_schedule_goes_on_from_its_state(kind, params):
    a, b = optimizer(), optimizer()
    one, other = SCHEDULES[kind](a, **params), SCHEDULES[kind](b, **params)
    rates(one, a, 5)
    other.load_state_dict(one.state_dict())
    for mine, group in zip(a.param_groups, b.param_groups):
        group["lr"] = mine["lr"]
    assert rates(one, a, 9) == rates(other, b, 9)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_parameter_of_a_schedule_is_a_key_and_the_other_way_round(kind):
    import inspect
    from dataclasses import fields

    known = {f.name for f in fields(SchedulerSection)}
    for name in inspect.signature(SCHEDULES[kind]).parameters:
        assert name in known | {"optimizer", "last_batch_iteration"}
    used = {name for s in SCHEDULES.values() for name in inspect.signature(s).parameters}
    assert known - {"scheduler_type"} <= used


def test_a_section_is_built():
    opt = optimizer()
    assert type(build_scheduler({"scheduler_type": "WarmupLR", "warmup_num_steps": 3}, opt)) is SCHEDULES["WarmupLR"]
    assert build_scheduler({}, opt) is None
    assert scheduler_problems({"scheduler_type": "LRRangeTest", "warmup_num_steps": 3})[0].startswith(
        "scheduler.params.warmup_num_steps is no parameter"
    )
