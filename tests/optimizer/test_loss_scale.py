"""The loss scale follows Megatron's rule, and a skipped step moves nothing."""

import pytest
import torch
from torch import nn

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.config.training import OptimizerConfig
from megatron_moe.optimizer.clip import clip_gradients
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.loss_scale import LossScale, update_weights


def expected(overflows: list[bool], scale: float, window: int, hysteresis: int, minimum: float) -> list[float]:
    """The rule step by step, in whole sentences of Python."""
    good, patience, scales = 0, hysteresis, []
    for is_overflow in overflows:
        if is_overflow:
            good = 0
            patience -= 1
            if patience <= 0:
                scale = max(scale / 2, minimum)
        else:
            good += 1
            if good == window:
                good, patience = 0, hysteresis
                scale = min(scale * 2, 2.0**127)
        scales.append(scale)
    return scales


def walk(loss_scale: LossScale, overflows: list[bool]) -> list[float]:
    scales = []
    for is_overflow in overflows:
        loss_scale.update(torch.tensor(float(is_overflow)))
        scales.append(float(loss_scale.scale))
    return scales


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_the_scale_is_that_of_the_rule_after_every_step(window, hysteresis, share):
    generator = torch.Generator().manual_seed(window * 10 + hysteresis)
    overflows = (torch.rand(300, generator=generator) < share).tolist()
    config = LossScaleConfig(initial_loss_scale=2.0**10, loss_scale_window=window, hysteresis=hysteresis, min_loss_scale=4.0)
    assert walk(LossScale(config), overflows) == expected(overflows, 2.0**10, window, hysteresis, 4.0)


def test_the_worked_example_holds():
    config = LossScaleConfig(initial_loss_scale=16, loss_scale_window=3, hysteresis=2)
    assert walk(LossScale(config), [c == "x" for c in ".xx...x."]) == [16, 16, 8, 8, 8, 16, 16, 16]


def test_a_fixed_scale_stays_and_counts():
    loss_scale = LossScale(LossScaleConfig(loss_scale=128.0, loss_scale_window=1))
    assert walk(loss_scale, [True, False, True, True]) == [128.0] * 4
    assert loss_scale.numbers() == (128.0, 3, False)


def test_an_overflow_at_the_minimum_is_told():
    loss_scale = LossScale(LossScaleConfig(initial_loss_scale=2.0, min_loss_scale=1.0, hysteresis=1))
    loss_scale.update(torch.ones(()))
    assert loss_scale.numbers() == (1.0, 1, False)  # it could fall
    loss_scale.update(torch.ones(()))
    assert loss_scale.numbers() == (1.0, 2, True)


def test_state_goes_on_exactly():
    config = LossScaleConfig(initial_loss_scale=2.0**20, loss_scale_window=4, hysteresis=2)
    overflows = [c == "x" for c in "..x...x.x....x......"]
    straight, stopped, resumed = LossScale(config), LossScale(config), LossScale(config)
    wanted = walk(straight, overflows)
    walk(stopped, overflows[:7])
    resumed.load_state(stopped.state())
    assert walk(resumed, overflows[7:]) == wanted[7:]
    assert resumed.numbers() == straight.numbers()


def test_a_norm_that_is_not_finite_is_an_overflow():
    loss_scale = LossScale(LossScaleConfig(initial_loss_scale=8.0))
    for norm, found in ((24.0, 0.0), (float("inf"), 1.0), (float("nan"), 1.0)):
        assert float(loss_scale.unscaled(torch.tensor(norm))[1]) == found
    assert float(loss_scale.unscaled(torch.tensor(24.0))[0]) == 3.0


def test_gradients_are_divided_by_the_scale_and_clipped_by_their_own_norm():
    p = nn.Parameter(torch.zeros(2))
    for maximum, wanted in ((0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (2.5, [1.5, 2.0])):
        p.grad = torch.tensor([3.0, 4.0]) * 1024
        clip_gradients([p], torch.tensor(5.0), maximum, torch.tensor(1024.0))
        torch.testing.assert_close(p.grad, torch.tensor(wanted))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.embedding = nn.Linear(6, 4), nn.LayerNorm(4), nn.Embedding(5, 3)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_skipped_step_moves_neither_weights_nor_state(name):
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optimizer(model, OptimizerConfig(optimizer=name, lr=0.1))

    def step(found_inf: float, value: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value) * torch.linspace(0.5, 1.5, p.numel()).view_as(p)
        update_weights(optimizer, torch.tensor(found_inf))

    def everything() -> dict[str, torch.Tensor]:
        state = {f"{i} {slot}": t for i, p in enumerate(model.parameters()) for slot, t in optimizer.state[p].items()}
        return {n: t.detach().clone() for n, t in [*model.named_parameters(), *state.items()]}

    step(0.0, 1.0)
    before = everything()
    for value in (float("inf"), float("nan"), 1.0):
        step(1.0, value)
        after = everything()
        assert before.keys() == after.keys()
        assert [n for n, t in before.items() if not torch.equal(t, after[n])] == []
    step(0.0, 1.0)
    assert not torch.equal(everything()["fc.weight"], before["fc.weight"])


def test_a_start_below_the_minimum_is_refused():
    with pytest.raises(ConfigError, match=r"--initial-loss-scale \(1\) must not be below --min-loss-scale \(2\)"):
        LossScaleConfig(initial_loss_scale=1, min_loss_scale=2)
