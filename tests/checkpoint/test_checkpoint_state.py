"""Model and optimizer as one flat dict by name, and zero state that loading can fill."""

import copy

import pytest
import torch
from torch import nn

from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.state import materialise_optimizer_state, model_state, optimizer_state

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("cache", torch.zeros(9), persistent=False)

    def forward(self, x):
        return self.norm(self.fc(x))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_model_state_holds_parameters_and_persistent_buffers():
    names = set(model_state(Small()))
    parameters = {"model.fc.weight", "model.fc.bias", "model.norm.weight", "model.norm.bias", "model.unused", "model.frozen"}
    assert names == parameters | {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}


def test_names_do_not_depend_on_compile():
    assert set(model_state(torch.compile(Small()))) == set(model_state(Small()))


def test_state_is_the_live_tensors_and_not_copies():
    model = Small()
    assert model_state(model)["model.fc.weight"] is model.fc.weight


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bitwise_equal(tmp_path, kind):
    torch.manual_seed(0)
    straight = Small()
    optimizer = OPTIMIZERS[kind](straight.parameters())
    stopped = copy.deepcopy(straight)
    stopped_optimizer = OPTIMIZERS[kind](stopped.parameters())
    train(straight, optimizer, 3)
    train(stopped, stopped_optimizer, 3)
    path = CheckpointManager(tmp_path).save(3, model_state(stopped) | optimizer_state(stopped, stopped_optimizer), {})

    resumed = Small()
    resumed_optimizer = OPTIMIZERS[kind](resumed.parameters())
    load_tensors(path, model_state(resumed) | optimizer_state(resumed, resumed_optimizer))
    train(straight, optimizer, 3, seed=1)
    train(resumed, resumed_optimizer, 3, seed=1)
    wanted, got = (model_state(m) | optimizer_state(m, o) for m, o in ((straight, optimizer), (resumed, resumed_optimizer)))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_materialised_state_is_what_the_first_step_would_create(kind):
    model = Small()
    made, natural = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](model.parameters())
    materialise_optimizer_state(model, made)
    model(torch.randn(5, 3)).sum().backward()
    natural.step()
    weight, unused = model.fc.weight, model.unused
    for slot, value in natural.state[weight].items():
        if isinstance(value, torch.Tensor):
            zero = made.state[weight][slot]
            assert (zero.shape, zero.dtype, zero.device) == (value.shape, value.dtype, value.device)
            assert not zero.any()
    assert set(made.state[unused]) == set(made.state[weight])
    assert not made.state.get(model.frozen)


def test_gradients_that_are_left_over_do_not_keep_the_optimizer_from_being_restored(tmp_path):
    """torch's own set_state_dict would skip it without a word."""
    model = Small()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, 2)
    path = CheckpointManager(tmp_path).save(2, model_state(model) | optimizer_state(model, optimizer), {})
    fresh = Small()
    fresh_optimizer = OPTIMIZERS["adamw"](fresh.parameters())
    fresh(torch.randn(5, 3)).sum().backward()
    target = model_state(fresh) | optimizer_state(fresh, fresh_optimizer)
    assert load_tensors(path, target) == len(target)
    assert all(torch.equal(target[name], t) for name, t in optimizer_state(model, optimizer).items())


def test_materialising_keeps_state_that_is_there():
    model = Small()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, 2)
    before = optimizer.state[model.fc.weight]["exp_avg"].clone()
    materialise_optimizer_state(model, optimizer)
    assert torch.equal(optimizer.state[model.fc.weight]["exp_avg"], before)
    assert optimizer.state[model.unused]["step"] == 0


def test_keys_are_slot_then_parameter_name():
    model = Small()
    names = set(optimizer_state(model, OPTIMIZERS["adamw"](model.parameters())))
    assert {"optimizer.exp_avg.fc.weight", "optimizer.exp_avg_sq.unused", "optimizer.step.norm.bias"} <= names
    assert len(names) == 3 * 5


def test_pipeline_parts_may_be_given_as_a_list():
    parts = [nn.ModuleDict({"3": nn.Linear(2, 2)}), nn.ModuleDict({"7": nn.Linear(2, 2)})]
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()])
    assert set(model_state(parts)) == {"model.3.weight", "model.3.bias", "model.7.weight", "model.7.bias"}
    assert "optimizer.step.7.bias" in optimizer_state(parts, optimizer)


def test_parameter_that_is_not_in_the_model_is_an_error():
    with pytest.raises(ValueError, match=r"a parameter of shape \[2, 2\] that the model does not have"):
        optimizer_state(Small(), torch.optim.AdamW([nn.Parameter(torch.zeros(2, 2))]))


def test_unknown_optimizer_is_named():
    model = Small()
    with pytest.raises(TypeError, match="RMSprop is not known; supported are Adam"):
        optimizer_state(model, torch.optim.RMSprop(model.parameters()))
