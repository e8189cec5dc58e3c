"""Triton: biases, activation and gate weight of the experts' rows in one pass over them, forward and backward.

    out[r] = weight[r] * act(h[r] + b1[e], gate[r] + b_gate[e])       e: the expert of row r

The arithmetic is in float32 and rounded once. Spare rows, behind the last expert's, are not read: they come out as zero, and so do
their gradients. A sum over a row (the gradient of its weight) is made by one program, one over an expert's rows (of a bias) by
another: no atomics, so results do not vary from run to run.
"""
# R rows, F inner width, E experts

import torch
from torch import Tensor

from megatron_moe.kernels.jit import constexpr, jit, power_of_two, tl, triton

ROWS, COLUMNS = 4, 512  # of a tile


@jit
def _activated(h, g, NAME: constexpr):
    """act(h, g) in float32."""
    if NAME == "swiglu":
        return g * tl.sigmoid(g) * h
    elif NAME == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # (1 + tanh u) / 2 = sigmoid(2 u)
    elif NAME == "relu":
        return tl.maximum(h, 0.0)
    else:
        tl.static_assert(NAME == "squared_relu")
        return tl.maximum(h, 0.0) * tl.maximum(h, 0.0)


@jit
def _slopes(h, g, NAME: constexpr):
    """Derivatives of act(h, g) by h and by g; the latter means nothing without a gate."""
    if NAME == "swiglu":
        s = tl.sigmoid(g)
        return g * s, h * s * (1.0 + g * (1.0 - s))
    elif NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h), g
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h), g
    elif NAME == "relu":
        return tl.where(h > 0.0, 1.0, 0.0), g
    else:
        return 2.0 * tl.maximum(h, 0.0), g


@jit
def _expert_of(r, ends, E: constexpr, E_POW2: constexpr):
    """Number of ends not above each row: its expert, E for spare rows."""
    e = tl.arange(0, E_POW2)
    end = tl.load(ends + e, mask=e < E, other=2147483647)
    return tl.sum((end[None, :] <= r[:, None]).to(tl.int32), axis=1)


@jit
def _biased(x, bias, expert, at, in_row, f, width, HAS_BIAS: constexpr):
    """A tile of x in float32, with its experts' biases."""
    tile = tl.load(x + at, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        tile += tl.load(bias + expert.to(tl.int64)[:, None] * width + f[None, :], mask=in_row, other=0.0).to(tl.float32)
    return tile


@jit
def activation_forward(
    h,  # [R, F]
    gate,  # [R, F], of a gated activation
    weights,  # [R] float32
    ends,  # [E] int32: end of each expert's rows
    b1,  # [E, F], with HAS_BIAS
    b_gate,  # [E, F], with HAS_BIAS, of a gated activation
    out,  # [R, F]
    rows,
    width,
    E: constexpr,
    E_POW2: constexpr,
    NAME: constexpr,
    HAS_BIAS: constexpr,
    BR: constexpr,
    BF: constexpr,
):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    expert = _expert_of(r, ends, E, E_POW2)
    is_used = (r < rows) & (expert < E)
    in_row = is_used[:, None] & (f < width)[None, :]
    at = r.to(tl.int64)[:, None] * width + f[None, :]
    x = _biased(h, b1, expert, at, in_row, f, width, HAS_BIAS)
    g = x
    if NAME == "swiglu":
        g = _biased(gate, b_gate, expert, at, in_row, f, width, HAS_BIAS)
    w = tl.load(weights + r, mask=is_used, other=0.0)
    y = tl.where(in_row, _activated(x, g, NAME) * w[:, None], 0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (f < width)[None, :])


@jit
def activation_backward(
    dout,  # [R, F]
    h,  # [R, F]
    gate,  # [R, F], of a gated activation
    weights,  # [R] float32
    ends,  # [E] int32
    b1,  # [E, F], with HAS_BIAS
    b_gate,  # [E, F], with HAS_BIAS, of a gated activation
    dh,  # [R, F]
    dgate,  # [R, F], of a gated activation
    dweights,  # [R] float32: <dout, act> of each row
    rows,
    width,
    E: constexpr,
    E_POW2: constexpr,
    NAME: constexpr,
    HAS_BIAS: constexpr,
    BR: constexpr,
    BF: constexpr,
):
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    expert = _expert_of(r, ends, E, E_POW2)
    is_used = (r < rows) & (expert < E)
    w = tl.load(weights + r, mask=is_used, other=0.0)
    dw = tl.zeros((BR,), tl.float32)
    for start in range(0, width, BF):
        f = start + tl.arange(0, BF)
        in_row = is_used[:, None] & (f < width)[None, :]
        at = r.to(tl.int64)[:, None] * width + f[None, :]
        x = _biased(h, b1, expert, at, in_row, f, width, HAS_BIAS)
        g = x
        if NAME == "swiglu":
            g = _biased(gate, b_gate, expert, at, in_row, f, width, HAS_BIAS)
        dy = tl.load(dout + at, mask=in_row, other=0.0).to(tl.float32)
        dw += tl.sum(tl.where(in_row, dy * _activated(x, g, NAME), 0.0), axis=1)
        slope, gate_slope = _slopes(x, g, NAME)
        there = (r < rows)[:, None] & (f < width)[None, :]
        da = dy * w[:, None]
        tl.store(dh + at, tl.where(in_row, da * slope, 0.0).to(dh.dtype.element_ty), mask=there)
        if NAME == "swiglu":
            tl.store(dgate + at, tl.where(in_row, da * gate_slope, 0.0).to(dgate.dtype.element_ty), mask=there)
    tl.store(dweights + r, dw, mask=r < rows)


@jit
def sum_of_experts_rows(
    x,  # [R, F]
    ends,  # [E] int32
    out,  # [E, F] float32
    width,
    BR: constexpr,
    BF: constexpr,
):
    e = tl.program_id(0)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    begin = tl.load(ends + e - 1, mask=e > 0, other=0)
    end = tl.load(ends + e)
    total = tl.zeros((BF,), tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        mask = (r < end)[:, None] & (f < width)[None, :]
        total += tl.sum(tl.load(x + r.to(tl.int64)[:, None] * width + f[None, :], mask=mask, other=0.0).to(tl.float32), axis=0)
    tl.store(out + e.to(tl.int64) * width + f, total, mask=f < width)


# ---------------------------------------------------------------- launches


def forward(name: str, h_RF: Tensor, gate_RF: Tensor | None, weights_R: Tensor, ends_E: Tensor, b1_EF: Tensor | None,
            b_gate_EF: Tensor | None) -> Tensor:  # fmt: skip
    """All packed; weights_R float32; without a gate or biases None."""
    (rows, width), experts = h_RF.shape, len(ends_E)
    out_RF = torch.empty_like(h_RF)
    if out_RF.numel():
        columns = min(COLUMNS, power_of_two(width))
        activation_forward[triton.cdiv(rows, ROWS), triton.cdiv(width, columns)](
            h_RF, _or(gate_RF, h_RF), weights_R, ends_E, _or(b1_EF, h_RF), _or(b_gate_EF, h_RF), out_RF, rows, width,
            E=experts, E_POW2=power_of_two(experts), NAME=name, HAS_BIAS=b1_EF is not None, BR=ROWS, BF=columns,
        )  # fmt: skip
    return out_RF


def backward(name: str, dout_RF: Tensor, h_RF: Tensor, gate_RF: Tensor | None, weights_R: Tensor, ends_E: Tensor,
             b1_EF: Tensor | None, b_gate_EF: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of h, of the gate, and (float32) of the weights."""
    (rows, width), experts = h_RF.shape, len(ends_E)
    dh_RF, dgate_RF = torch.empty_like(h_RF), None if gate_RF is None else torch.empty_like(gate_RF)
    dweights_R = torch.zeros_like(weights_R)
    if dh_RF.numel():
        activation_backward[(triton.cdiv(rows, ROWS),)](
            dout_RF, h_RF, _or(gate_RF, h_RF), weights_R, ends_E, _or(b1_EF, h_RF), _or(b_gate_EF, h_RF),
            dh_RF, _or(dgate_RF, dh_RF), dweights_R, rows, width,
            E=experts, E_POW2=power_of_two(experts), NAME=name, HAS_BIAS=b1_EF is not None, BR=ROWS, BF=min(COLUMNS, power_of_two(width)),
        )  # fmt: skip
    return dh_RF, dgate_RF, dweights_R


def row_sums(x_RF: Tensor, ends_E: Tensor) -> Tensor:
    """[E, F] float32: of each expert's rows."""
    width, experts = x_RF.shape[1], len(ends_E)
    out_EF = torch.zeros(experts, width, dtype=torch.float32, device=x_RF.device)
    if out_EF.numel():
        columns = min(128, power_of_two(width))
        sum_of_experts_rows[experts, triton.cdiv(width, columns)](x_RF, ends_E, out_EF, width, BR=32, BF=columns)
    return out_EF


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read."""
    return other if x is None else x
