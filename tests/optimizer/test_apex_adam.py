"""apex's fused AdamW behind --adam-kernel apex, with a stand-in that has apex's interface."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from megatron_moe.checkpoint.state import optimizer_state
from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.apex_adam import ApexAdamW, apex_problems, find_fused_adam
from megatron_moe.optimizer.groups import build_optimizer, set_rates

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.2, adam_kernel="apex")


class FusedAdam(torch.optim.Optimizer):
    """What apex.optimizers.FusedAdam does: moments in state, the number of steps in the group, decoupled decay by adam_w_mode."""

    def __init__(self, params, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t, lr = group["betas"], group["step"], group["lr"]
            for p in group["params"]:
                assert type(p.data) is torch.Tensor  # a kernel of apex takes no DTensor
                if p.grad is None:
                    continue
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(p.grad, 1 - b1)
                v.lerp_(p.grad.square(), 1 - b2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m, (v / (1 - b2**t)).sqrt() + group["eps"], value=-lr / (1 - b1**t))


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    package.optimizers, optimizers.FusedAdam = optimizers, FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def steps(model, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        set_rates(optimizer, 0.1 / (1 + seed), 0.2)
        optimizer.step()


def test_steps_are_those_of_torchs_adamw_and_go_on_from_a_checkpoint(apex):
    torch.manual_seed(0)
    ours, theirs, resumed = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer, oracle = build_optimizer(ours, CONFIG), build_optimizer(theirs, OptimizerConfig(lr=0.1, weight_decay=0.2))
    assert isinstance(optimizer, ApexAdamW)
    steps(ours, optimizer, range(3))
    again = build_optimizer(resumed, CONFIG)
    resumed.load_state_dict(ours.state_dict())
    for name, t in optimizer_state(resumed, again).items():
        t.copy_(optimizer_state(ours, optimizer)[name])
    steps(ours, optimizer, range(3, 6))
    steps(theirs, oracle, range(6))
    steps(resumed, again, range(3, 6))
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert torch.equal(ours.weight, resumed.weight)
    wanted, found = optimizer_state(theirs, oracle), optimizer_state(ours, optimizer)
    assert wanted.keys() == found.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, msg=name)


def test_without_apex_or_with_the_project_of_the_index_it_is_refused(monkeypatch):
    for module in (None, ModuleType("apex")):  # not installed; the Pyramid toolkit, which has no optimizers
        monkeypatch.setitem(sys.modules, "apex", module)
        assert find_fused_adam() is None
        (problem,) = apex_problems(CONFIG)
        assert "needs NVIDIA's apex" in problem and "another project" in problem
    assert list(apex_problems(OptimizerConfig())) == []


def test_apex_is_found(apex):
    assert find_fused_adam() is FusedAdam
    assert list(apex_problems(CONFIG)) == []
