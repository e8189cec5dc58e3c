"""Products of matrices on a CPU: one public function, which picks the library.

MKL multiplies float32 with AVX2 on a processor that is not Intel's, whatever it has; oneDNN, which is in torch too and multiplies what has 16
bits, uses its AVX-512: more than twice as fast. It cannot write where it is told to, so its result is copied.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.utils.compat import onednn_linear

ENOUGH = 1 << 21  # multiplications: below, what it takes to call oneDNN is more than what it gains


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None, adds: bool = False) -> Tensor:
    """a [m, k] times b [k, n], plus bias [n]; all of one type. Into `out`, or with `adds` onto it. No gradient."""
    if goes_to_onednn(a.dtype, a.shape[0] * a.shape[1] * b.shape[1]):
        product = onednn_linear(a, b.t(), bias)
        return product if out is None else out.add_(product) if adds else out.copy_(product)
    if adds:
        assert out is not None and bias is None
        return torch.addmm(out, a, b, out=out)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def goes_to_onednn(dtype: torch.dtype, multiplications: int) -> bool:
    """Of a CPU's tensors. The same on all ranks of equal machines: nothing is timed."""
    return dtype == torch.float32 and multiplications >= ENOUGH and torch.backends.mkldnn.enabled and mkl_stays_behind()


@functools.cache
def mkl_stays_behind() -> bool:
    """Whether this processor has AVX-512 and torch multiplies float32 with MKL, which does not use it here."""
    backends = torch.backends
    if onednn_linear is None or not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    return backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """As the processor says it; "" where the system does not pass that on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
