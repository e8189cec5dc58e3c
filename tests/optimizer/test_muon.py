"""Muon in one process: the formula matrix by matrix, and which parameters are its."""

import pytest
import torch
from optimizer.muon_oracle import muon_direction
from optimizer.test_optimizer_groups import Layer
from torch import nn

from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.groups import build_optimizer, split_matrices, weight_decay_groups
from megatron_moe.optimizer.muon import Muon, newton_schulz


def test_matrices_are_muons_and_the_rest_is_adams():
    model = Layer()
    of = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: ({of[id(p)] for p in g["params"]}, g["is_muon"]) for g in split_matrices(model, weight_decay_groups(model, 0.1))}
    assert groups == {
        "muon_decay": ({"mlp.weight", "moe.experts.w1", "moe.experts.w2"}, True),
        "decay": ({"embedding.weight", "moe.gate.weight", "coefficient.weight"}, False),
        "no_decay": (
            {"attn_norm.weight", "attn_norm.bias", "mlp_norm.weight", "mlp.bias", "moe.experts.b1", "moe.experts.b2", "coefficient.bias",
             "temperature"}, False,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    left_over = u.mT @ newton_schulz(x, 5) @ vh.mT
    diagonal = left_over.diagonal(dim1=1, dim2=2)
    assert (left_over - torch.diag_embed(diagonal)).abs().max() < 1e-12
    well_conditioned = s > 0.05 * s.max()
    assert (diagonal[well_conditioned] > 0.5).all() and (diagonal < 1.3).all()


def test_a_matrix_of_zeros_stays_zero():
    assert not newton_schulz(torch.zeros(2, 3, 4), 5).any()


@pytest.mark.parametrize("is_nesterov", [True, False])
def test_steps_are_those_of_the_formula(is_nesterov):
    torch.manual_seed(0)
    model = Layer().double()
    config = OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.2, muon_momentum=0.8, muon_use_nesterov=is_nesterov,
                             muon_num_ns_steps=4, muon_extra_scale_factor=0.3)  # fmt: skip
    optimizer = build_optimizer(model, config)
    names = ("mlp.weight", "moe.experts.w1", "moe.experts.w2")
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(wanted[n]) for n in names}
    for _ in range(3):
        for n, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if n in names:
                momenta[n] = 0.8 * momenta[n] + 0.2 * p.grad
                update = 0.2 * p.grad + 0.8 * momenta[n] if is_nesterov else momenta[n]
                each = torch.stack([muon_direction(m, 4) for m in (update if update.ndim == 3 else update[None])]).view_as(update)
                wanted[n] = wanted[n] * (1 - 0.1 * 0.2) - 0.1 * 0.3 * max(p.shape[-2:]) ** 0.5 * each
        optimizer.step()
    for n in names:
        torch.testing.assert_close(dict(model.named_parameters())[n].detach(), wanted[n], rtol=0, atol=1e-12)


def test_it_agrees_with_torchs_own_up_to_bfloat16():
    """torch iterates in bfloat16, and scales by the same rule under the name match_rms_adamw."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    theirs.load_state_dict(ours.state_dict())
    a = build_optimizer(ours, OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.1))
    b = torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert isinstance(a, Muon)
    for _ in range(4):
        ours.weight.grad = torch.randn(16, 24)
        theirs.weight.grad = ours.weight.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0.02)


def test_many_matrices_are_worked_on_in_lots(monkeypatch):
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, most in zip(models, (1 << 26, 36 * 2)):
        monkeypatch.setattr("megatron_moe.optimizer.muon.MOST_ELEMENTS", most)
        optimizer = build_optimizer(model, OptimizerConfig(optimizer="muon", lr=0.1))
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q)
