"""`send_kernel` and `gather_sum_kernel` of triton_exchange.py in CUDA C++ (kernels/cuda/exchange.cu), launched with the same arguments;
all else of that module is there as it is."""
# T tokens here, K experts per token, H row width

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.kernels.cuda import build

KINDS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_ROW = 227 * 1024 // 4 - 16  # bytes: a warp has four rows in shared memory, and a barrier for each
MOST_CHOICES = 200  # two stages of half a kibibyte per choice
SENT = 1  # CHANNELS of exchange.py


def problem(capability: tuple[int, int], width: int, dtype: torch.dtype, k: int) -> str | None:
    """Why these kernels cannot move rows like these on a GPU of this compute capability; None when they can."""
    if dtype not in KINDS:
        return f"rows are of {str(dtype).removeprefix('torch.')}, and it moves float32, bfloat16 and float16"
    if width * dtype.itemsize > LARGEST_ROW:
        return f"rows of {width} x {dtype.itemsize} bytes do not fit into shared memory four times; at most {LARGEST_ROW} bytes do"
    if k > MOST_CHOICES:
        return f"a token has {k} experts, of whose results at most {MOST_CHOICES} fit into shared memory"
    return build.problem(capability)


class _Launcher:
    """kernel[grid](...), as Triton's are launched."""

    def __init__(self, launch: Callable[..., None]):
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch


class CudaKernels:
    """library: of exchange.cu. blocks: of 8 warps, each of which walks over tokens: one per multiprocessor."""

    def __init__(self, library: ctypes.CDLL, blocks: int):
        self.library, self.blocks = library, blocks
        self.send_kernel, self.gather_sum_kernel = _Launcher(self._send), _Launcher(self._gather_sum)

    def __getattr__(self, name: str) -> Any:
        from megatron_moe.kernels.fused import triton_exchange  # imports triton

        return getattr(triton_exchange, name)

    def _send(
        self, x: Tensor, weights: Tensor, owner_TK: Tensor, row_TK: Tensor, choice_TK: Tensor, rows_of: Tensor, weights_of: Tensor,
        signals: Tensor, epochs: Tensor, error: Tensor, ticket: Tensor, me: int, spins: int, T: int, *, H: int, K: int, WORLD: int,
        HAS_W: bool, **_: Any,
    ) -> None:  # fmt: skip
        tensors = x, weights if HAS_W else None, owner_TK, row_TK, choice_TK, rows_of, weights_of, signals, epochs, error, ticket
        numbers = ctypes.c_int(me), ctypes.c_longlong(spins), *map(ctypes.c_int, (T, K, WORLD, SENT, H * x.element_size(), self.blocks))
        self._call(self.library.moe_send, x.device, *map(_address, tensors), *numbers)

    def _gather_sum(
        self, rows_of: Tensor, scalars_of: Tensor, owner_TK: Tensor, row_TK: Tensor, choice_TK: Tensor, out_TD: Tensor, scalars: Tensor,
        T: int, *, H: int, K: int, HAS_S: bool, **_: Any,
    ) -> None:  # fmt: skip
        tensors = rows_of, scalars_of, owner_TK, row_TK, choice_TK, out_TD, scalars if HAS_S else None
        numbers = map(ctypes.c_int, (T, K, H * out_TD.element_size(), self.blocks))
        self._call(self.library.moe_gather_sum, out_TD.device, ctypes.c_int(KINDS.index(out_TD.dtype)), *map(_address, tensors), *numbers)

    def _call(self, function: Any, device: torch.device, *arguments: Any) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if code := function(*arguments, ctypes.c_void_p(stream)):
            why = "the rows do not fit into shared memory" if code == -1 else f"CUDA error {code}"
            raise RuntimeError(f"fused all-to-all: {function.__name__} could not be launched: {why}")


def kernels_for(device: torch.device) -> CudaKernels:
    """Compiled unless they are there. Raises RuntimeError with nvcc's words."""
    properties = torch.cuda.get_device_properties(device)
    return CudaKernels(build.load("exchange", (properties.major, properties.minor)), properties.multi_processor_count)


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
