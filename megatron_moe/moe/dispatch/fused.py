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
from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits, LocalDispatcher, most_rows


@dataclass
class FusedPlan:
    """Where rows go. It names no buffer, so any number of micro-batches may be in flight, and recompute may use it again."""

    where: RowMap
    has_spare_rows: bool
    sent_bytes: tuple[Any, Any] = (0, 0)

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
        return rows_RD, plan.offsets_e, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: FusedPlan) -> Tensor:
        return _Pull.apply(rows_RD, self.exchange, plan.where)


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
