"""Replicas are watched: equal layouts stay equal bit by bit, one flipped bit is found, and what that costs."""

from __future__ import annotations

import shlex

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from host_syncs import HostSyncs
from torch.utils._python_dispatch import TorchDispatchMode
from training import runs

from distributed import parity
from megatron_moe.metrics.reader import read_records
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training import pretrain
from megatron_moe.training.replicas import Drift, ReplicaDriftError, ReplicaWatch, bits_hash
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

EP2, TP2 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2"
CPU = torch.device("cpu")


def trained(model_name: str, flags: str, steps: int = 2):
    """A model after a few steps, with its optimizer, on the ranks of this pool."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, CPU)
    optimizer = build_optimizer(model, c.optimizer)
    for step in range(steps):
        batches = parity.microbatches(step, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
        train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, step)
    return model, optimizer


def drifts(model_name: str, flags: str, damage=None) -> list[Drift]:
    model, optimizer = trained(model_name, flags)
    if damage:
        damage(model, optimizer)
    return ReplicaWatch(model, optimizer, CPU).check()


def flip(t: torch.Tensor, bit: int = 0) -> None:
    """A bit, the lowest one by default, of the last number that is here."""
    local = t.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    local.view(-1)[-1:].view(torch.int32)[0] ^= 1 << bit


@pytest.mark.parametrize(("world", "flags"), [
    (2, "--zero-stage 0"), (2, f"--zero-stage 3 {TP2}"), (2, f"--zero-stage 1 {EP2}"),
    (4, f"--zero-stage 0 {TP2} {EP2}"), (4, "--zero-stage 1 --moe-expert-parallel-size 4"), (4, f"--zero-stage 3 {EP2} --bf16"),
])  # fmt: skip
def test_replicas_of_a_right_layout_are_equal_bit_by_bit(world, flags):
    assert run_distributed(drifts, world, "pyramid", flags) == [[]] * world


def on_last_rank(pick):
    def damage(model, optimizer):
        if dist.get_rank() == dist.get_world_size() - 1:
            flip(pick(model, optimizer))

    return damage


# module level, so that the workers can import them
def dense(model, optimizer):
    on_last_rank(lambda m, o: m.layers["1"].mlp.fc1.weight)(model, optimizer)


def norm_under_tp(model, optimizer):
    on_last_rank(lambda m, o: m.layers["2"].attn_norm.weight)(model, optimizer)


def expert(model, optimizer):
    on_last_rank(lambda m, o: m.layers["3"].moe.experts.w1)(model, optimizer)


def moment(model, optimizer):
    on_last_rank(lambda m, o: o.state[m.layers["2"].moe.gate.weight]["exp_avg"])(model, optimizer)


def expert_bias(model, optimizer):
    on_last_rank(lambda m, o: m.layers["3"].moe.gate.expert_bias)(model, optimizer)


@pytest.mark.parametrize(("damage", "world", "model", "flags", "name", "ranks"), [
    (dense, 4, "pyramid", "--zero-stage 0", "layers.1.mlp.fc1.weight", ((0, 1, 2), (3,))),
    (dense, 4, "pyramid", f"--zero-stage 0 {TP2}", "layers.1.mlp.fc1.weight", ((1,), (3,))),  # its own half alone
    (norm_under_tp, 2, "pyramid", f"--zero-stage 3 {TP2}", "layers.2.attn_norm.weight", ((0,), (1,))),
    (expert, 4, "pyramid", f"--zero-stage 0 {EP2}", "layers.3.moe.experts.w1", ((1,), (3,))),
    (moment, 4, "pyramid", "--zero-stage 0", "optimizer state of layers.2.moe.gate.weight", ((0, 1, 2), (3,))),
    (expert_bias, 4, "deepseek", "--zero-stage 3 --moe-expert-parallel-size 4", "layers.3.moe.gate.expert_bias", ((0, 1, 2), (3,))),
])  # fmt: skip
def test_one_flipped_bit_is_named_with_the_ranks(damage, world, model, flags, name, ranks):
    assert run_distributed(drifts, world, model, flags, damage) == [[Drift(name, ranks)]] * world


def test_a_shard_that_nobody_else_has_has_no_replica():
    assert run_distributed(drifts, 2, "pyramid", "--zero-stage 3", dense) == [[], []]


def test_every_single_bit_changes_the_hash():
    x = torch.randn(37, dtype=torch.float32)
    before = bits_hash(x)
    for element in (0, 1, 17, 36):
        for bit in range(32):
            y = x.clone()
            y.view(torch.int32)[element] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert bits_hash(y) != before, (element, bit)
    assert bits_hash(x.flip(0)) != before, "places count"
    assert bits_hash(x[:0]) == 0


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def cost() -> tuple[list[str], list[str]]:
    """Collectives and host syncs of a check that is not the first."""
    watch = ReplicaWatch(*trained("deepseek", f"--zero-stage 1 {EP2}"), CPU)
    watch.check()
    with Collectives() as collectives:
        watch.check()
    with HostSyncs() as syncs:
        watch.check()
    # what is brought to the device stays where it is: that is the CPU here
    return collectives.seen, [s for s in syncs.seen if s.startswith(("cpu", "tolist", "_local"))]


def test_a_check_is_one_collective_and_one_wait():
    for collectives, waits in run_distributed(cost, 2):
        assert len(collectives) == 1 and "allgather" in collectives[0].replace("_", ""), collectives
        assert len(waits) == 1, waits


def run_with_a_flip(save: str, interval: int) -> str:
    """A real run of two ranks, of which one has a flipped bit after its third step."""
    original = pretrain.train_step

    def train_step_and_flip(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest):
        result = original(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest)
        if iteration == 2 and dist.get_rank() == 1:
            flip(model.layers["1"].mlp.fc2.bias, bit=12)  # the lowest may be rounded away by the next update
        return result

    pretrain.train_step = train_step_and_flip
    try:
        runs.train_here(f"--mock-data --train-iters 10 --save {save} --save-interval 1 --zero-stage 0 --check-replicas-interval {interval}")
    except ReplicaDriftError as error:
        return str(error)
    finally:
        pretrain.train_step = original
    return ""


@pytest.mark.parametrize(("interval", "found_in"), [(1, 3), (2, 4)])
def test_a_run_with_a_flipped_bit_stops_before_it_saves_it(tmp_path, interval, found_in):
    for said in run_distributed(run_with_a_flip, 2, str(tmp_path / "run"), interval):
        assert said.startswith(f"iteration {found_in}: ") and "layers.1.mlp.fc2.bias is different on ranks 0 and 1" in said, said
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    alert = next(r for r in records if r.get("condition") == "replica_drift")
    assert alert["iteration"] == found_in and "layers.1.mlp.fc2.bias" in alert["parameters"] and alert["ranks"][0] == [[0], [1]]
    assert records[-1]["event"] == "stop" and records[-1]["reason"] == "replicas have drifted"
    assert max(r["iteration"] for r in records if r["event"] == "save") == found_in - 1


def test_the_name_in_megatron_is_accepted():
    from megatron_moe.arguments import parse_args

    run = parse_args(shlex.split("--preset tiny --mock-data --check-weight-hash-across-dp-replicas-interval 5")).run
    assert run.training.check_replicas_interval == 5
