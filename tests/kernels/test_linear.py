"""Linear layers on a CPU: by either library the same numbers, and torch's own where there is no choice."""

import pytest
import torch
import torch.nn.functional as F
from distributed_pool import run_distributed
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megatron_moe.kernels import linear as module
from megatron_moe.kernels import matmul_cpu
from megatron_moe.kernels.linear import Linear, linear


def choose(monkeypatch):
    monkeypatch.setattr(module, "HAS_CHOICE", True)
    monkeypatch.setattr(matmul_cpu, "mkl_stays_behind", lambda: matmul_cpu.onednn_linear is not None)
    monkeypatch.setattr(matmul_cpu, "ENOUGH", 1)


@pytest.fixture
def calls(monkeypatch):
    """On whatever processor, and however small: counts what does not go to torch."""
    choose(monkeypatch)
    found, operator = [], module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: found.append(args) or operator(*args))
    return found


def gradients(x, weight, bias, dy, function):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves)
    y.backward(dy)
    return [y, *(t.grad for t in leaves)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (2, 3, 4)])
def test_it_is_torchs_forward_and_backward(calls, shape, has_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 12), torch.randn(9, 12), torch.randn(9) if has_bias else None
    sum_of_all = torch.ones(()).expand(*shape, 9)  # what .sum() sends back: one number, read from everywhere
    for dy in (torch.randn(*shape, 9), torch.randn(9, *shape).movedim(0, -1), sum_of_all):
        for got, want in zip(gradients(x, weight, bias, dy, linear), gradients(x, weight, bias, dy, F.linear)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_rows_that_are_not_side_by_side(calls):
    torch.manual_seed(0)
    whole, weight = torch.randn(4, 12, 6), torch.randn(9, 6)
    for x in (whole.transpose(0, 1), whole[:, ::2], whole[..., :3].repeat(1, 1, 2).movedim(1, 0)):
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one(calls):
    x, weight, bias, dy = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2), torch.randn(4, 2)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        got, want = [], []
        for function, found in ((linear, got), (F.linear, want)):
            leaves = [t.clone().requires_grad_(is_wanted) for t, is_wanted in zip((x, weight, bias), wanted)]
            function(*leaves).backward(dy)
            found += [t.grad for t in leaves]
        assert [g is not None for g in got] == list(wanted)
        for g, w in zip(got, want):
            if w is not None:
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4


def test_no_rows_other_types_and_autocast_are_torchs(calls):
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    assert linear(x[:0], weight).shape == (0, 5)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert not calls


def _sharded():
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6), torch.randn(8, 6)
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch)
        y = linear(distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(weight, mesh, [Shard(0)]))
    assert isinstance(y, DTensor) and y.to_local().shape == (4, 4)
    torch.testing.assert_close(y.full_tensor(), F.linear(x, weight))


@pytest.mark.distributed
def test_sharded_weights_are_torchs():
    run_distributed(_sharded, 2)


def test_small_products_and_other_processors_have_torchs(calls, monkeypatch):
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    monkeypatch.setattr(matmul_cpu, "ENOUGH", 4 * 6 * 5 + 1)
    assert torch.equal(linear(x, weight), F.linear(x, weight)) and not calls
    monkeypatch.setattr(matmul_cpu, "ENOUGH", 4 * 6 * 5)
    linear(x, weight)
    assert len(calls) == 1
    monkeypatch.setattr(module, "HAS_CHOICE", False)
    assert torch.equal(linear(x, weight), F.linear(x, weight)) and len(calls) == 1


def test_a_compiled_module_has_it_in_one_graph(calls, monkeypatch):
    monkeypatch.undo()
    choose(monkeypatch)
    torch.manual_seed(0)
    ours, graphs, x, dy = Linear(6, 5), [], torch.randn(4, 6), torch.randn(4, 5)
    torchs = nn.Linear(6, 5)
    torchs.load_state_dict(ours.state_dict())

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return lookup_backend("aot_eager")(graph, inputs)

    torch.compile(ours, backend=backend, fullgraph=True)(x).backward(dy)
    torchs(x).backward(dy)
    assert ["linear_on_cpu" in graph for graph in graphs] == [True]
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.bias.grad, torchs.bias.grad, rtol=1e-5, atol=1e-5)
