"""What is logged about the experts of a layout: bytes as the process groups send them, and the same loads as in one process."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from distributed.collectives import BytesSent
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

EP = "--moe-expert-parallel-size 2"
ETP = "--expert-tensor-parallel-size 2"
ALLTOALL, ALLGATHER = "--moe-token-dispatcher alltoall", "--moe-token-dispatcher allgather"
NODES = "--moe-expert-parallel-size 4 --moe-token-dispatcher hierarchical --moe-node-size 2"


def bytes_of_a_step(model_name: str, flags: str) -> tuple[int, int]:
    return all_bytes_of_a_step(model_name, flags)["sent"]


def all_bytes_of_a_step(model_name: str, flags: str) -> dict[str, tuple[float, int]]:
    """Sent by this rank in one step for its rows: as the statistics have it, and at the groups of the experts; of these, what leaves the node
    in two stages."""
    c = parity.config(model_name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), c.training.micro_batch_size)
    divisor = count_loss_tokens(batches, mesh)
    with BytesSent() as wire:
        forward_backward(model, batches, divisor, mesh, parity.SEED, 0)
    groups = [g for ep in mesh.experts for g in (mesh.expert_group(ep), mesh.expert_tensor_group(ep), *(mesh.expert_node_groups(ep) or ()))]
    across = [nodes[1] for ep in mesh.experts if (nodes := mesh.expert_node_groups(ep))]
    stats = [moe.stats for moe in moe_layers(model)]
    return {"sent": (sum(s.sent_bytes for s in stats), wire.of(*groups)), "far": (sum(s.far_bytes for s in stats), wire.of(*across))}


@pytest.mark.parametrize(
    ("model", "world", "flags"),
    [
        ("pyramid", 2, f"{EP} {ALLTOALL}"),
        ("pyramid", 2, f"{EP} {ALLTOALL} --recompute-granularity full --bf16"),
        ("dropping", 2, f"{EP} {ALLTOALL} --zero-stage 3"),
        ("dropping", 2, f"{EP} --moe-pad-expert-input-to-capacity"),
        ("latent", 2, f"{EP} --moe-pad-expert-input-to-capacity --recompute-granularity full"),
        ("pyramid", 2, f"{EP} {ALLGATHER} --recompute-granularity selective"),
        ("pyramid", 2, f"{EP} {ALLGATHER} --tensor-model-parallel-size 2 --recompute-granularity full"),
        ("pyramid", 2, f"{EP} {ALLTOALL} --moe-overlap-chunks 3 --recompute-granularity full"),
        ("pyramid", 2, f"{ETP} {ALLTOALL} --bf16"),
        ("dropping", 4, f"{EP} {ETP} {ALLTOALL} --zero-stage 0"),
        ("dropping", 4, f"{EP} {ETP} --moe-pad-expert-input-to-capacity --recompute-granularity full"),
        ("pyramid", 4, f"{EP} {ETP} {ALLGATHER} --tensor-model-parallel-size 2"),
        ("pyramid", 4, f"{EP} {ETP} {ALLTOALL} --moe-overlap-chunks 2 --bf16"),
        ("pyramid", 4, f"{NODES} --bf16"),
        ("dropping", 4, f"{NODES} --moe-overlap-chunks 2 --recompute-granularity full"),
    ],
)
def test_bytes_sent_are_those_that_the_groups_send(model, world, flags):
    found = run_distributed(bytes_of_a_step, world, model, flags)
    for counted, at_the_groups in found:
        assert counted == at_the_groups > 0


@pytest.mark.parametrize("flags", [NODES, pytest.param(f"{NODES} --recompute-granularity full", marks=pytest.mark.matrix)])
def test_bytes_to_other_nodes_are_those_that_their_groups_send(flags):
    for found in run_distributed(all_bytes_of_a_step, 4, "dropping", flags):
        far, at_the_groups = found["far"]
        assert far == at_the_groups and 0 < far < found["sent"][0]


def test_nothing_is_sent_where_all_experts_are_local():
    assert run_distributed(bytes_of_a_step, 2, "pyramid", "") == [(0, 0), (0, 0)]
