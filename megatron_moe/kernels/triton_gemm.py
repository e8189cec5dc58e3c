"""Triton: grouped products whose rows are picked from a table of tokens while they are loaded.

    y[r] = x[row[r]] @ w[e]            dw[e] = sum over its rows of x[row[r]] (outer) dy[r]           e: the expert of row r

An expert may have any number of rows. Its last tile of rows is partly empty: there are at most R / BM + E tiles, which the
host knows without asking, and a tile finds its expert in the offsets. Rows behind the last expert's are not written.
"""
# T tokens, R rows, K width of the tokens, N width of the result, E experts

import torch
from torch import Tensor

from megatron_moe.kernels.jit import constexpr, jit, power_of_two, tl, triton

# Tiles, warps and stages of a Hopper GPU: chosen by what compiles without spills, not measured.
FORWARD = {"BM": 128, "BN": 128, "BK": 64}
OUTER = {"BR": 64, "BK": 128, "BN": 128}
WARPS, STAGES = 8, 3


@jit
def _tile_of_rows(number, ends, E: constexpr, E_POW2: constexpr, BM: constexpr):
    """Of the tile with this number: its expert (E: there is no such tile), its first row, and the end of the expert's rows."""
    e = tl.arange(0, E_POW2)
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum(((last <= number) & (e < E)).to(tl.int32), axis=0)
    is_it = e == expert
    first = tl.sum(tl.where(is_it, begin + (number - last + tiles) * BM, 0), axis=0)
    return expert, first, tl.sum(tl.where(is_it, end, 0), axis=0)


@jit
def gathered_product(
    x,  # [T, K]
    row,  # [R] int64: the token of each row
    w,  # [E, K, N]
    ends,  # [E] int32: end of each expert's rows
    y,  # [R, N]
    column_tiles,
    K,
    N,
    E: constexpr,
    E_POW2: constexpr,
    BM: constexpr,
    BN: constexpr,
    BK: constexpr,
):
    expert, first, end = _tile_of_rows(tl.program_id(0) // column_tiles, ends, E, E_POW2, BM)
    if expert < E:
        r = first + tl.arange(0, BM)
        is_row = r < end
        token = tl.load(row + r, mask=is_row, other=0)
        n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        a = x + token[:, None] * K + k[None, :]
        b = w + expert.to(tl.int64) * K * N + k[:, None].to(tl.int64) * N + n[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            left = tl.load(a, mask=is_row[:, None] & (k < K - start)[None, :], other=0.0)
            right = tl.load(b, mask=(k < K - start)[:, None] & (n < N)[None, :], other=0.0)
            total = tl.dot(left, right, total)
            a += BK
            b += BK * N
        tl.store(y + r.to(tl.int64)[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=is_row[:, None] & (n < N)[None, :])


@jit
def gathered_outer(
    x,  # [T, K]
    row,  # [R] int64
    dy,  # [R, N]
    ends,  # [E] int32
    dw,  # [E, K, N]; zero for an expert without rows
    column_tiles,
    K,
    N,
    BR: constexpr,
    BK: constexpr,
    BN: constexpr,
):
    e = tl.program_id(1)
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    k = tl.program_id(0) // column_tiles * BK + tl.arange(0, BK)
    n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    total = tl.zeros((BK, BN), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        is_row = r < end
        token = tl.load(row + r, mask=is_row, other=0)
        left = tl.load(x + token[:, None] * K + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(dy + r.to(tl.int64)[:, None] * N + n[None, :], mask=is_row[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total)
    there = (k < K)[:, None] & (n < N)[None, :]
    tl.store(dw + e.to(tl.int64) * K * N + k.to(tl.int64)[:, None] * N + n[None, :], total.to(dw.dtype.element_ty), mask=there)


# ---------------------------------------------------------------- launches; all tensors packed


def product(x_TK: Tensor, row_R: Tensor, w_EKN: Tensor, ends_E: Tensor, **tiles: int) -> Tensor:
    """[R, N]; rows behind the last expert's are not written."""
    (experts, K, N), tiles = w_EKN.shape, FORWARD | tiles
    y_RN = torch.empty(len(row_R), N, dtype=x_TK.dtype, device=x_TK.device)
    if y_RN.numel():
        column_tiles = triton.cdiv(N, tiles["BN"])
        gathered_product[((len(row_R) // tiles["BM"] + experts) * column_tiles,)](
            x_TK, row_R, w_EKN, ends_E, y_RN, column_tiles, K, N,
            E=experts, E_POW2=power_of_two(experts), num_warps=WARPS, num_stages=STAGES, **tiles,
        )  # fmt: skip
    return y_RN


def outer(x_TK: Tensor, row_R: Tensor, dy_RN: Tensor, ends_E: Tensor, **tiles: int) -> Tensor:
    """[E, K, N]."""
    (K, N), tiles = (x_TK.shape[1], dy_RN.shape[1]), OUTER | tiles
    dw_EKN = torch.empty(len(ends_E), K, N, dtype=x_TK.dtype, device=x_TK.device)
    column_tiles = triton.cdiv(N, tiles["BN"])
    gathered_outer[triton.cdiv(K, tiles["BK"]) * column_tiles, len(ends_E)](
        x_TK, row_R, dy_RN, ends_E, dw_EKN, column_tiles, K, N, num_warps=WARPS, num_stages=STAGES, **tiles
    )
    return dw_EKN
