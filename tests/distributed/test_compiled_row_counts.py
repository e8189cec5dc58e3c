"""Ranks whose experts get no row, one row, two, or many: one graph for all of them. (torch makes graphs of their own for sizes 0 and 1.)"""

from __future__ import annotations

import importlib.util
import sys
from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel import apply, compile
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward
from tests.distributed import parity
from tests.distributed.test_compiled_training import compiling, graphs, noting_rows

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2"
SMALL = f"{EP} --num-layers 2 --num-experts 1 4 --hidden-size 16 --num-attention-heads 2 --seq-length 7"
SENT = (3, 0, 1, 2, 0, 5, 1)  # assignments of each micro-batch to the experts of the last rank, by the first rank alone


class Sending:
    """In place of the route of a layer: tokens of the first rank go to the last one as often as `rows` says, all others to the first."""

    def __init__(self, moe, rank: int):
        self.moe, self.route, self.rank, self.rows = moe, moe.route, rank, 0

    def __call__(self, x, tokens):
        routing, limits = self.route(x, tokens)
        ids = torch.arange(routing.ids_TK.numel()).view_as(routing.ids_TK) % (self.moe.num_experts // 2)
        if self.rank == 0:
            ids[: self.rows, 0] = self.moe.num_experts - 1
        routing.ids_TK = ids
        return routing, limits


def graphs_by_rows(flags: str, without_padding: bool = False) -> tuple[list[int], list[int]]:
    """Graphs after each micro-batch, forward and backward, and the rows of the experts here."""
    c = parity.config("noisy", f"{flags} --compile --moe-noisy-gate-policy RSample")
    mesh, found, rows = build_parallel_mesh(c, "cpu"), [], []
    with compiling("aot_eager"), mock.patch.object(compile, "of_any_rows", (lambda f: f) if without_padding else compile.of_any_rows):
        model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    layers = moe_layers(model)
    for moe in layers:
        moe.experts.forward = noting_rows(moe.experts.forward, rows)
        moe.route = Sending(moe, mesh.rank("dp"))
    for i, sent in enumerate(SENT):
        for moe in layers:
            moe.route.rows = sent
        batches = parity.microbatches(i, mesh.rank("dp"), mesh.size("dp"), 2)[:1]
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, i)
        found.append(graphs())
    return found, rows


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, f"{SMALL} --moe-token-dispatcher alltoall"),
        pytest.param(2, f"{EP} --moe-overlap-chunks 2 --recompute-granularity full", marks=pytest.mark.matrix),
        pytest.param(4, "--moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2", marks=pytest.mark.matrix),
        pytest.param(4, f"{EP} --expert-tensor-parallel-size 2 --moe-token-dispatcher alltoall", marks=pytest.mark.matrix),
        pytest.param(2, f"{EP} --moe-token-dispatcher allgather", marks=pytest.mark.matrix),  # as many rows, whatever comes
    ],
    ids=["alltoall", "parts", "hierarchical", "slices", "allgather"],
)
def test_no_row_one_row_and_many_are_one_graph(world, flags):
    results = run_distributed(graphs_by_rows, world, flags)
    for found, _ in results:
        assert len(set(found)) == 1, found
    assert "allgather" in flags or {0, 1, 2} <= set(results[-1][1])


@pytest.mark.matrix
def test_without_its_filling_up_the_experts_are_compiled_again():
    found = run_distributed(graphs_by_rows, 2, f"{SMALL} --moe-token-dispatcher alltoall", True)[1][0]
    assert found[-1] > found[0]


def graphs_of_evaluations(model_name: str, flags: str, fused: bool = False) -> tuple[list[int], list[int]]:
    """After a training step and a first evaluation, and after three more of other tokens; rows of the experts."""
    c = parity.config(model_name, f"{flags} --compile")
    mesh, found, rows = build_parallel_mesh(c, "cpu"), [], []
    with compiling("aot_eager"), mock.patch.object(apply, "apply_fused_dispatch", fuse if fused else apply.apply_fused_dispatch):
        model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    for moe in moe_layers(model):
        moe.experts.forward = noting_rows(moe.experts.forward, rows)
    for i in range(4):
        batches = parity.microbatches(i, mesh.rank("dp"), mesh.size("dp"), 1)[:1]
        if i == 0:
            forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, parity.SEED, i)
        evaluate(model, batches, mesh, torch.device("cpu"))
        found.append(graphs())
    return found, rows


def fuse(model, mesh, config) -> None:
    from megatron_moe.kernels.fused.exchange import Exchange
    from megatron_moe.kernels.fused.memory import ProcessMemory
    from megatron_moe.parallel.fused import use_fused_dispatch
    from tests.distributed.fused_ranks import SPINS

    use_fused_dispatch(model, mesh, lambda moe, group: Exchange(ProcessMemory(group), moe.num_experts, moe.config.topk, "static", 3.0, spins=SPINS))  # fmt: skip


def test_evaluations_that_are_padded_to_the_load_are_one_graph_also_where_training_has_a_capacity():
    for found, rows in run_distributed(graphs_of_evaluations, 2, "expert_choice", f"{SMALL} --moe-pad-expert-input-to-capacity"):
        assert len(set(found)) == 1 and len(set(rows)) > 2, (found, rows)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton and memfd_create are of Linux")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_evaluations_over_the_fused_all_to_all_are_one_graph():
    """There its sizes are exact, and change from batch to batch."""
    for found, rows in run_distributed(graphs_of_evaluations, 2, "dropping", SMALL, True, interpret=True):
        assert len(set(found)) == 1 and len(set(rows)) > 2, (found, rows)
