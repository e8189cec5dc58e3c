"""Row-wise FP8: values in e4m3 (4 bits of exponent, 3 of mantissa, at most 448), each row with a float32 scale, its largest value / 448.

    x_RD ~ q_RD * scale_R        a value is at most 1/16 of itself off, or 2^-10 * scale where it is that small (below 2^-6 * scale)

`fp8_grouped_gemm` multiplies in FP8 forward and for the gradient of its rows. What a product sums over lies within a row of both
operands, so each matrix is quantised twice: along its input width for the forward, along its output width for the gradient.
The gradient of a matrix is a product in the operands' own type: it sums over rows, so both operands would have to be quantised
along the rows again, each expert's rows filled up to a multiple of 16, and a weight's gradient gathers rounding of all tokens.

On a GPU the products are torch's `scaled_grouped_mm` (compute capability 9 or 10, bf16 outside, widths that are multiples of
16). Elsewhere, and with `use_reference`, values are quantised in the same way, made wide again, and multiplied in float32 or
wider: the numbers are the GPU's up to the order of sums.
"""
# R rows, D input width, F output width, E experts

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels.grouped_gemm import grouped_gemm, weight_gradient, without_spare
from megatron_moe.kernels.on_gpu import takes_triton
from megatron_moe.utils.compat import scaled_grouped_mm

LARGEST = 448.0  # of e4m3
SMALLEST = 2.0**-100  # rows whose largest value is below it keep fewer bits: a scale must not be 0, nor its inverse infinite
UNIT = 16  # of both widths of a matrix


def quantise_rows(x_RD: Tensor, use_reference: bool = False) -> tuple[Tensor, Tensor]:
    """(e4m3 [R, D], float32 [R]). A row with a NaN or an infinity becomes NaN. No gradient."""
    x_RD = x_RD.detach().contiguous()
    if takes_triton(x_RD) and not use_reference:
        from megatron_moe.kernels import triton_fp8

        return triton_fp8.quantise_rows(x_RD, LARGEST, SMALLEST)
    return quantise_rows_reference(x_RD)


def quantise_rows_reference(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    scale_R = x_RD.abs().amax(1).float().clamp_min(SMALLEST) / LARGEST if x_RD.shape[1] else x_RD.new_ones(len(x_RD)).float()
    wide = torch.promote_types(x_RD.dtype, torch.float32)
    return (x_RD.to(wide) / scale_R.to(wide)[:, None]).to(torch.float8_e4m3fn), scale_R


def dequantise_rows(q_RD: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D], multiplied in float32 or wider and rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q_RD.to(wide) * scale_R.to(wide)[:, None]).to(dtype)


def pack_rows(x_RD: Tensor) -> Tensor:
    """To bytes that can be sent: uint8 [R, packed_bytes(D)], each row's scale behind its values. No gradient."""
    q_RD, scale_R = quantise_rows(x_RD)
    return torch.cat([q_RD.view(torch.uint8), scale_R[:, None].view(torch.uint8)], 1)


def unpack_rows(bytes_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D] of what `pack_rows` made."""
    values, scale = bytes_RB.split([bytes_RB.shape[1] - 4, 4], 1)
    scale = scale.clone(
        memory_format=torch.contiguous_format
    )  # at an address that floats may have; contiguous() leaves a single row where it is
    return dequantise_rows(values.contiguous().view(torch.float8_e4m3fn), scale.view(torch.float32)[:, 0], dtype)


def packed_bytes(width: int) -> int:
    return width + 4


def quantise_matrices(w_EDF: Tensor, use_reference: bool = False) -> tuple[Tensor, Tensor]:
    """Along the input width: (e4m3 [E, D, F], of which D is packed, float32 [E, F])."""
    E, D, F = w_EDF.shape
    q_FD, scale_F = quantise_rows(w_EDF.transpose(1, 2).reshape(E * F, D), use_reference)
    return q_FD.view(E, F, D).transpose(1, 2), scale_F.view(E, F)


def fp8_grouped_gemm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool = False, has_spare_rows: bool = False) -> Tensor:
    """`grouped_gemm` in FP8. Raises ValueError for what a GPU cannot multiply."""
    return _product(x_RD, w_EDF, offsets_E, use_reference, has_spare_rows)


def gpu_problems(capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, ...]) -> list[str]:
    """What keeps a GPU from multiplying in FP8: each a sentence with the rule, the values and what to change."""
    problems = []
    if capability[0] not in (9, 10):
        problems.append(
            f"products in FP8 need a GPU of compute capability 9.0 or 10.x (H100, B200), and this one has {capability[0]}.{capability[1]}; "
            "leave --moe-fp8-experts out"
        )
    if dtype != torch.bfloat16:
        problems.append(f"products in FP8 take and give bfloat16 on a GPU, not {str(dtype).removeprefix('torch.')}; add --bf16")
    if any(width % UNIT for width in widths):
        problems.append(
            f"products in FP8 need widths that are multiples of {UNIT}, and the experts' matrices are {' x '.join(map(str, widths))}; change "
            "--hidden-size (or --moe-latent-size) and --moe-ffn-hidden-size, of which each expert-tensor-parallel rank has its share"
        )
    return problems


# ---------------------------------------------------------------- operators


@torch.library.custom_op("megatron_moe::fp8_grouped_gemm", mutates_args=())
def _product(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool) -> Tensor:
    """An operator of its own, as `grouped_gemm` is."""
    x_RD = x_RD.detach()
    return _multiply(x_RD, *quantise_matrices(w_EDF, use_reference), offsets_E, use_reference, has_spare_rows)


@torch.library.custom_op("megatron_moe::fp8_grouped_gemm_backward", mutates_args=())
def _gradients(
    dy_RF: Tensor, x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool
) -> tuple[Tensor, Tensor]:
    wt_EFD = quantise_matrices(w_EDF.transpose(1, 2), use_reference)
    dx_RD = _multiply(dy_RF, *wt_EFD, offsets_E, use_reference, has_spare_rows)
    return dx_RD, weight_gradient(x_RD, dy_RF, offsets_E, w_EDF, use_reference)


def _multiply(x_RD: Tensor, q_EDF: Tensor, scale_EF: Tensor, offsets_E: Tensor, use_reference: bool, has_spare_rows: bool) -> Tensor:
    if x_RD.shape[0] == 0:
        return x_RD.new_empty(0, q_EDF.shape[2])
    q_RD, scale_R = quantise_rows(x_RD, use_reference)
    if not x_RD.is_cuda or use_reference:
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        x_wide, w_wide = dequantise_rows(q_RD, scale_R, wide), q_EDF.to(wide) * scale_EF.to(wide)[:, None, :]
        return grouped_gemm(x_wide, w_wide, offsets_E, use_reference, has_spare_rows).to(x_RD.dtype)
    if problems := gpu_problems(torch.cuda.get_device_capability(x_RD.device), x_RD.dtype, tuple(q_EDF.shape[1:])):
        raise ValueError("; ".join(problems))
    y_RF = scaled_grouped_mm(q_RD, q_EDF, scale_R, scale_EF, offsets_E)
    return without_spare(y_RF, offsets_E) if has_spare_rows else y_RF


@_product.register_fake
def _(x_RD, w_EDF, offsets_E, use_reference, has_spare_rows):
    return x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])


@_gradients.register_fake
def _(dy_RF, x_RD, w_EDF, offsets_E, use_reference, has_spare_rows):
    return x_RD.new_empty(x_RD.shape), w_EDF.new_empty(w_EDF.shape)


def _remember(ctx, inputs, output) -> None:
    *tensors, ctx.use_reference, ctx.has_spare_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy_RF: Tensor):
    return *_gradients(dy_RF, *ctx.saved_tensors, ctx.use_reference, ctx.has_spare_rows), None, None, None


_product.register_autograd(_backward, setup_context=_remember)
