"""AdamW of float16 weights: the step of float32, rounded."""

import torch
from torch import nn

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.half_adam import HalfAdamW

CONFIG = OptimizerConfig(lr=0.01, weight_decay=0.1, adam_beta2=0.95)


def test_each_step_is_that_of_float32_rounded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)).half()
    optimizer = build_optimizer(model, CONFIG)
    assert isinstance(optimizer, HalfAdamW)
    wide = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    groups = [{"params": [w], "weight_decay": decays[id(p)]} for w, p in zip(wide, model.parameters())]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
    scale = 2.0**14
    for _ in range(5):
        for w, p in zip(wide, model.parameters()):
            p.grad = (torch.randn_like(w) * 1e-6 * scale).half()  # without the scale nothing of it would be left in float16
            w.grad = p.grad.float() / scale
        optimizer.gradient_factor = torch.tensor(1 / scale)
        optimizer.step()
        oracle.step()
        for w in wide:
            w.data = w.data.half().float()
        assert all(torch.equal(p.float(), w) for w, p in zip(wide, model.parameters()))
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}


def test_a_step_that_is_skipped_moves_nothing():
    model = nn.Linear(4, 4).half()
    optimizer = build_optimizer(model, CONFIG)
    for found, value in ((0.0, 1.0), (1.0, float("inf"))):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = [{n: t.clone() for n, t in s.items()} for s in optimizer.state.values()]
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.gradient_factor, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found)
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(t, s[n]) for s, now in zip(state, optimizer.state.values()) for n, t in now.items())
