"""Rows are written straight into the memory of their expert's rank, and read from there, by kernels that count, place and signal on the
device: no host waits, and nothing of size T x K x D is made (kernels/fused).
"""
# T tokens here, K experts per token, D hidden, R rows to compute here, e experts here

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.kernels.fused.exchange import Exchange, RowMap
from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits, LocalDispatcher, most_rows, row_bytes


@dataclass
class FusedPlan:
    """Where rows go. It names no buffer, so any number of micro-batches may be in flight, and recompute may use it again."""

    where: RowMap
    has_spare_rows: bool
    sent_bytes: tuple[Any, Any] = (0, 0)
    far_bytes: tuple[int, int] | None = (0, 0)  # its ranks share a node

    @property
    def offsets_e(self) -> Tensor:
        return self.where.ends_e


class FusedDispatcher(LocalDispatcher):
    """Experts are split over ranks that reach each other's memory."""

    name = "fused"

    def __init__(self, num_experts: int, exchange: Exchange):
        assert exchange.num_experts == num_experts, f"{num_experts} experts, the exchange is for {exchange.num_experts}"
        super().__init__(num_experts)
        self.exchange = exchange

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> FusedPlan:
        """Without gradients the sizes are exact, whatever the policy: there is no step that could be done again."""
        exchange = self.exchange
        policy = exchange.policy if torch.is_grad_enabled() else "exact"
        most = None
        if limits.capacity is not None:
            most = exchange.memory.ranks * most_rows(2**31, exchange.experts_here, limits.capacity)
        return FusedPlan(exchange.plan(ids_TK, most, policy), policy != "exact")

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: FusedPlan | None = None):
        plan = plan or self.plan(ids_TK)
        rows_RD, weights_R = _Push.apply(x_TD, weights_TK, self.exchange, plan.where)
        plan.sent_bytes = _sent_bytes(plan.where, row_bytes(x_TD), torch.promote_types(x_TD.dtype, torch.float32).itemsize)
        return rows_RD, plan.offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: FusedPlan) -> Tensor:
        return _Pull.apply(rows_RD, self.exchange, plan.where)


def _sent_bytes(where: RowMap, row: int, weight: int) -> tuple[Tensor, Tensor]:
    """Rows and weights go out and rows come back; their gradients the other way round. The device knows how many; no host waits."""
    rows = where.info[2:].long()  # of this rank for others, of others here
    each_way = rows.sum() * row + rows * weight
    return each_way[0], each_way[1]


class _Push(torch.autograd.Function):
    """Dispatch: x_TD, weights_TK -> rows_RD, weights_R. A token's gradient is the sum of those of its rows."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weights_TK: Tensor, exchange: Exchange, where: RowMap):
        ctx.exchange, ctx.where, ctx.dtype = exchange, where, weights_TK.dtype
        rows_RD, weights_R = exchange.push(x_TD, weights_TK, where)
        return rows_RD, weights_R.to(weights_TK.dtype)

    @staticmethod
    def backward(ctx, grad_RD: Tensor, grad_R: Tensor):
        grad_TD, grad_TK = ctx.exchange.pull(grad_RD, grad_R, ctx.where)
        return grad_TD, grad_TK.to(ctx.dtype), None, None


class _Pull(torch.autograd.Function):
    """Combine: rows_RD -> y_TD, the sum of a token's rows. Each of them has the token's gradient."""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, exchange: Exchange, where: RowMap):
        ctx.exchange, ctx.where = exchange, where
        return exchange.pull(rows_RD, None, where)[0]

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        return ctx.exchange.push(grad_TD, None, ctx.where)[0], None, None


# ---------------------------------------------------------------- the test at the start


def first_difference(fused: FusedDispatcher, reference: LocalDispatcher, width: int, dtype: torch.dtype, tokens: int = 257) -> str | None:
    """Sends random tokens through both, forward and backward: what the first token that differs is, and by how much; None where none does.
    Collective. An expert multiplies by a power of two, so that nothing but the way of a row can differ."""
    m, E, k = fused.exchange.memory, fused.num_experts, fused.exchange.k
    generator = torch.Generator().manual_seed(m.rank)
    T = max(tokens - m.rank, 0)
    x_TD = torch.randn(T, width, generator=generator).to(m.device, dtype)
    ids_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :k]
    ids_TK = torch.where(torch.rand(T, k, generator=generator) < 0.1, -1, ids_TK).to(m.device)
    weights_TK = torch.rand(T, k, generator=generator).to(m.device)
    found, expected = (_there_and_back(d, fused.exchange, x_TD, ids_TK, weights_TK) for d in (fused, reference))
    for name, a, b in zip(("output", "gradient of x", "gradient of a gate weight"), found, expected):
        differs_T = ~torch.isclose(a, b, rtol=2e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-5).all(1)
        if differs_T.any():
            token = int(differs_T.int().argmax())
            by = float((a[token] - b[token]).abs().max())
            return f"token {token} of rank {m.rank} of the expert-parallel group has another {name} than by the all-to-all, by {by:.3g}"
    fused.exchange.overflow()  # raises where a rank was not waited for
    return None


def _there_and_back(
    dispatcher: LocalDispatcher, exchange: Exchange, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        rows_RD, offsets_e, row_weights_R, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, dispatcher.plan(ids_TK))
        row_R = torch.arange(len(rows_RD), dtype=offsets_e.dtype, device=offsets_e.device)
        expert_R = torch.searchsorted(offsets_e, row_R, right=True) + exchange.memory.rank * exchange.experts_here
        scale_R = row_weights_R * 2.0 ** (expert_R % 3)
        y_TD = dispatcher.combine(rows_RD * scale_R[:, None].to(rows_RD.dtype), plan)
        (y_TD * x_TD.detach()).sum().backward()
    return y_TD.detach().float(), x_TD.grad.float(), weights_TK.grad.float()
