"""What initialize gives back, and what each method of an engine does."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_pool import run_distributed
from engine_models import (
    ADAM,
    IN,
    MICRO,
    OUT,
    STEPS,
    Block,
    D,
    E,
    Net,
    adam,
    batch,
    check,
    config_of,
    expert,
    loss_of,
    our_net,
    plain_run,
    said,
    train,
    whole,
)
from torch import nn
from torch.utils.data import TensorDataset

from megatron_moe import deepspeed, mpu
from megatron_moe.deepspeed.data import ShareLoader
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import is_moe_param
from megatron_moe.deepspeed.parallelise import blocks_of
from megatron_moe.deepspeed.utils import groups

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- what comes back


def start(accumulation=1, stage=0, ep=1, net=None, optimizer=ADAM, **arguments):
    config = config_of(
        dist.get_world_size(), accumulation, stage, **({"optimizer": optimizer} if optimizer else {}), **arguments.pop("sections", {})
    )
    return deepspeed.initialize(model=our_net(torch.float32, ep) if net is None else net, config=config, **arguments)


def _what_comes_back():
    data = TensorDataset(torch.randn(20, IN), torch.randint(OUT, (20,)))
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
    engine, optimizer, loader, schedule = start(2, 2, training_data=data, sections={"scheduler": warmup})
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer is engine.optimizer
    assert loader is engine.training_dataloader and schedule is engine.lr_scheduler and isinstance(engine.module, Net)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) == (12, 3, 2)
    assert (engine.global_rank, engine.world_size, engine.dp_world_size, engine.mp_world_size) == (dist.get_rank(), 2, 2, 1)
    assert engine.local_rank == dist.get_rank() and engine.device == torch.device("cpu")
    assert (engine.zero_optimization_stage(), engine.zero_optimization(), engine.fp16_enabled(), engine.bfloat16_enabled()) == (
        2,
        True,
        False,
        False,
    )
    assert (engine.global_steps, engine.skipped_steps, engine.get_global_grad_norm(), engine.loss_scale) == (0, 0, None, 1.0)
    assert (engine.gradient_clipping(), engine.dynamic_loss_scale(), engine.get_lr(), engine.get_mom()) == (
        0.3,
        False,
        [0.0],
        [(0.9, 0.999)],
    )
    assert engine.first is engine.module.first, "attributes of the module are reached through the engine"
    with pytest.raises(AttributeError, match="nowhere"):
        _ = engine.nowhere
    return True


def test_initialize_gives_engine_optimizer_loader_and_schedule():
    assert run_distributed(_what_comes_back, 2) == [True, True]


def _without(what):
    if what == "optimizer":
        engine, optimizer, *_ = start(optimizer=None)
        engine(torch.zeros(2, IN))
        assert optimizer is None
        engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)))
        engine.step()
    else:
        return [x is None for x in start()[2:]]


def test_what_was_not_asked_for_is_none():
    assert run_distributed(_without, 1, "rest") == [[True, True]]
    assert "there is no optimizer; give initialize" in run_distributed(said, 1, _without, "optimizer")[0]


def _from_args(path):
    import argparse

    return deepspeed.initialize(argparse.Namespace(deepspeed_config=path), our_net(torch.float32))[0].train_batch_size()


def test_the_config_comes_from_args_too(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2,}')
    assert run_distributed(_from_args, 2, str(path)) == [4, 4]


def _made_by_the_caller(kind):
    net = our_net(torch.float32, 2)
    make = {"function": lambda groups: adam(groups), "parameters": None}[kind]
    parameters = [{"params": list(net.moe.parameters()), "lr": 0.5}, {"params": list(net.last.parameters())}]
    sections = {} if make else {"optimizer": ADAM}
    engine, optimizer, *_ = deepspeed.initialize(
        model=net, optimizer=make, model_parameters=parameters, config=config_of(2, 1, 1, **sections)
    )
    names = {p: n for n, p in engine.module.named_parameters()}
    before = {n: whole(p) for p, n in names.items()}
    engine.backward(loss_of(engine, *batch(0, 0, dist.get_rank(), torch.float32)))
    engine.step()
    moved = {n for p, n in names.items() if not torch.equal(whole(p), before[n])}
    return [g["lr"] for g in optimizer.param_groups], {n for g in optimizer.param_groups for n in (names[p] for p in g["params"])}, moved


@pytest.mark.parametrize("kind", ["function", "parameters"])
def test_model_parameters_are_what_an_optimizer_is_made_over(kind):
    rates, mine, moved = run_distributed(_made_by_the_caller, 2, kind)[0]
    assert rates == [0.5, 0.01] and moved == mine and not any(n.startswith(("first", "blocks")) for n in mine)


def _unequal_starts():
    torch.manual_seed(dist.get_rank())
    net = Net()
    net.register_buffer("where", torch.full((2,), float(dist.get_rank())))
    engine, *_ = start(net=net, stage=1)
    return {n: whole(p) for n, p in engine.module.named_parameters()}, engine.module.where.tolist()


def test_all_ranks_start_with_the_weights_of_rank_0():
    (mine, buffer), (theirs, other) = run_distributed(_unequal_starts, 2)
    torch.manual_seed(0)
    assert torch.equal(mine["first.weight"], Net().first.weight.detach())
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items()) and buffer == other == [0.0, 0.0]


def _marks():
    net = our_net(torch.float32, 2)
    net.first.weight.no_decay = True
    engine, *_ = start(net=net, stage=2)
    named = dict(engine.module.named_parameters())
    return (
        [n for n, p in named.items() if is_moe_param(p)],
        named["first.weight"].no_decay,
        {p.group_name for p in named.values() if is_moe_param(p)},
    )


def test_marks_on_parameters_move_to_the_sharded_ones():
    experts, no_decay, names = run_distributed(_marks, 2)[0]
    assert len(experts) == 4 and all("experts" in n for n in experts) and no_decay is True and names == {"ep_size_2"}


def _degrees(section):
    net = nn.Sequential(Layer(8, 2), Layer(4, 1))
    start(net=net, sections={"moe": section} if section else {})
    assert all({p.group_name for p in layer.parameters() if is_moe_param(p)} == {f"ep_size_{layer.moe.ep_size}"} for layer in net)
    return [net[0].moe.ep_size, net[1].moe.ep_size], mpu.get_expert_model_parallel_world_size(), groups.get_data_parallel_world_size()


class Layer(nn.Module):
    def __init__(self, experts, ep):
        super().__init__()
        self.moe = MoE(IN, nn.Linear(IN, IN), experts, ep)

    def forward(self, x):
        return self.moe(x)[0]


def test_the_moe_section_gives_a_degree_to_layers_without_one():
    assert run_distributed(_degrees, 4, None)[0] == ([2, 1], 2, 4)
    assert run_distributed(_degrees, 4, {"expert_parallel_size": 2})[0] == ([2, 2], 2, 4)


# ---------------------------------------------------------------- units


class Tied(nn.Module):
    """Blocks that share a matrix with the rest, blocks inside of blocks, a list of leaves, experts in a list."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleList([nn.Sequential(Block(), nn.ModuleList([Block()])), Block(), Block()])
        self.leaves = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.moes = nn.ModuleList([MoE(D, expert(), E)])
        self.last = nn.Linear(D, D)
        self.last.weight = self.outer[2].inner.weight


def test_blocks_are_elements_of_module_lists_that_are_called_as_a_whole_and_share_nothing():
    assert [n for n, _ in blocks_of(Tied())] == ["outer.0", "outer.1"]
    assert [n for n, _ in blocks_of(Net())] == ["blocks.0", "blocks.1"]
    assert [n for n, _ in blocks_of(MoE(D, expert(), E))] == []


class Shared(nn.Module):
    """One matrix at both ends, and a layer that is read directly."""

    def __init__(self):
        super().__init__()
        self.table, self.blocks, self.read = nn.Linear(IN, D, bias=False), nn.ModuleList([Block()]), nn.Linear(D, D)
        self.back = nn.Linear(D, IN, bias=False)
        self.tied = nn.Linear(IN, D, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, x):
        h = F.linear(self.blocks[0](self.table(x)), self.read.weight, self.read.bias)
        return self.back(h + self.tied(x))


def _tied(stage, plain):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        net = Shared().double()
    x = torch.sin(torch.arange(4 * IN, dtype=torch.float64)).reshape(4, IN)
    if plain:
        optimizer = adam(net.parameters())
        for _ in range(3):
            (sum(net(x * (r + 1)).square().mean() for r in range(2)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: p.detach() for n, p in net.named_parameters()}
    engine, *_ = deepspeed.initialize(model=net, config=config_of(2, 1, stage, optimizer=ADAM) | {"gradient_clipping": 0})
    for _ in range(3):
        engine.backward(engine(x * (dist.get_rank() + 1)).square().mean())
        engine.step()
    assert engine.module.tied.weight is engine.module.table.weight
    return {n: whole(p) for n, p in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_matrices_stay_tied_and_weights_may_be_read_directly(stage):
    check(run_distributed(_tied, 2, stage, False)[0], _tied(stage, True), 1e-10)


# ---------------------------------------------------------------- the loop


def _boundaries():
    engine, *_ = start(3)
    seen = []
    for step in range(7):
        seen.append(engine.is_gradient_accumulation_boundary())
        engine.backward(loss_of(engine, *batch(step, 0, dist.get_rank(), torch.float32)))
        engine.step()
        seen.append((engine.was_step_applied(), engine.global_steps, engine.micro_steps, engine.global_samples))
    return seen


def test_a_step_updates_at_boundaries_alone():
    seen = run_distributed(_boundaries, 2)[0]
    assert seen[::2] == [False, False, True, False, False, True, False]
    assert [s[0] for s in seen[1::2]] == [False, False, True, False, False, True, False]
    assert seen[-1] == (False, 2, 7, 2 * 3 * 3 * 2)


def _returned():
    engine, *_ = start(4)
    loss = loss_of(engine, *batch(0, 0, 0, torch.float32))
    return (
        float(loss),
        float(engine.backward(loss)),
        float(engine.backward(loss_of(engine, *batch(0, 0, 0, torch.float32)), scale_wrt_gas=False)),
    )


def test_backward_returns_the_loss_over_the_accumulation():
    loss, returned, unscaled = run_distributed(_returned, 1)[0]
    assert returned == pytest.approx(loss / 4) and unscaled == pytest.approx(loss)


def _manual(stage, how):
    """Two micro-batches in each step, said by the caller in one of three ways."""
    engine, *_ = start(2 if how == "boundary" else 1, stage, 2, net=our_net(torch.float64, 2))
    if how == "set_train_batch_size":
        engine.set_train_batch_size(MICRO * 2 * 2)
        assert engine.gradient_accumulation_steps() == 2
    for step in range(STEPS):
        for micro in range(2):
            loss = loss_of(engine, *batch(step, micro, dist.get_rank()))
            if how == "boundary":
                engine.set_gradient_accumulation_boundary(micro == 1)
            if how == "no_sync" and micro == 0:
                with engine.no_sync():
                    engine.backward(loss / 2)  # no accumulation that the engine knows of
                continue
            engine.backward(loss / 2 if how == "no_sync" else loss)
            engine.step()
    return {f"weight {n}": whole(t) for n, t in engine.module_state_dict().items()}


@pytest.mark.parametrize(
    ("how", "stage"), [("boundary", 0), ("boundary", 2), ("boundary", 3), ("set_train_batch_size", 1), ("no_sync", 0), ("no_sync", 1)]
)
def test_accumulation_by_the_callers_word_is_the_same(how, stage):
    expected = {n: t for n, t in plain_run(2, 2).items() if n.startswith("weight")}
    check(run_distributed(_manual, 2, stage, how)[0], expected, 1e-10)


def _two_losses():
    """backward() twice before a step: gradients add up."""
    engine, *_ = start(1, 2, net=our_net(torch.float64))
    x, target = batch(0, 0, dist.get_rank())
    logits, l_aux = engine(x)
    engine.backward(F.cross_entropy(logits, target), retain_graph=True)
    engine.backward(0.05 * l_aux)
    engine.step()
    return engine.get_global_grad_norm()


def test_two_backwards_of_one_graph_add_up():
    norm = float(plain_run(2, 1)["norm 0"])
    assert run_distributed(_two_losses, 2) == pytest.approx([norm] * 2, rel=1e-10)


def _evaluation_between(stage):
    """An evaluation at every place in a step: between forward and backward excepted."""
    engine, *_ = start(1, stage, 2, net=our_net(torch.float64, 2))
    modes = []

    def evaluate():
        engine.eval()
        modes.append((engine.training, engine.module.moe.core.training))
        with torch.no_grad():
            engine(batch(9, 9, dist.get_rank())[0])
        engine.train()
        modes.append((engine.training, engine.module.moe.core.training))

    out = {}
    for step in range(STEPS):
        evaluate()
        engine.backward(loss_of(engine, *batch(step, 0, dist.get_rank())))
        evaluate()  # gathers the weights that the step is about to change
        engine.step()
    assert set(modes) == {(False, False), (True, True)}
    return out | {f"weight {n}": whole(t) for n, t in engine.module_state_dict().items()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_between_backward_and_step_changes_nothing(stage):
    expected = {n: t for n, t in plain_run(2, 1).items() if n.startswith("weight")}
    check(run_distributed(_evaluation_between, 2, stage)[0], expected, 1e-10)


class Branches(nn.Module):
    """A layer that the batches of rank 0 alone take, and one that nobody takes."""

    def __init__(self):
        super().__init__()
        self.common, self.rare, self.never = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, IN)

    def forward(self, x, is_rare):
        x = self.common(x)
        return self.rare(x) if is_rare else x


def _one_rank_alone(stage):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Branches().double()
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=config_of(2, 1, stage))
    for step in range(2):
        engine.backward(engine(batch(step, 0, dist.get_rank())[0], dist.get_rank() == 0).square().mean())
        engine.step()
    return {n: whole(p) for n, p in net.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_layer_that_one_rank_alone_uses(stage):
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.fail(
            "this torch cannot; initialize() says so in a warning"
        )  # 2.11, where the tests of the engine are not run on several ranks
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Branches().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(2):
        (sum(net(batch(step, 0, rank)[0], rank == 0).square().mean() for rank in range(2)) / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    check(run_distributed(_one_rank_alone, 2, stage)[0], {n: p.detach() for n, p in net.named_parameters()}, 1e-7)


def _learns(stage):
    engine, *_ = start(1, stage, 2, net=our_net(torch.float32, 2))
    losses = []
    for _ in range(30):
        loss = loss_of(engine, *batch(0, 0, dist.get_rank(), torch.float32))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses[0], losses[-1], math.isfinite(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", [0, 3])
def test_it_learns(stage):
    for first, last, is_finite in run_distributed(_learns, 4, stage):
        assert last < 0.6 * first and is_finite


# ---------------------------------------------------------------- lengths, lines, files


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lengths, self.layer = [], nn.Linear(IN, 1)

    def forward(self, x, curriculum_seqlen=None):
        x = x if curriculum_seqlen is None else x[:, :curriculum_seqlen]
        self.lengths.append(x.shape[1])
        return self.layer(x).mean()


CURRICULUM = {
    "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 24, "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 8},
}  # fmt: skip


def _lengths():
    net = Sequences()
    engine, *_ = start(2, net=net, sections={"curriculum_learning": CURRICULUM})
    for _ in range(10):
        engine.backward(engine(torch.ones(2, 24, IN)))
        engine.step()
    engine.eval()
    engine(torch.ones(2, 24, IN))
    return net.lengths


def test_the_curriculum_cuts_sequences_in_training():
    """Steps 1 to 5: 8 + 16 step / 4 rounded down to 8s, of two micro-batches each; evaluation is at full length."""
    assert run_distributed(_lengths, 1) == [[8, 8, 16, 16, 16, 16, 24, 24, 24, 24, 24]]


def _events(directory):
    sections = {"csv_monitor": {"enabled": True, "output_path": directory, "job_name": "job"}}
    engine, *_ = start(sections=sections)
    train(engine, range(2), torch.float32)
    engine.monitor.write_events([("Mine/accuracy", 0.5, 7)])
    return engine.monitor.enabled


def test_the_csv_monitor_writes_a_file_for_each_name_on_rank_0(tmp_path):
    assert run_distributed(_events, 2, str(tmp_path)) == [True, False]
    with open(tmp_path / "job" / "Train_Samples_lr.csv") as file:
        assert list(csv.reader(file)) == [["step", "Train/Samples/lr"], ["6", "0.01"], ["12", "0.01"]]
    assert (tmp_path / "job" / "Mine_accuracy.csv").read_text() == "step,Mine/accuracy\n7,0.5\n"


def _lines(every):
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("megatron_moe")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        engine, *_ = start(sections={"steps_per_print": every, "zero_optimization": {"stage": 1, "cpu_offload": True}})
        train(engine, range(4), torch.float32)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return records


def test_steps_per_print_and_what_has_no_effect_are_said():
    records = run_distributed(_lines, 1, 2)[0]
    assert [r for r in records if r.startswith("step")] == [f"step {n}, skipped 0, lr [0.01]" for n in (2, 4)]
    assert sum("offload to the host has no effect on a CPU" in r for r in records) == 1


SCRIPT = """
import torch
from megatron_moe import deepspeed

config = {"train_batch_size": 1, "steps_per_print": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(2, 1), config=config)
for _ in range(4):
    engine.backward(engine(torch.ones(1, 2)).mean())
    engine.step()
"""


def test_a_script_that_sets_up_no_logging_shows_them():
    """And starts without a launcher."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 2, skipped 0, lr [0.5]" in done.stderr and "step 4, skipped 0, lr [0.5]" in done.stderr


# ---------------------------------------------------------------- the loader


def numbers(count):
    return TensorDataset(torch.arange(count))


def taken(loader):
    return [[int(n) for n in samples] for (samples,) in loader]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_an_epoch_and_see_another_order_in_the_next(ranks):
    loaders = [ShareLoader(numbers(20), 3, rank, ranks) for rank in range(ranks)]
    epochs = [[taken(loader) for loader in loaders] for _ in range(2)]
    for epoch in epochs:
        seen = [n for of_rank in epoch for b in of_rank for n in b]
        assert set(seen) == set(range(20)) and len(seen) == math.ceil(20 / ranks) * ranks
        assert {len(of_rank) for of_rank in epoch} == {len(loaders[0])}
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("stop", [0, 2, 6, 7, 9])
def test_a_loader_goes_on_where_its_state_was_taken(stop):
    one, other = ShareLoader(numbers(20), 3, 0, 1), ShareLoader(numbers(20), 3, 0, 1)
    endless = (b for _ in range(9) for b in one)
    for _ in range(stop):
        next(endless)
    state = one.state()
    other.load_state(state)
    again = (b for _ in range(9) for b in other)
    for _ in range(8):
        assert torch.equal(next(endless)[0], next(again)[0])


def _share_of_the_engine():
    _, _, loader, _ = start(training_data=numbers(12))
    return [n for samples in taken(loader) for n in samples]


def test_an_engine_gives_each_rank_its_share():
    first, second = run_distributed(_share_of_the_engine, 2)
    assert sorted(first + second) == list(range(12))


def test_a_pass_that_is_broken_off_begins_anew():
    loader = ShareLoader(numbers(20), 3, 0, 1)
    first = next(iter(loader))
    assert torch.equal(next(iter(loader))[0], first[0])


def test_the_last_batch_may_be_left_out_and_collate_fn_is_used():
    loader = ShareLoader(numbers(20), 3, 0, 1, collate_fn=lambda samples: [int(n) for (n,) in samples], drop_last=True)
    assert len(loader) == 6 and [len(b) for b in loader] == [3] * 6
