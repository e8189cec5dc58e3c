"""DeepSpeed's own MoE layer beside ours: weights through load_state_dict, the same random numbers in both, the same answers.

Needs the package `deepspeed` (an oracle, no dependency).
"""
# T tokens, D hidden, E experts

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from named_gradients import named_gradients
from torch import nn

from megatron_moe.deepspeed.moe import utils as our_utils
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.moe.layer import JITTER
from megatron_moe.utils.random import Purpose, drawn_keys, gumbel, uniform

# not of "deepspeed" alone: without the package that is this folder
gates = pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")
their_layer = pytest.importorskip("deepspeed.moe.layer", reason="deepspeed is not installed")
their_utils = pytest.importorskip("deepspeed.moe.utils", reason="deepspeed is not installed")

T, D, E, SEED = 64, 12, 8, 5
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5, generator=generator)
    return layer


def pair(to_ours: bool, **options) -> tuple[MoE, nn.Module]:
    """The weights of one are loaded into the other."""
    ours, theirs = (kind(D, FeedForward(), E, **{"min_capacity": 0} | options) for kind in (MoE, their_layer.MoE))
    source, target = (theirs, ours) if to_ours else (ours, theirs)
    missing, unexpected = target.load_state_dict(randomised(source).state_dict())
    assert (missing, unexpected) == ([], [])
    return ours, theirs


def given() -> torch.Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(2)).requires_grad_()


@contextmanager
def our_random_numbers():
    """DeepSpeed draws what our layer draws after manual_seed(SEED)."""
    torch.manual_seed(SEED)
    keys_T = drawn_keys(T, CPU)
    selection_T1 = uniform(keys_T, Purpose.TOKEN_SELECTION, 1)  # DeepSpeed draws one for each expert, of which one counts
    jitter_TD = 1 - JITTER + 2 * JITTER * uniform(keys_T, Purpose.GATE_JITTER, D)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(gates.exp_selection_uniform_map, {CPU: lambda shape: selection_T1.expand(shape)}))
        stack.enter_context(mock.patch.dict(gates.uniform_map, {CPU: lambda shape: jitter_TD}))
        stack.enter_context(mock.patch.object(gates, "gumbel_rsample", return_value=gumbel(keys_T, Purpose.GATE_SAMPLING, E)))
        yield


def assert_equal_steps(ours: MoE, theirs: nn.Module, used: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs, losses, counts, and gradients of input and weights. Returns our output."""
    x, x_theirs = given(), given()
    torch.manual_seed(SEED)
    y, l_aux, counts = ours(x, used)
    with our_random_numbers():
        y_theirs, l_theirs, counts_theirs = theirs(x_theirs, used)
    torch.testing.assert_close(y, y_theirs, **CLOSE)
    torch.testing.assert_close(l_aux, l_theirs, **CLOSE)
    assert torch.equal(counts, counts_theirs.long())
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    for out, loss in ((y, l_aux), (y_theirs, l_theirs)):
        ((out * upstream).sum() + 3 * loss).backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    grads = named_gradients(ours)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    return y


@pytest.mark.parametrize("to_ours", [True, False], ids=["their weights", "our weights"])
@pytest.mark.parametrize("dropping", [False, True], ids=["all", "dropping"])
@pytest.mark.parametrize("use_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_layers_agree(k, use_residual, dropping, to_ours):
    y = assert_equal_steps(*pair(to_ours, k=k, use_residual=use_residual, drop_tokens=dropping, capacity_factor=0.5))
    if not use_residual and k < 4:
        assert (~y.reshape(T, D).any(1)).any() == dropping  # a token that no expert took


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("noise", ["Jitter", "RSample"])
def test_layers_agree_with_noise(k, noise):
    if noise == "RSample" and k > 1:
        with pytest.raises(ValueError, match="has no effect with k"):  # DeepSpeed does nothing, and says nothing
            pair(True, k=k, noisy_gate_policy=noise)
        return
    assert_equal_steps(*pair(True, k=k, noisy_gate_policy=noise, capacity_factor=0.5))


@pytest.mark.parametrize("dropping", [False, True])
def test_layers_agree_about_tokens_that_are_not_used(dropping):
    used = (torch.arange(T) % 5 > 1).long()
    assert_equal_steps(*pair(True, k=1, drop_tokens=dropping, capacity_factor=0.5), used)


@pytest.mark.parametrize("options", [{"k": 1, "drop_tokens": False}, {"k": 2, "top2_2nd_expert_sampling": False}, {"k": 4}])
def test_layers_agree_in_evaluation(options):
    ours, theirs = pair(True, capacity_factor=9.0, eval_capacity_factor=0.5, **options)
    assert_equal_steps(ours.eval(), theirs.eval())


@pytest.mark.parametrize("minimum", [4, 20])
def test_layers_agree_about_the_minimum_capacity(minimum):
    assert_equal_steps(*pair(True, k=2, capacity_factor=0.1, min_capacity=minimum))


@pytest.mark.parametrize("use_residual", [False, True])
def test_layers_that_are_built_after_the_same_seed_start_with_the_same_weights(use_residual):
    states, after = [], []
    for kind in (MoE, their_layer.MoE):
        torch.manual_seed(SEED)
        states.append(kind(D, FeedForward(), E, use_residual=use_residual).state_dict())
        after.append(torch.get_rng_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*after)


def test_parameter_groups_agree_in_names_options_and_numbers_of_elements():
    described = []
    for kind, utils in ((MoE, our_utils), (their_layer.MoE, their_utils)):
        model = nn.Sequential(nn.Linear(3, D), kind(D, FeedForward(), E, use_residual=True))
        assert utils.has_moe_layers(model) == (True, E)
        group = {"params": list(model.parameters()), "name": "all", "lr": 0.2}
        groups = utils.split_params_into_different_moe_groups_for_optimizer(group)
        described.append([(g["name"], g["lr"], g.get("moe", False), sum(p.numel() for p in g["params"])) for g in groups])
        configured = utils.configure_moe_param_groups(list(model.parameters()))
        described[-1] += [(g["name"], utils.is_moe_param_group(g), sum(p.numel() for p in g["params"])) for g in configured]
    assert described[0] == described[1]
