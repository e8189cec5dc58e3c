"""What a parallel model is made of follows its flags, where a wrong choice would still train the right numbers."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.moe.layer import moe_layers
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed


def build(model: str, flags: str):
    c = parity.config(model, flags)
    mesh = build_parallel_mesh(c, "cpu")
    return c, mesh, build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))


def dispatchers(flags: str) -> list[str]:
    return [moe.dispatcher.name for moe in moe_layers(build("modern", flags)[2])]


@pytest.mark.parametrize(("asked", "name"), [("alltoall", "alltoall"), ("allgather", "allgather"), ("auto", "alltoall")])
def test_tokens_travel_as_the_flag_says(asked, name):
    assert run_distributed(dispatchers, 2, f"--moe-expert-parallel-size 2 --moe-token-dispatcher {asked}")[0] == [name, name]


def experts_of_a_layer(flags: str) -> torch.Tensor:
    return parity.whole(moe_layers(build("modern", flags)[2])[0].experts.w1)


def test_experts_of_all_ranks_start_equal_when_asked_to():
    layout = "--moe-expert-parallel-size 2 --zero-stage 3"
    same = run_distributed(experts_of_a_layer, 2, f"{layout} --moe-identical-expert-init")[0]
    different = run_distributed(experts_of_a_layer, 2, layout)[0]
    assert all(torch.equal(same[0], expert) for expert in same)
    assert not any(torch.equal(different[0], expert) for expert in different[1:])


def matrix_elements_here(flags: str) -> dict[str, int]:
    """Of the experts of the first MoE layer."""
    experts = moe_layers(build("pyramid", flags)[2])[0].experts
    return {name: p.to_local().numel() for name, p in experts.named_parameters() if name.startswith("w")}


def test_an_expert_that_is_alone_on_several_ranks_is_cut_and_not_kept_by_one():
    """Two experts, EP 2, four ranks: by number of expert, every second rank would hold nothing."""
    found = run_distributed(matrix_elements_here, 4, "--moe-expert-parallel-size 2 --zero-stage 1")
    hidden, ffn = 32, 128
    assert found == [{"w1": hidden * ffn // 2, "w2": hidden * ffn // 2}] * 4


def widths_here(flags: str) -> tuple[int, int, str]:
    block = build("shared", flags)[2].layers["3"]
    columns, whole = block.shared_expert.fc1.weight.to_local(), block.shared_expert_gate.weight
    return columns.shape[0], whole.shape[1], block.moe.dispatcher.name


def test_a_shared_expert_is_cut_over_tensor_parallel_ranks_and_its_gate_is_not():
    flags = "--tensor-model-parallel-size 2 --moe-expert-parallel-size 2 --zero-stage 0 --moe-pad-expert-input-to-capacity"
    assert run_distributed(widths_here, 2, flags) == [(12, 32, "padded")] * 2  # of 24 and 32


def products_of_a_step(flags: str) -> tuple[dict[str, int], int]:
    """How often the modules of one layer compute in a step of one microbatch; collectives that nobody has waited for."""
    c, mesh, model = build("pyramid", f"{flags} --micro-batch-size {parity.SEQUENCES}")
    calls = dict.fromkeys(("attention", "mlp", "experts", "router"), 0)

    def count(name: str):
        def hook(*_):
            calls[name] += 1

        return hook

    block = model.layers["3"]
    for name, module in (("attention", block.attn), ("mlp", block.mlp), ("experts", block.moe.experts), ("router", block.moe.gate)):
        module.register_forward_hook(count(name))
    batches = parity.microbatches(0, 0, 1, c.training.micro_batch_size)
    assert len(batches) == 1
    train_step(model, build_optimizer(model, c.optimizer), batches, mesh, 1e-3, 1.0, parity.SEED, 0)
    return calls, torch._C._distributed_c10d._get_work_registry_size()


@pytest.mark.parametrize(
    ("flag", "twice"),
    [
        ("", set()),
        ("--recompute-granularity selective", {"attention"}),
        ("--recompute-granularity full", {"attention", "mlp", "experts"}),
    ],
)
def test_what_is_recomputed_computes_twice_and_the_router_never(flag, twice):
    calls, unwaited = run_distributed(products_of_a_step, 2, f"--tensor-model-parallel-size 2 {flag}")[0]
    assert calls == {name: 2 if name in twice else 1 for name in calls}
    assert unwaited == 0
