"""Triton where it is installed. Modules with Triton kernels take `jit` and `tl` from here, and can be imported without it: their
functions can then not be called. The public function of each op imports them only when it launches one.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
except ImportError:
    triton = tl = None
    constexpr = object

    def jit(function: Any = None, **_: Any) -> Any:
        return function or jit  # with options it is given the function later


def power_of_two(n: int) -> int:
    """The next one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
