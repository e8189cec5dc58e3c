"""A model in a layout writes what the model of one process writes."""

from __future__ import annotations

import pytest
import torch
from distributed import parity
from distributed_pool import run_distributed

from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.generate import generate
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.distributed

PROMPTS = [[3, 9, 27], [5], [1, 2, 3, 4, 5, 6]]
EP2, TP2, TP4 = "--moe-expert-parallel-size 2", "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 4"


def written(model_name: str, flags: str, prompts: list[list[int]], sampling: dict, trains: bool) -> list[list[int]]:
    """What every rank writes; with `trains` between two steps of training, of which the second must see the weights of the first."""
    c = parity.config(model_name, f"{parity.FP64} --init-method-std 0.3 {flags}")
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    parity.spread_gates(model)
    if trains:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
        train_step(model, optimizer, batches, mesh, 0.1, 1.0, parity.SEED, 0)
        generate(model, prompts, 2, SamplingConfig(**sampling))
        train_step(model, optimizer, batches, mesh, 0.1, 1.0, parity.SEED, 1)
    generator = torch.Generator().manual_seed(17 + mesh.rank("tp"))  # rank 0's draws count
    return generate(model, prompts, 8, SamplingConfig(**sampling), generator=generator)


@pytest.mark.parametrize(
    ("model", "world", "flags"),
    [
        ("pyramid", 2, TP2),
        ("pyramid", 4, f"{TP4} --zero-stage 3"),  # key/value heads that ranks share
        ("modern", 4, f"{TP2} {EP2} --zero-stage 2"),
        ("modern", 2, f"{EP2} --moe-token-dispatcher allgather --zero-stage 3"),
    ],
)
@pytest.mark.parametrize("trains", [False, True], ids=["at once", "between two steps"])
def test_every_rank_writes_what_one_process_writes(model, world, flags, trains):
    alone = run_distributed(written, 1, model, "", PROMPTS, {"greedy": True}, trains)[0]
    assert all(len(text) == 8 for text in alone)
    assert run_distributed(written, world, model, flags, PROMPTS, {"greedy": True}, trains) == [alone] * world


def test_one_token_of_one_text_leaves_a_rank_without_tokens():
    alone = run_distributed(written, 1, "modern", "", [[7]], {"greedy": True}, False)[0]
    assert run_distributed(written, 2, "modern", f"{TP2} {EP2}", [[7]], {"greedy": True}, False) == [alone] * 2


def test_ranks_that_draw_agree():
    alone = run_distributed(written, 1, "modern", "", PROMPTS, {"temperature": 2.0}, False)[0]
    assert run_distributed(written, 2, "modern", TP2, PROMPTS, {"temperature": 2.0}, False) == [alone] * 2


def refusal(flags: str) -> str:
    try:
        written("modern", f"{flags} {parity.DIVISIBLE}", [[1]], {"greedy": True}, False)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("flags", [f"{TP2} --sequence-parallel", "--context-parallel-size 2"])
def test_a_layout_that_cuts_sequences_is_refused(flags):
    assert all(text.startswith("one token cannot be cut over ranks") for text in run_distributed(refusal, 2, flags))
