"""16-bit runs: parameters and moments float32, compute in 16 bits, router and reductions float32 - read inside the forward."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from distributed import parity
from distributed_pool import run_distributed

from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.parallel.zero import _ReduceScatterByExchange
from megatron_moe.training.step import count_loss_tokens, forward_backward


def dtypes_of_a_step(flags: str) -> dict[str, set[str]]:
    c = parity.config("pyramid", flags)
    mesh = build_parallel_mesh(c, "cpu")
    model = build_parallel_model(c, parity.VOCAB, mesh, torch.device("cpu"))
    optimizer = build_optimizer(model, c.optimizer)
    seen: dict[str, set[str]] = {}

    def note(key, *tensors):
        seen.setdefault(key, set()).update(str(t.dtype).removeprefix("torch.") for t in tensors)

    block = model.layers["3"]
    block.attn.q_proj.register_forward_hook(lambda m, a, out: note("attention", m.weight, out))
    block.mlp.fc1.register_forward_hook(lambda m, a, out: note("mlp", m.weight, out))
    for name, module, weight in (("experts", block.moe.experts, "w1"), ("router", block.moe.gate, "weight")):
        # the weight is looked at before the forward: after it, stage 3 has put the sharded float32 one back
        module.register_forward_pre_hook(lambda m, a, name=name, weight=weight: note(name, getattr(m, weight)))
        module.register_forward_hook(lambda m, a, out, name=name: note(name, out))
    reduce = _ReduceScatterByExchange.__call__

    def noted_reduce(this, output_tensor, input_tensor, *args, **kwargs):
        note("reduction", input_tensor)
        return reduce(this, output_tensor, input_tensor, *args, **kwargs)

    with mock.patch.object(_ReduceScatterByExchange, "__call__", noted_reduce):
        batches = parity.microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, 1, 0)
    note("gradients", *(p.grad for p in model.parameters()))
    optimizer.step()
    note("parameters", *model.parameters())
    note("moments", *(s["exp_avg"] for s in optimizer.state.values()))
    return seen


@pytest.mark.parametrize(("precision", "half"), [("--bf16", "bfloat16"), ("--fp16", "float16")])
@pytest.mark.parametrize("flags", ["--zero-stage 3 --moe-expert-parallel-size 2", "--zero-stage 1 --tensor-model-parallel-size 2"])
def test_compute_is_in_16_bits_and_everything_else_in_float32(precision, half, flags):
    seen = run_distributed(dtypes_of_a_step, 2, f"{precision} {flags}")[0]
    for what in ("attention", "mlp", "experts"):
        assert seen[what] == {half}, what
    for what in ("router", "gradients", "parameters", "moments"):
        assert seen[what] == {"float32"}, what
    if "zero-stage 3" in flags:  # the other layout has one data rank: nothing to reduce
        assert seen["reduction"] == {"float32"}


def test_float16_master_weights_leave_router_and_moments_in_float32():
    flags = "--fp16 --fp16-master-weights-and-grads --zero-stage 3 --moe-expert-parallel-size 2"
    seen = run_distributed(dtypes_of_a_step, 2, flags)[0]
    assert seen["router"] == seen["moments"] == {"float32"}
    assert seen["attention"] == seen["mlp"] == seen["experts"] == {"float16"}
    for what in ("parameters", "gradients", "reduction"):
        assert seen[what] == {"float16", "float32"}, what  # float32: those of the router


def test_float16_follows_float32():
    """A tripwire as below: with a scale at which nothing overflows, with float16 weights too."""
    expected = parity.reference("modern", "")
    for more, tolerance in (("", 5e-3), ("--fp16-master-weights-and-grads", 2e-2)):
        found = run_distributed(parity.layout, 2, "modern", f"--fp16 --moe-expert-parallel-size 2 {more}", 2.0**10)[0]
        for step in range(parity.STEPS):
            torch.testing.assert_close(found[f"loss {step}"], expected[f"loss {step}"], rtol=tolerance, atol=0)


def test_bf16_follows_float32():
    """Not a proof, a tripwire: five steps in bf16 stay near those in float32."""
    found = run_distributed(parity.layout, 2, "modern", "--bf16 --moe-expert-parallel-size 2")[0]
    expected = parity.reference("modern", "")
    for step in range(parity.STEPS):
        torch.testing.assert_close(found[f"loss {step}"], expected[f"loss {step}"], rtol=2e-2, atol=0)
