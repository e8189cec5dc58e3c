"""One process on a CPU casts its weights itself; it trains what it would train through FSDP."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from distributed_pool import run_distributed
from torch.distributed.fsdp import FSDPModule

from distributed.parity import SEED, VOCAB, config, microbatches, spread_gates
from megatron_moe.moe.gate import Gate
from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel import half
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.half import has_half_weights
from megatron_moe.training.evaluate import evaluate
from megatron_moe.training.step import count_loss_tokens, forward_backward, train_step

pytestmark = pytest.mark.distributed


def build(name: str, flags: str, by_fsdp: bool = False):
    c = config(name, flags)
    mesh = build_parallel_mesh(c, "cpu")
    with mock.patch("megatron_moe.parallel.apply.can_cast", return_value=False) if by_fsdp else mock.MagicMock():
        model = build_parallel_model(c, VOCAB, mesh, torch.device("cpu"))
    assert isinstance(model, FSDPModule) is by_fsdp and has_half_weights(model) is not by_fsdp
    spread_gates(model)
    return c, mesh, model


def local(t: torch.Tensor) -> torch.Tensor:
    return getattr(t, "to_local", lambda: t)().detach().clone()


def results(name: str, flags: str, by_fsdp: bool) -> dict[str, torch.Tensor]:
    """Two steps of two micro-batches, and an evaluation after each."""
    c, mesh, model = build(name, flags, by_fsdp)
    optimizer, out = build_optimizer(model, c.optimizer), {}
    for step in range(2):
        batches = microbatches(step, 0, 1, 2, c)[:2]
        if step == 0 and not c.model.mtp_num_layers:
            out["loss of gradients"] = forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, SEED, step)
            out |= {f"gradient of {n}": local(p.grad) for n, p in model.named_parameters()}
            optimizer.zero_grad()
        result = train_step(model, optimizer, batches, mesh, 1e-2, 0.5, SEED, step)
        out |= {f"loss {step}": result.lm_loss, f"norm {step}": result.grad_norm}
        out[f"evaluation {step}"] = torch.tensor(evaluate(model, batches, mesh, torch.device("cpu")).lm_loss)
    return out | {n: local(p) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("pyramid", "--bf16"),
        ("modern", "--bf16 --recompute-granularity full"),
        pytest.param("noisy", "--bf16", marks=pytest.mark.matrix),
        pytest.param("losses", "--bf16 --zero-stage 3", marks=pytest.mark.matrix),
        pytest.param("ahead_latent", "--bf16", marks=pytest.mark.matrix),
        pytest.param("latent", "--fp16 --loss-scale 64 --zero-stage 1", marks=pytest.mark.matrix),
    ],
)
def test_what_is_trained_is_what_fsdp_trains(name, flags):
    (expected,), (found,) = (run_distributed(results, 1, name, flags, by_fsdp) for by_fsdp in (True, False))
    assert found.keys() == expected.keys() and len(found) > 20
    different = {n: (found[n], expected[n]) for n in expected if not torch.equal(found[n], expected[n])}
    assert not different


def kinds(flags: str) -> tuple:
    c, mesh, model = build("pyramid", flags)
    seen, batches = {}, microbatches(0, 0, 1, 2)[:2]
    casts = []

    def look(*_):
        casts.append({id(model.half_weights.memory[n]) for n in model.half_weights.memory})
        seen.update({(type(m), n): getattr(m, n).dtype for m in model.modules() for n, _ in m.named_parameters(recurse=False)})

    model.register_forward_hook(look)
    with mock.patch.object(half.HalfWeights, "_cast", autospec=True, side_effect=half.HalfWeights._cast) as cast:
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, SEED, 0)
    versions = {t._version for t in model.half_weights.memory.values()}
    after = [getattr(m, n) is p for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    return seen, after, {p.grad.dtype for p in model.parameters()}, casts[0] == casts[1], versions, cast.call_count > 0


def test_modules_see_casts_within_a_step_and_their_weights_after_it():
    ((seen, after, gradients, same_memory, versions, used),) = run_distributed(kinds, 1, "--bf16")
    assert used and same_memory and all(after)
    assert {dtype for (kind, _), dtype in seen.items() if kind is not Gate} == {torch.bfloat16}
    assert {dtype for (kind, _), dtype in seen.items() if kind is Gate} == {torch.float32}
    assert gradients == {torch.float32}
    assert versions == {1}  # cast for the first micro-batch, and not again


def uses(flags: str, name: str) -> bool:
    c = config(name, flags)
    return has_half_weights(build_parallel_model(c, VOCAB, build_parallel_mesh(c, "cpu"), torch.device("cpu")))


def test_several_processes_and_float32_have_no_casts_of_their_own():
    assert run_distributed(uses, 1, "", "pyramid") == [False]
    assert run_distributed(uses, 2, "--bf16", "pyramid") == [False, False]
    assert run_distributed(uses, 2, "--bf16 --pipeline-model-parallel-size 2", "deep") == [False, False]
