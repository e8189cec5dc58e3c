"""Recomputation changes no bit of any gradient, with dropout, jitter and random token selection on, and asks the router once."""

from __future__ import annotations

import pytest
import torch
from distributed import parity
from distributed_pool import run_distributed

from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import count_loss_tokens, forward_backward

pytestmark = pytest.mark.distributed

NOISE = "--hidden-dropout 0.2 --attention-dropout 0.2 --moe-noisy-gate-policy Jitter --moe-train-capacity-factor 0.7 --moe-min-capacity 1"


def gradients(flags: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """Of one step of two micro-batches, with the number of times that a policy was asked, and that a layer was run."""
    c = parity.config("dropping", f"{NOISE} --lr 1e-3 {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    asked = []
    for moe in moe_layers(model):
        moe.policy = Counted(moe.policy, asked)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
    forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, 7, 3)
    return {n: parity.whole(p.grad) for n, p in model.named_parameters()}, len(asked), len(batches) * len(moe_layers(model))


class Counted:
    def __init__(self, policy, asked):
        self.policy, self.asked, self.keeps_capacity = policy, asked, policy.keeps_capacity

    def __call__(self, *args):
        self.asked.append(1)
        return self.policy(*args)


@pytest.mark.parametrize("policy", ["topk", "sinkhorn", "zipf", "expert_choice"])
def test_gradients_with_and_without_recompute_are_bit_equal(policy):
    flags = f"--moe-router-policy {policy} --moe-expert-parallel-size 2 --zero-stage 3"
    plain = run_distributed(gradients, 2, flags)[0]
    kinds = ["--recompute-granularity selective", "--recompute-granularity full"]
    if policy == "topk":
        kinds += ["--recompute-granularity selective --recompute-modules moe mlp", "--moe-layer-recompute"]
    for kind in kinds:
        again = run_distributed(gradients, 2, f"{flags} {kind}")[0]
        assert [n for n, g in plain[0].items() if not torch.equal(g, again[0][n])] == []
        assert again[1] == again[2] == plain[1]
