"""What a rank has between the blocks, and what the experts are given, where sequences are cut; and evaluation of such a layout."""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from distributed import parity
from megatron_moe.data.batch import Batch
from megatron_moe.moe.layer import moe_layers
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.context import part_of
from megatron_moe.training.evaluate import evaluate

pytestmark = pytest.mark.distributed

TP2, SP, CP2, EP2 = "--tensor-model-parallel-size 2", "--sequence-parallel", "--context-parallel-size 2", "--moe-expert-parallel-size 2"
EVEN = parity.DIVISIBLE  # 16 tokens, hidden size 32, micro-batches of 2


def build(model_name: str, flags: str):
    c = parity.config(model_name, f"{parity.FP64} {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    return c, mesh, model


def shapes(flags: str) -> tuple[set, set, tuple]:
    """Of what enters blocks, of what enters MoE layers' gates, and of the losses."""
    c, mesh, model = build("pyramid", flags)
    blocks, gates = set(), set()
    for block in model.layers.values():
        block.register_forward_pre_hook(lambda _, args: blocks.add(tuple(args[0].shape)))
    for moe in moe_layers(model):
        moe.gate.register_forward_pre_hook(lambda _, args: gates.add(tuple(args[0].shape)))
    batch, _ = part_of(parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2, c)[0], None, mesh)
    losses = model(batch.tokens, batch.position_ids, batch.labels)
    return blocks, gates, tuple(losses.shape)


@pytest.mark.parametrize(
    ("world", "flags", "tokens", "routed", "lost"),
    [
        (2, TP2, 16, 16, 16),  # whole on every rank, and the experts are given a half
        (2, f"{TP2} {SP}", 8, 16, 16),
        (2, CP2, 8, 16, 8),
        (4, f"{CP2} {TP2}", 8, 8, 8),
        (4, f"{CP2} {TP2} {SP}", 4, 8, 8),
    ],
)
def test_a_rank_has_its_part_of_the_tokens(world, flags, tokens, routed, lost):
    for found in run_distributed(shapes, world, f"{flags} {EVEN}"):
        assert found == ({(2, tokens, 32)}, {(routed, 32)}, (2, lost))


def places(world_flags: str) -> tuple[list[int], list[int]]:
    """Tokens of a batch that counts them, and the places that the router knows."""
    c, mesh, model = build("balanced", world_flags)
    tokens = torch.arange(16).expand(2, 16)
    batch = Batch(tokens, tokens, torch.ones(2, 16), tokens, None, torch.arange(2))
    part, keys = part_of(batch, 100 * tokens, mesh)
    assert torch.equal(keys, 100 * part.tokens)
    seen = []
    moe = moe_layers(model)[0]
    policy = moe.policy

    def look(logits, info, *rest):
        seen.append((info.places(logits).tolist(), info.ids_T.tolist()))
        return policy(logits, info, *rest)

    look.keeps_capacity = policy.keeps_capacity
    moe.policy = look
    model(part.tokens, part.position_ids, part.labels)
    return seen[0]


@pytest.mark.parametrize(
    ("world", "flags", "first_sequence"),
    [
        (2, CP2, [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]),
        (2, f"{TP2} {SP}", [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        (4, f"{CP2} {TP2} {SP}", [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
)
def test_the_router_knows_the_place_and_the_word_of_every_token(world, flags, first_sequence):
    for (found, ids), mine in zip(run_distributed(places, world, f"{flags} {EVEN}"), first_sequence, strict=True):
        assert found == [*mine, *(16 + p for p in mine)]
        assert ids == [*mine, *mine]


def evaluation(model_name: str, flags: str) -> tuple[float, int]:
    c, mesh, model = build(model_name, flags)
    batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2, c)
    found = evaluate(model, batches, mesh, torch.device("cpu"))
    return found.lm_loss, found.tokens


@pytest.mark.parametrize("model", ["noisy", "zipf", "hash", "modern"])  # zipf: by place
@pytest.mark.parametrize(
    ("world", "flags"), [(2, CP2), (2, f"{TP2} {SP} {EP2}"), (4, f"--zero-stage 3 {CP2} {TP2} {SP} {EP2}"), (4, f"{CP2} {TP2}")]
)
def test_an_evaluation_is_that_of_one_process(model, world, flags):
    data = f"{EVEN} {parity.DOCUMENTS}"
    loss, tokens = run_distributed(evaluation, 1, model, data)[0]
    for found in run_distributed(evaluation, world, model, f"{flags} {data}"):
        assert found == (pytest.approx(loss, abs=1e-10), tokens)


def test_bf16_follows_float32():
    """A tripwire, as in training/test_precision.py: the norms' weights are gathered in bf16, and their partial gradients added."""
    flags = f"{CP2} {TP2} {SP} {EP2} {EVEN}"
    found = run_distributed(parity.layout, 4, "modern", f"--bf16 {flags}")[0]
    expected = parity.expected("modern", 4, flags, "")
    for step in range(parity.STEPS):
        torch.testing.assert_close(found[f"loss {step}"], expected[f"loss {step}"], rtol=2e-2, atol=0)
