"""Triton: rows to FP8 (e4m3), each with a float32 scale of its own."""
# R rows, D width

import torch
from torch import Tensor

from megatron_moe.kernels.jit import constexpr, jit, power_of_two, tl, triton

COLUMNS = 1024  # of a tile


@jit
def quantise(
    x,  # [R, D]
    q,  # [R, D] e4m3
    scales,  # [R] float32: x = q * scale
    rows,
    width,
    LARGEST: constexpr,
    SMALLEST: constexpr,
    BR: constexpr,
    BD: constexpr,
):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    at_row = r.to(tl.int64)[:, None] * width
    largest = tl.zeros((BR,), tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        tile = tl.load(x + at_row + d[None, :], mask=(r < rows)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        # NaN is handed on by tl.max and tl.maximum only where they are asked to
        found = tl.reduce(tl.abs(tile), 1, _larger)
        largest = _larger(largest, found)
    scale = tl.maximum(largest, SMALLEST, propagate_nan=tl.PropagateNan.ALL) / LARGEST
    tl.store(scales + r, scale, mask=r < rows)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        there = (r < rows)[:, None] & (d < width)[None, :]
        tile = tl.load(x + at_row + d[None, :], mask=there, other=0.0).to(tl.float32)
        tl.store(q + at_row + d[None, :], tl.div_rn(tile, tl.broadcast_to(scale[:, None], tile.shape)).to(tl.float8e4nv), mask=there)


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def quantise_rows(x_RD: Tensor, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """[R, D] e4m3 and [R] float32 of a packed [R, D]."""
    rows, width = x_RD.shape
    q_RD = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_RD.device)
    scale_R = torch.empty(rows, dtype=torch.float32, device=x_RD.device)
    if rows:
        columns = min(COLUMNS, power_of_two(width))
        quantise[(triton.cdiv(rows, 2),)](x_RD, q_RD, scale_R, rows, width, LARGEST=largest, SMALLEST=smallest, BR=2, BD=columns)
    return q_RD, scale_R
