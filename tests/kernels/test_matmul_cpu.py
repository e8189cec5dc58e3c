"""Products of matrices on a CPU: which library has which, and that all of them are the same products."""

import pytest
import torch
from test_expert_mlp import operands, results

from megatron_moe.kernels import expert_mlp_cpu, matmul_cpu
from megatron_moe.kernels.expert_mlp import expert_mlp
from megatron_moe.kernels.matmul_cpu import goes_to_onednn, matmul
from megatron_moe.kernels.router_linear import router_linear


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    """Whatever this processor is, and however small the matrices are."""
    monkeypatch.setattr(matmul_cpu, "mkl_stays_behind", lambda: request.param)
    monkeypatch.setattr(matmul_cpu, "ENOUGH", 1)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_products(library, dtype):
    torch.manual_seed(0)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for m, k, n in ((6, 5, 4), (1, 9, 1), (33, 64, 20), (0, 3, 2)):
        for a in (torch.randn(m, k).to(dtype), torch.randn(k, m).to(dtype).t()):
            for b in (torch.randn(k, n).to(dtype), torch.randn(n, k).to(dtype).t()):
                bias, out = torch.randn(n).to(dtype), torch.full((m, n), 3.0, dtype=dtype)
                want = a.double() @ b.double()
                close = {"rtol": tolerance, "atol": tolerance * k**0.5}
                torch.testing.assert_close(matmul(a, b).double(), want, **close)
                torch.testing.assert_close(matmul(a, b, bias).double(), want + bias.double(), **close)
                assert matmul(a, b, bias, out=out) is out
                torch.testing.assert_close(out.double(), want + bias.double(), **close)
                matmul(a, b, out=out, adds=True)
                torch.testing.assert_close(out.double(), 2 * want + bias.double(), **close)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_the_same_with_either(library, activation, bias, monkeypatch):
    monkeypatch.setattr(expert_mlp_cpu, "block_rows", lambda width, device: 20)
    for rows in ([70, 1, 0, 130], [3, 2, 0], [0, 0]):
        x, offsets, weights, stacks = operands(rows, activation=activation, bias=bias)
        got = results(expert_mlp(x, offsets, weights, stacks, activation), x, weights, stacks)
        want = results(expert_mlp(x, offsets, weights, stacks, activation, use_reference=True), x, weights, stacks)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_is_the_same_with_either_also_within_autocast(library, dtype):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(50, 12).to(dtype).requires_grad_(), torch.randn(5, 12, requires_grad=True), torch.randn(50, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = router_linear(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, dtype, torch.float32)
    torch.testing.assert_close(y, x.detach().float() @ weight.detach().t(), rtol=0, atol=1e-5)
    torch.testing.assert_close(dweight, grad.t() @ x.detach().float(), rtol=0, atol=2e-5)
    torch.testing.assert_close(dx.float(), grad @ weight.detach(), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=5e-5)


def test_small_products_other_types_and_who_switched_onednn_off_stay_with_mkl(monkeypatch):
    monkeypatch.setattr(matmul_cpu, "mkl_stays_behind", lambda: True)
    enough = matmul_cpu.ENOUGH
    assert goes_to_onednn(torch.float32, enough) and not goes_to_onednn(torch.float32, enough - 1)
    assert not goes_to_onednn(torch.float64, enough) and not goes_to_onednn(torch.bfloat16, enough)
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, which warns of tf32
    try:
        assert not goes_to_onednn(torch.float32, enough)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(matmul_cpu, "mkl_stays_behind", lambda: False)
    assert not goes_to_onednn(torch.float32, enough)


@pytest.mark.parametrize(
    ("vendor", "capability", "has_mkl", "expected"),
    [("AuthenticAMD", "AVX512", True, True), ("GenuineIntel", "AVX512", True, False), ("AuthenticAMD", "AVX2", True, False),
     ("AuthenticAMD", "AVX512", False, False), ("", "AVX512", True, False)],
)  # fmt: skip
def test_mkl_stays_behind_on_other_makers_processors_with_avx512(vendor, capability, has_mkl, expected, monkeypatch):
    monkeypatch.setattr(matmul_cpu, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert matmul_cpu.mkl_stays_behind.__wrapped__() is expected


def test_the_vendor_is_read_without_harm():
    assert isinstance(matmul_cpu._vendor(), str)
