"""A mistake gets the rule, the values and what to change, before anything starts where that can be."""

import argparse
import re

import pytest
import torch
from distributed_pool import run_distributed
from engine_models import ADAM, IN, MICRO, Net, batch, config_of, loss_of, our_net, said
from torch import nn

from megatron_moe import deepspeed
from megatron_moe.deepspeed.moe.layer import MoE

# ---------------------------------------------------------------- initialize


def start(config=None, model=None, **arguments):
    config = config_of(1, 1, 0, optimizer=ADAM) if config is None else config
    return deepspeed.initialize(model=Net() if model is None else model, config=config, **arguments)


def with_config(**sections):
    return start(config_of(1, 1, 0, optimizer=ADAM) | sections)


def both_configs():
    start(args=argparse.Namespace(deepspeed_config="ds.json"))


def no_config():
    deepspeed.initialize(model=Net(), args=argparse.Namespace())


def no_such_file():
    start("nowhere.json")


def no_model():
    deepspeed.initialize(model=None, config={})


def a_foreign_optimizer():
    start(optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))


def an_optimizer_made_before_a_layer_was_replaced():
    net = Net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "name": "all"}], lr=0.1)
    net.last = nn.Linear(12, 5)
    start(model=net, optimizer=optimizer)


def foreign_parameters():
    start(model_parameters=list(Net().parameters()))


def a_parameter_in_two_groups():
    net = Net()
    start(model=net, model_parameters=[{"params": net.parameters()}, {"params": net.last.parameters()}])


def lbfgs():
    net = Net()
    start(config_of(1, 1, 0), model=net, optimizer=torch.optim.LBFGS(net.parameters()))


def a_schedule_of_another_optimizer():
    net = Net()
    one, other = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), lr=0.1)
    start(model=net, optimizer=one, lr_scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def wrapped_in_dp():
    start(model=nn.DataParallel(Net()))


def on_meta():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    start(model=net)


def nothing_to_train():
    start(model=nn.Linear(2, 2).requires_grad_(False))


def experts_the_config_contradicts():
    with_config(moe={"enabled": True, "num_experts": 16})


def a_factor_that_the_config_contradicts():
    with_config(moe={"num_experts": 8, "train_capacity_factor": 1.25})


def experts_in_the_config_and_no_layer():
    start(config_of(1, 1, 0, optimizer=ADAM) | {"moe": {"num_experts": 8}}, model=nn.Linear(2, 2))


def a_stream_of_data():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    start(training_data=Stream())


def a_length_that_nobody_takes():
    with_config(curriculum_learning={
        "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 16, "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 8},
    })  # fmt: skip


def model_parallel():
    class Mpu:
        @staticmethod
        def get_model_parallel_world_size():
            return 2

    start(mpu=Mpu)


def a_callers_optimizer_of_half_weights():
    net = Net()
    start(config_of(1, 1, 0, optimizer=ADAM, fp16={"enabled": True, "fp16_master_weights_and_grads": True}), model=net,
          optimizer=torch.optim.SGD(net.parameters(), lr=0.1))  # fmt: skip


INITIALIZE = {
    both_configs: r"both config \(a dict\) and args.deepspeed_config \(ds.json\) are given; drop one",
    no_config: "there is no config; give initialize",
    no_such_file: "the DeepSpeed config nowhere.json is not there",
    no_model: "wants a torch.nn.Module, not NoneType",
    a_foreign_optimizer: r"the optimizer: group 0 \(without a name\) has a parameter of shape \[12, 6\] that is not the model's",
    an_optimizer_made_before_a_layer_was_replaced: r"the optimizer: group 0 \(all\) has a parameter of shape .* after the last layer was replaced",
    foreign_parameters: "model_parameters: group 0 .* is not the model's",
    a_parameter_in_two_groups: "last.weight is in group 0 and again in group 1; name it once",
    lbfgs: "LBFGS calls the model by itself",
    a_schedule_of_another_optimizer: "the lr_scheduler belongs to another optimizer",
    wrapped_in_dp: r"wrapped in DataParallel, .*give its \.module",
    on_meta: r"parameters without memory \(device meta\): weight, bias",
    nothing_to_train: "no parameter that requires a gradient",
    experts_the_config_contradicts: r"moe.num_experts \(16\) contradicts the MoE layer moe, which was made with 8",
    a_factor_that_the_config_contradicts: r"moe.train_capacity_factor \(1.25\) contradicts the MoE layer moe, which was made with 1.0",
    experts_in_the_config_and_no_layer: r"speaks of experts \(moe.num_experts\) and the model has no MoE layer",
    a_stream_of_data: "not Stream: an endless stream",
    a_length_that_nobody_takes: "gives the length to the model as curriculum_seqlen, and Net.forward does not take it",
    model_parallel: r"get_model_parallel_world_size': 2\}: a module of one's own is not split",
    a_callers_optimizer_of_half_weights: "fp16_master_weights_and_grads has an AdamW of its own",
}


@pytest.mark.parametrize("mistake", INITIALIZE, ids=lambda f: f.__name__)
def test_initialize_refuses(mistake):
    found = run_distributed(said, 1, mistake)
    assert all(re.match("(ValueError|ConfigError): ", text) and re.search(INITIALIZE[mistake], text) for text in found), found


def _degree(ep, experts, section=None):
    net = nn.Sequential(nn.Linear(IN, 12), Head(experts, ep))
    config = config_of(2, 1, 0, optimizer=ADAM) | ({"moe": section} if section else {})
    deepspeed.initialize(model=net, config=config)


class Head(nn.Module):
    def __init__(self, experts, ep):
        super().__init__()
        self.moe = MoE(12, nn.Linear(12, 12), experts, ep)

    def forward(self, x):
        return self.moe(x)[0]


@pytest.mark.parametrize(
    ("ep", "experts", "section", "says"),
    [
        (4, 8, None, r"expert-parallel degree \(4\) of the MoE layer 1.moe must divide the number of ranks \(2\); use one of 1, 2"),
        (1, 3, {"expert_parallel_size": 2}, r"the 3 experts of the MoE layer 1.moe cannot be shared out over 2 ranks .*use one of 1, 3"),
        (2, 8, {"expert_parallel_size": 1}, r"moe.expert_parallel_size \(1\) contradicts ep_size \(2\) of the MoE layer 1.moe"),
    ],
)
def test_experts_that_do_not_divide(ep, experts, section, says):
    found = run_distributed(said, 2, _degree, ep, experts, section)
    assert all(re.match("(ValueError|ConfigError): ", text) and re.search(says, text) for text in found), found


# ---------------------------------------------------------------- the loop


def _in_the_loop(mistake, stage=0, accumulation=1):
    engine, *_ = deepspeed.initialize(model=our_net(torch.float32), config=config_of(1, accumulation, stage, optimizer=ADAM))
    mistake(engine)


def a_loss_that_is_no_number(engine):
    engine.backward(engine(batch(0, 0, 0, torch.float32)[0])[0])


def a_float(engine):
    engine.backward(1.5)


def a_loss_without_a_graph(engine):
    with torch.no_grad():
        loss = loss_of(engine, *batch(0, 0, 0, torch.float32))
    engine.backward(loss)


def step_without_backward(engine):
    engine.step()


def two_steps(engine):
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.step()
    engine.step()


def a_loss_of_something_else(engine):
    engine.backward(torch.ones((), requires_grad=True) * 2)
    engine.step()


def a_boundary_that_comes_too_late(engine):
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.set_gradient_accumulation_boundary(True)
    engine.step()


def a_step_in_no_sync(engine):
    with engine.no_sync():
        engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
        engine.step()


def a_batch_that_does_not_divide(engine):
    engine.set_train_batch_size(MICRO + 1)


LOOP = {
    a_loss_that_is_no_number: r"one number, and was given a tensor of shape \[3, 5\]; take the mean",
    a_float: "was given a float",
    a_loss_without_a_graph: "a loss without a graph",
    step_without_backward: r"step\(\) without backward\(\)",
    two_steps: r"step\(\) without backward\(\)",
    a_loss_of_something_else: "no parameter of the optimizer has a gradient",
    a_boundary_that_comes_too_late: r"call set_gradient_accumulation_boundary\(True\) before backward",
    a_step_in_no_sync: r"step\(\) inside of no_sync\(\)",
    a_batch_that_does_not_divide: r"set_train_batch_size\(4\): must be a multiple of micro batch x ranks \(3 x 1 = 3\)",
}


@pytest.mark.parametrize("mistake", LOOP, ids=lambda f: f.__name__)
def test_the_loop_refuses(mistake):
    found = run_distributed(said, 1, _in_the_loop, mistake)
    assert all(re.match("(ValueError|ConfigError): ", text) and re.search(LOOP[mistake], text) for text in found), found


def no_sync_of_shards(engine):
    with engine.no_sync():
        pass


def test_no_sync_is_for_whole_gradients():
    found = run_distributed(said, 1, _in_the_loop, no_sync_of_shards, 2)
    assert all(
        re.match("(ValueError|ConfigError): ", text) and re.search("ZeRO 2 keeps shards of them; use stage 0 or 1", text) for text in found
    ), found


def another_batch_within_a_step(engine):
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.step()
    engine.set_train_batch_size(MICRO)


def test_the_batch_changes_between_steps_alone():
    found = run_distributed(said, 1, _in_the_loop, another_batch_within_a_step, 0, 2)
    assert all(re.match("(ValueError|ConfigError): ", text) and re.search("in the middle of a step", text) for text in found), found


def _stale(directory):
    """The fault that the assertion is there for: the optimizer keeps the parameters of before sharding."""
    from unittest import mock

    from megatron_moe.deepspeed import optimizers

    net = our_net(torch.float32, 2)
    optimizer = torch.optim.SGD([{"params": net.parameters(), "name": "mine"}], lr=0.1)
    with mock.patch.object(optimizers, "move_optimizer", return_value=None):
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config_of(2, 1, 1))
    for p in optimizer.param_groups[0]["params"]:  # gradients from elsewhere: otherwise a ValueError comes first
        p.grad = torch.ones_like(p)
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.step()


def test_an_optimizer_that_was_not_moved_is_found_in_the_first_step():
    found = run_distributed(said, 2, _stale, "")
    assert all(
        re.match("AssertionError: ", text)
        and re.search(r"group 0 \(mine\) of SGD updates \d+ of \d+ parameters that are not the sharded model's", text)
        for text in found
    ), found


def _lazy():
    net = our_net(torch.float32)

    class Lazy(torch.optim.SGD):
        def step(self, closure=None):
            return None

    engine, *_ = deepspeed.initialize(model=net, optimizer=Lazy(net.parameters(), lr=0.1), config=config_of(1, 1, 0))
    engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
    engine.step()


def test_a_group_that_did_not_move_is_found_in_the_first_step():
    found = run_distributed(said, 1, _lazy)
    assert all(
        re.match("AssertionError: ", text) and re.search(r"group 0 \(without a name\) of Lazy did not move in the first step", text)
        for text in found
    ), found


def test_add_config_arguments_reads_what_scripts_are_given(tmp_path):
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "x.json"])
    assert args.deepspeed is True and args.deepspeed_config == "x.json"
    assert parser.parse_args(["--deepscale_config", "y.json"]).deepspeed_config == "y.json"
