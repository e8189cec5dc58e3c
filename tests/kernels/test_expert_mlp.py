"""The experts' MLPs as one operator of the CPU, against the composition of reference kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.kernels import expert_mlp as chooser
from megatron_moe.kernels import expert_mlp_cpu as kernel
from megatron_moe.kernels.expert_mlp import expert_mlp
from megatron_moe.kernels.expert_mlp_cpu import expert_mlp_cpu
from megatron_moe.moe.experts import STACKS, Experts

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def operands(rows_per_expert, D=8, inner=16, activation="gelu", bias=False, dtype=torch.float32, seed=0, spare=0):
    """x_RD, offsets_E, row_weights_R, stacks; rows behind the last expert's have weight 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"D": D, "F": inner, "E": len(rows_per_expert)}
    is_gated = activation == "swiglu"
    stacks = {}
    for name, dims in STACKS.items():
        there = (bias or name.startswith("w")) and (is_gated or "gate" not in name)
        stacks[name] = torch.randn([sizes[d] for d in dims], generator=generator).mul(0.5).to(dtype).requires_grad_() if there else None
    R = sum(rows_per_expert) + spare
    weights_R = torch.rand(R, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    weights_R[R - spare :] = 0.0
    x_RD = torch.randn(R, D, generator=generator).to(dtype)
    return x_RD.requires_grad_(), torch.tensor(rows_per_expert).cumsum(0).to(torch.int32), weights_R.requires_grad_(), stacks


def results(y_RD, x_RD, weights_R, stacks, seed=1):
    """Output and every gradient, for a random one of the output."""
    upstream = torch.randn(y_RD.shape, generator=torch.Generator().manual_seed(seed)).to(y_RD.dtype)
    return y_RD, *torch.autograd.grad(y_RD, [x_RD, weights_R, *(w for w in stacks.values() if w is not None)], upstream)


def as_operator(x_RD, offsets_E, weights_R, stacks, activation, bias_share):
    """Whatever the public function would choose."""
    return expert_mlp_cpu(x_RD, offsets_E, weights_R, [w for w in stacks.values() if w is not None], activation, bias_share)


def assert_equals_the_reference(rows, activation, bias, dtype, bias_share=1.0, **shape):
    x, offsets, weights, stacks = operands(rows, activation=activation, bias=bias, dtype=dtype, **shape)
    got = results(as_operator(x, offsets, weights, stacks, activation, bias_share), x, weights, stacks)
    wide = operands(rows, activation=activation, bias=bias, dtype=dtype, **shape)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (wide[0], wide[2], *wide[3].values())]
    stacks = dict(zip(STACKS, wide[2:]))
    want = results(expert_mlp(wide[0], offsets, wide[1], stacks, activation, bias_share, use_reference=True), wide[0], wide[1], stacks)
    for a, b in zip(got, want):
        assert a.shape == b.shape
        scale = b.abs().max().clamp_min(1.0) if b.numel() else 1.0
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=0, atol=TOLERANCE[dtype])


ROWS = {"even": [4, 4], "one expert": [7], "some empty": [0, 5, 0, 3, 0], "one row": [0, 1, 0], "none": [0, 0]}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16", "fp16"])
def test_operator_equals_the_reference_with_all_gradients(activation, bias, dtype):
    for rows in ROWS.values():
        assert_equals_the_reference(rows, activation, bias, dtype, bias_share=0.25)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=7), D=st.integers(1, 9), inner=st.integers(1, 9),
    activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_widths_and_counts_equal_the_reference_in_float64(rows, D, inner, activation, bias, seed):
    assert_equals_the_reference(rows, activation, bias, torch.float64, D=D, inner=inner, seed=seed)


@pytest.fixture
def memory_that_is_not_a_number():
    """What was never written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("block", [1, 100, 10**6])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_rows_that_are_multiplied_too_leave_no_trace(activation, bias, block, monkeypatch, memory_that_is_not_a_number):
    monkeypatch.setattr(kernel, "rows_to_multiply", lambda rows, dtype, weights: -(-rows // 4) * 4)
    monkeypatch.setattr(kernel, "block_rows", lambda width, device: max(block // width, 1))
    for rows in ([5, 1, 1, 2, 9, 3], [0, 5, 0, 6, 1, 0], [1, 1, 1, 1, 1], [4, 8], [3]):
        for spare in (0,) if bias else (0, 6):  # the reference gives a bias to the gate weight of a row that is nobody's
            assert_equals_the_reference(rows, activation, bias, torch.float64, spare=spare, bias_share=0.5)


def test_rows_that_are_multiplied_too_may_reach_over_several_experts(monkeypatch, memory_that_is_not_a_number):
    in_16_bits = kernel.rows_to_multiply
    monkeypatch.setattr(kernel, "rows_to_multiply", lambda rows, dtype, weights: in_16_bits(rows, torch.bfloat16, weights))
    for rows in ([257, 1, 2, 1], [1, 300, 0, 1], [129, 3, 0, 70]):
        assert_equals_the_reference(rows, "swiglu", True, torch.float64)


def test_few_numbers_of_rows_are_multiplied_in_16_bits():
    for rows in range(1, 5000):
        assert (
            kernel.rows_to_multiply(rows, torch.float64, 1 << 20) == rows <= kernel.rows_to_multiply(rows, torch.bfloat16, 1) < rows * 1.032
        )
    assert len({kernel.rows_to_multiply(rows, torch.bfloat16, 1) for rows in range(256, 512)}) == 33
    assert kernel.rows_to_multiply(63, torch.float16, 1) == 63 and kernel.rows_to_multiply(513, torch.bfloat16, 1) == 528


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_blocks_of_any_size_give_the_same(block, activation, monkeypatch):
    """An expert per block, a few of them, all in one."""
    monkeypatch.setattr(kernel, "block_rows", lambda width, device: max(block // width, 1))
    assert_equals_the_reference([3, 0, 1, 1, 5, 2, 0, 4], activation, True, torch.float64)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rows", [[3, 0, 2], [0, 0]])
def test_spare_rows_are_not_read_and_they_and_their_gradients_come_out_as_zero(rows, activation):
    x, offsets, weights, stacks = operands(rows, activation=activation, bias=True, spare=4)
    used = sum(rows)
    with torch.no_grad():
        x[used:] = float("nan")
    y = as_operator(x, offsets, weights, stacks, activation, 1.0)
    upstream = torch.ones_like(y)
    upstream[used:] = float("nan")
    dx, dweights, *gradients = torch.autograd.grad(y, [x, weights, *(w for w in stacks.values() if w is not None)], upstream)
    for t in (y, dx, dweights):
        assert torch.equal(t[used:], torch.zeros_like(t[used:]))
        assert t.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_without_gradients_the_output_is_the_same_and_nothing_is_kept():
    x, offsets, weights, stacks = operands([3, 0, 2], activation="swiglu", bias=True)
    kept = as_operator(x, offsets, weights, stacks, "swiglu", 1.0)
    present = [w for w in stacks.values() if w is not None]
    with torch.no_grad():
        y, *others = kernel._forward(x, offsets, weights, present, "swiglu", 1.0, False)
        assert torch.equal(as_operator(x, offsets, weights, stacks, "swiglu", 1.0), kept)
    assert torch.equal(y, kept)
    assert [t.numel() for t in others] == [0] * 4


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu"])
def test_what_is_before_the_activation_is_kept_and_of_gelu_what_is_behind_and_the_output_before_the_gate_weight(activation):
    x, offsets, weights, stacks = operands([3, 0, 2], D=8, inner=16, activation=activation)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        as_operator(x, offsets, weights, stacks, activation, 1.0)
    given = {t.data_ptr() for t in (x, offsets, weights, *stacks.values()) if t is not None}
    numbers = sum(t.numel() for t in saved if t.data_ptr() not in given)
    assert numbers == 5 * (8 + 16 * {"gelu": 2, "swiglu": 2, "relu": 1}[activation])


def test_operator_passes_torchs_own_checks():
    """Among them: fake tensors have the shapes of real ones, nothing that is put in changes or comes out, and it compiles."""
    for activation in ("gelu", "swiglu"):
        x, offsets, weights, stacks = operands([3, 0, 2], activation=activation, bias=True)
        torch.library.opcheck(kernel._forward, (x, offsets, weights, [w for w in stacks.values() if w is not None], activation, 1.0, True))


def test_gradients_with_strides_of_zero_and_transposed_ones_go_back():
    for loss in (lambda y: y.sum(), lambda y: (y.t() * torch.arange(40.0).view(8, 5)).sum()):
        x, offsets, weights, stacks = operands([3, 0, 2])
        got = torch.autograd.grad(loss(as_operator(x, offsets, weights, stacks, "gelu", 1.0)), [x, weights, stacks["w1"]])
        want = torch.autograd.grad(loss(expert_mlp(x, offsets, weights, stacks, "gelu", use_reference=True)), [x, weights, stacks["w1"]])
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_experts_on_a_cpu_take_the_operator_and_the_reference_and_float64_do_not(monkeypatch):
    calls = []
    monkeypatch.setattr(chooser, "expert_mlp_cpu", lambda *args: calls.append(1) or expert_mlp_cpu(*args))
    for dtype, use_reference, expected in ((torch.float32, False, 1), (torch.float32, True, 0), (torch.float64, False, 0)):
        x, offsets, weights, stacks = operands([3, 2], dtype=dtype)
        expert_mlp(x, offsets, weights, stacks, "gelu", use_reference=use_reference)
        assert calls == [1] * expected
        calls.clear()


def test_one_graph_of_experts_serves_any_number_of_rows():
    torch._dynamo.reset()
    graphs = []
    experts = Experts(2, 8, 16, "swiglu")
    forward = torch.compile(experts.forward, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=True)
    for rows in ([2, 3], [5, 4], [0, 7]):
        x, offsets, weights, _ = operands(rows)
        torch.testing.assert_close(forward(x, offsets, weights), experts(x, offsets, weights))
    assert len(graphs) == 1


def test_every_activation_of_an_mlp_is_there():
    from megatron_moe.kernels.activation import _OF_ONE

    assert kernel.ACTIVATIONS.keys() == _OF_ONE.keys()
    h = torch.randn(5, 7, dtype=torch.float64)
    for name, function in _OF_ONE.items():
        out = torch.empty_like(h)
        kernel.ACTIVATIONS[name].forward(h, out)
        torch.testing.assert_close(out, function(h))
