"""Which parameters are decayed, and that the optimizer is the one that the flags ask for."""

import pytest
import torch
from torch import nn

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.groups import build_optimizer, set_rates, weight_decay_groups


class Experts(nn.Module):
    """Parameters stacked over 4 experts, under the names of the real layer."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.ones(4, 8, 16))
        self.b1 = nn.Parameter(torch.ones(4, 16))
        self.w2 = nn.Parameter(torch.ones(4, 16, 8))
        self.b2 = nn.Parameter(torch.ones(4, 8))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.attn_norm = nn.LayerNorm(8)
        self.mlp_norm = nn.RMSNorm(8)
        self.mlp = nn.Linear(8, 8)
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(8, 4, bias=False)
        self.moe.experts = Experts()
        self.coefficient = nn.Linear(8, 2)
        self.temperature = nn.Parameter(torch.tensor(1.0))


def names_by_group(model, weight_decay=0.1):
    of = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: {of[id(p)] for p in g["params"]} for g in weight_decay_groups(model, weight_decay)}


def test_matrices_decay_and_vectors_do_not():
    assert names_by_group(Layer()) == {
        "decay": {"embedding.weight", "mlp.weight", "moe.gate.weight", "moe.experts.w1", "moe.experts.w2", "coefficient.weight"},
        "no_decay": {
            "attn_norm.weight", "attn_norm.bias", "mlp_norm.weight", "mlp.bias", "moe.experts.b1", "moe.experts.b2",
            "coefficient.bias", "temperature",
        },
    }  # fmt: skip


def test_experts_with_rates_of_their_own_have_groups_of_their_own():
    model = Layer()
    of = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: ({of[id(p)] for p in g["params"]}, g["lr_mult"], g["wd_mult"]) for g in weight_decay_groups(model, 0.1, 0.5, 3.0)}
    common = names_by_group(model)
    experts = {"decay": {"moe.experts.w1", "moe.experts.w2"}, "no_decay": {"moe.experts.b1", "moe.experts.b2"}}
    assert groups == {
        "decay": (common["decay"] - experts["decay"], 1.0, 1.0), "no_decay": (common["no_decay"] - experts["no_decay"], 1.0, 0.0),
        "expert_decay": (experts["decay"], 0.5, 3.0), "expert_no_decay": (experts["no_decay"], 0.5, 0.0),
    }  # fmt: skip


def test_rates_of_the_experts_follow_the_schedules():
    model = Layer()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.1, moe_expert_lr_mult=0.5, moe_expert_wd_mult=3.0))
    rates = lambda: {g["name"]: (g["lr"], pytest.approx(g["weight_decay"])) for g in optimizer.param_groups}  # noqa: E731
    assert rates() == {"decay": (0.5, 0.1), "no_decay": (0.5, 0.0), "expert_decay": (0.25, 0.3), "expert_no_decay": (0.25, 0.0)}
    set_rates(optimizer, 0.2, 0.01)
    assert rates() == {"decay": (0.2, 0.01), "no_decay": (0.2, 0.0), "expert_decay": (0.1, 0.03), "expert_no_decay": (0.1, 0.0)}
    set_rates(optimizer, 0.4)
    assert rates() == {"decay": (0.4, 0.01), "no_decay": (0.4, 0.0), "expert_decay": (0.2, 0.03), "expert_no_decay": (0.2, 0.0)}


def test_experts_in_a_module_list_are_judged_one_by_one():
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert names_by_group(model) == {
        "decay": {"experts.0.weight", "experts.1.weight"},
        "no_decay": {"experts.0.bias", "experts.1.bias"},
    }


def test_only_the_matrices_shrink_when_there_is_no_gradient():
    model = Layer()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in names_by_group(model)["decay"] else 1.0  # AdamW: weight *= 1 - lr * decay
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    assert [g["name"] for g in weight_decay_groups(model, 0.1)] == ["decay"]


def test_a_tied_weight_is_optimized_once():
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    model.head.weight = model.embedding.weight
    assert sum(len(g["params"]) for g in weight_decay_groups(model, 0.1)) == 1


def test_adam_settings_come_from_the_flags():
    optimizer = build_optimizer(nn.Linear(4, 4), OptimizerConfig(lr=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-5))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-5
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.defaults["fused"]


def test_sgd_takes_its_momentum_from_the_flags():
    optimizer = build_optimizer(nn.Linear(4, 4), OptimizerConfig(optimizer="sgd", sgd_momentum=0.7))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.7


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_optimizer(nn.GELU(), OptimizerConfig())


@pytest.mark.parametrize(("width", "threads_within"), [(8, 1), (512, 2)])
def test_many_small_tensors_are_stepped_on_one_thread_and_what_comes_after_has_all(monkeypatch, width, threads_within):
    before, seen = torch.get_num_threads(), []
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    optimizer = build_optimizer(model, OptimizerConfig())
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: seen.append(torch.get_num_threads()) or kernel(*args, **kwargs))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            optimizer.step()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) >= 2 and set(seen) == {threads_within}
