"""Whatever the ZeRO stage and the number of ranks, an engine trains what a plain PyTorch loop trains."""

import functools
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed
from engine_models import ADAM, adam, check, config_of, engine_run, our_net, plain_run

from megatron_moe.deepspeed import engine as engine_module

# ranks, ranks that share the experts out
LAYOUTS = [(1, 1), (2, 2), (4, 2)] + [pytest.param(*row, marks=pytest.mark.matrix) for row in ((4, 1), (4, 4))]


@functools.cache
def expected(ranks, accumulation, **kind):
    return plain_run(ranks, accumulation, **kind)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
def test_every_stage_and_layout_equals_a_plain_loop(ranks, ep, stage):
    config = config_of(ranks, 2, stage, optimizer=ADAM)
    check(run_distributed(engine_run, ranks, config, ep)[0], expected(ranks, 2), 1e-10)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_residual_and_two_experts_equal_a_plain_loop(k, stage):
    config = config_of(4, 1, stage, optimizer=ADAM)
    found = run_distributed(functools.partial(engine_run, k=k, residual=True), 4, config, 2)[0]
    check(found, expected(4, 1, k=k, residual=True), 1e-10)


def test_no_stage_differs_from_stage_0_in_float32():
    found = [run_distributed(engine_run, 4, config_of(4, 2, stage, optimizer=ADAM), 2, torch.float32)[0] for stage in range(4)]
    for other in found[1:]:
        check(other, found[0], 1e-5)


# ---------------------------------------------------------------- the caller's optimizer


def in_groups(net):
    """Experts at a tenth of the rate, without decay; the last layer with another momentum of Adam; and options that torch does not know."""
    named = list(net.named_parameters())
    of = lambda test: [p for n, p in named if test(n)]  # noqa: E731
    experts, last = (lambda n: "experts." in n), (lambda n: n.startswith("last"))
    groups = [
        {"params": of(experts), "lr": 1e-3, "weight_decay": 0.0, "name": "experts", "moe": True},
        {"params": of(last), "betas": (0.5, 0.9)},
        {"params": of(lambda n: not experts(n) and not last(n)), "mine": "yes"},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-5, weight_decay=0.1)


def with_momentum(net):
    return torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.8, nesterov=True)


def two_steps_old(net):
    """With moments: what an optimizer has that trained before."""
    optimizer = adam(net.parameters())
    for step in range(2):
        for name, p in net.named_parameters():
            grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + step).reshape(p.shape)
            # a stack of experts has the gradients that they have one by one
            p.grad = (
                torch.sin(torch.arange(p[0].numel(), dtype=p.dtype) + step).reshape(p[0].shape).expand_as(p).clone()
                if "experts.stack" in name
                else grad
            )
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("make", [in_groups, with_momentum, two_steps_old], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("ranks", "ep", "stage"),
    [(1, 1, 0), (4, 2, 3)] + [pytest.param(*row, marks=pytest.mark.matrix) for row in ((4, 2, 0), (4, 2, 1), (4, 4, 2))],
)
def test_the_callers_optimizer_goes_on_with_its_groups_and_its_state(make, ranks, ep, stage):
    found = run_distributed(functools.partial(engine_run, make=make), ranks, config_of(ranks, 1, stage), ep)[0]
    check(found, expected(ranks, 1, make=make), 1e-10)


def _groups_after(ep):
    from megatron_moe import deepspeed

    net = our_net(ep_size=ep)
    optimizer = in_groups(net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    engine, returned, _, schedule = deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=scheduler, config=config_of(2, 1, 1))
    assert returned is optimizer and engine.optimizer is optimizer and schedule is scheduler
    mine = {id(p): n for n, p in engine.module.named_parameters()}
    return [({k: v for k, v in g.items() if k != "params"}, [mine[id(p)] for p in g["params"]]) for g in optimizer.param_groups]


def test_groups_keep_all_their_options_and_parameters():
    first, last, rest = run_distributed(_groups_after, 2, 2)[0]
    assert first[0]["name"] == "experts" and first[0]["moe"] is True and first[0]["weight_decay"] == 0.0 and first[0]["initial_lr"] == 1e-3
    assert all("experts" in n for n in first[1]) and len(first[1]) == 4
    assert last[0]["betas"] == (0.5, 0.9) and last[1] == ["last.weight", "last.bias"]
    assert rest[0]["mine"] == "yes" and rest[0]["weight_decay"] == 0.1 and "first.weight" in rest[1]


# ---------------------------------------------------------------- faults that this file must see


def _with_fault(fault, *args):
    with FAULTS[fault]():
        return engine_run(*args)


def divided_by_the_experts_ranks():
    """A gradient divisor of the expert data ranks, as in DeepSpeed 0.4: expert gradients are EP times too large."""
    original = engine_module.update

    def update(optimizer, parameters, *rest):
        for p in parameters:
            if getattr(p, "allreduce", True) is False:
                p.grad.mul_(2)
        return original(optimizer, parameters, *rest)

    return mock.patch.object(engine_module, "update", update)


def not_divided_by_the_ranks():
    original = engine_module.backward
    return mock.patch.object(engine_module, "backward", lambda loss, scale, divisor, **o: original(loss, scale, divisor=divisor / 2, **o))


def norm_without_experts():
    original = engine_module.update

    def update(optimizer, parameters, counted, *rest):
        return original(optimizer, parameters, [p for p in counted if getattr(p, "allreduce", True)], *rest)

    return mock.patch.object(engine_module, "update", update)


FAULTS = {f.__name__: f for f in (divided_by_the_experts_ranks, not_divided_by_the_ranks, norm_without_experts)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    found = run_distributed(_with_fault, 2, fault, config_of(2, 2, 1, optimizer=ADAM), 2)[0]
    with pytest.raises(AssertionError, match="off by"):
        check(found, expected(2, 2), 1e-10)
