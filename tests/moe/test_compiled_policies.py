"""What a layer decides, compiled without a graph break, is what it decides anyway; one graph serves all layers of a size."""

from __future__ import annotations

import pytest
import torch
from test_policies import VARIANTS, build, info, tokens
from torch._dynamo.utils import counters

from megatron_moe.parallel.compile import compiler_problems


def decided(layer, training, backend=None):
    """Routing and gradients of the gate."""
    if backend is not None:
        layer.decide = torch.compile(layer.decide, fullgraph=True, dynamic=False, backend=backend)
    layer.train(training)
    layer.begin_step(1 / 24)
    routing = layer.route(tokens().detach(), info())[0]
    layer.gate.zero_grad()
    (
        routing.weights_TK * torch.linspace(0.5, 2, routing.weights_TK.numel(), dtype=torch.float64).view_as(routing.weights_TK)
    ).sum().backward()
    return routing.ids_TK, routing.weights_TK, routing.measured, layer.gate.weight.grad.clone()


def check(moe, backend):
    moe = moe | {"moe_loss_coeff": 0.3}
    torch._dynamo.reset()
    counters.clear()
    for number in (2, 3):
        for training in (True, False):
            plain, compiled = (decided(build(number=number, **moe), training, b) for b in (None, backend))
            for a, b in zip(plain, compiled):
                torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 2  # training, evaluation


@pytest.mark.parametrize("name", ["top-2 sampled", "deepseek", "expert choice", "hash 3", "sinkhorn 1", "balanced", "zipf"])
def test_a_compiled_decision_is_the_same_and_knows_no_layer(name):
    check(VARIANTS[name], "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_problems("cpu")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["hash 3", "balanced", "zipf", "sinkhorn 2", "expert choice", "deepseek"])
def test_generated_code_decides_the_same(name):
    """The counter hash as generated C++: arithmetic that wraps around is what a compiler of indices may get wrong."""
    check(VARIANTS[name], "inductor")
