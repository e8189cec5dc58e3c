"""deepspeed.moe.utils: which parameters are experts', and optimizer groups that keep them apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    is_moe_param_group,
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)

EXPERTS = {"1.core.experts.stack.weight", "1.core.experts.stack.bias", "2.core.experts.stack.weight", "2.core.experts.stack.bias"}


def build() -> nn.Sequential:
    """Layers of two degrees; one Residual."""
    return nn.Sequential(nn.Linear(3, 4), MoE(4, nn.Linear(4, 4), 6, ep_size=2, use_residual=True), MoE(4, nn.Linear(4, 4), 4, ep_size=4))


def names(model, params):
    name_of = {p: n for n, p in model.named_parameters()}
    return [name_of[p] for p in params]


def described(model, groups):
    return [(g["name"], g.get("moe", False), names(model, g["params"])) for g in groups]


def test_has_moe_layers_counts_the_experts_of_the_first():
    assert has_moe_layers(build()) == (True, 6)
    assert has_moe_layers(nn.Linear(2, 2)) == (False, 0)


def test_moe_params_are_those_of_the_experts_alone():
    model = build()
    assert {n for n, p in model.named_parameters() if is_moe_param(p)} == EXPERTS
    assert not is_moe_param(torch.zeros(2))
    shared, experts = split_params_into_shared_and_expert_params(model.parameters())
    assert set(names(model, experts)) == EXPERTS
    assert set(names(model, shared)) == {n for n, _ in model.named_parameters()} - EXPERTS


def test_scanning_the_parameters_of_modules_finds_each_once():
    """As the tutorials do, who have no function for it."""
    model = build()
    experts, others = [], []
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                (experts if is_moe_param(p) else others).append(p)
    assert sorted(names(model, experts)) == sorted(EXPERTS)
    assert sorted(names(model, experts + others)) == sorted(n for n, _ in model.named_parameters())


def test_experts_of_every_group_and_degree_become_groups_with_the_options_of_theirs():
    model = build()
    weights = {
        "params": [p for n, p in model.named_parameters() if n.endswith("weight")],
        "name": "weights",
        "lr": 0.1,
        "weight_decay": 0.3,
    }
    biases = {"params": (p for n, p in model.named_parameters() if n.endswith("bias")), "name": "biases", "lr": 0.2}  # a generator
    groups = split_params_into_different_moe_groups_for_optimizer((weights, biases))
    assert described(model, groups) == [
        ("weights", False, ["0.weight", "1.core.gate.weight", "1.mlp.weight", "1.coefficient.weight", "2.core.gate.weight"]),
        ("biases", False, ["0.bias", "1.mlp.bias", "1.coefficient.bias"]),
        ("ep_size_2", True, ["1.core.experts.stack.weight"]),
        ("ep_size_4", True, ["2.core.experts.stack.weight"]),
        ("ep_size_2", True, ["1.core.experts.stack.bias"]),
        ("ep_size_4", True, ["2.core.experts.stack.bias"]),
    ]
    assert [g["lr"] for g in groups] == [0.1, 0.2, 0.1, 0.1, 0.2, 0.2]
    assert ["weight_decay" in g for g in groups] == [True, False, True, True, False, False]
    assert [is_moe_param_group(g) for g in groups] == [False, False, True, True, True, True]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    torch.optim.AdamW(groups)


def test_what_is_passed_in_stays_as_it_is():
    model = build()
    group = {"params": list(model.parameters()), "name": "all"}
    passed = [group]
    split_params_into_different_moe_groups_for_optimizer(passed)
    assert passed == [group]
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(None, [[96, 24, 64, 16]]), (120, [[96, 24], [64, 16]]), (100, [[96], [24, 64], [16]]), (10, [[96], [24], [64], [16]])],
)
def test_groups_of_experts_are_no_larger_than_asked_for(most, sizes):
    model = nn.Sequential(MoE(4, nn.Linear(4, 4), 6), MoE(4, nn.Linear(4, 4), 4))
    groups = split_params_into_different_moe_groups_for_optimizer({"params": model.parameters(), "name": "all"}, max_group_size=most)
    assert [[p.numel() for p in g["params"]] for g in groups[1:]] == sizes
    assert len(groups[0]["params"]) == 2  # the gates


def test_groups_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="must have a 'name'; one has only 'lr', 'params'"):
        split_params_into_different_moe_groups_for_optimizer({"params": [], "lr": 1})
    with pytest.raises(ValueError, match="list or tuple of dicts, not int"):
        split_params_into_different_moe_groups_for_optimizer(3)


def test_configure_moe_param_groups():
    model = build()
    from_list = configure_moe_param_groups(list(model.parameters()))
    assert [g["name"] for g in from_list] == ["dense-params", "ep_size_2", "ep_size_4"]
    given = [{"params": list(model.parameters()), "name": "mine", "lr": 3}]
    assert [(g["name"], g["lr"]) for g in configure_moe_param_groups(copy.copy(given))] == [("mine", 3), ("ep_size_2", 3), ("ep_size_4", 3)]
    split = [{"params": [], "name": "a"}, {"params": [], "name": "b", "moe": True}]
    assert configure_moe_param_groups(split) is split


def test_configure_refuses_what_an_optimizer_would_refuse():
    for wrong, message in (
        (iter([]), "must be a list, not list_iterator"),
        ([3], "it has int in it"),
        ([torch.zeros(1), {}], "it has dict in it"),
    ):
        with pytest.raises(TypeError, match=message):
            configure_moe_param_groups(wrong)
    with pytest.raises(ValueError, match="model_parameters is empty"):
        configure_moe_param_groups([])
