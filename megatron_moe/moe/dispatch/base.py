"""What all dispatchers share, and the one that has nothing to send."""
# T tokens here, K experts per token, A assignments (T*K), R rows to compute here, E experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from megatron_moe.kernels.rows import add_rows, rows_by_number
from megatron_moe.moe.routing import count_assignments


@dataclass(frozen=True)
class Limits:
    """What the caller knows before the ids: each word saves rows, or a wait for the device."""

    is_dropless: bool = False  # no id is -1
    capacity: int | None = None  # rows that an expert takes from one rank at most
    most_tokens: int | None = None  # of any rank of the group


NO_LIMITS = Limits()


@dataclass
class LocalPlan:
    """Which assignment fills each row."""

    slot_R: Tensor  # int64: token * K + choice
    token_R: Tensor  # int64
    offsets_E: Tensor  # int32
    num_tokens: int
    has_spare_rows: bool
    row_TK: Tensor | None = None  # where the rows of a token are, see `sum_rows`
    sent_bytes: tuple[int, int] = (0, 0)
    far_bytes: tuple[int, int] | None = (0, 0)


class LocalDispatcher:
    """All experts live here."""

    name = "local"
    why = ""  # the choice, where nobody asked for this one
    has_gap = False  # rows are under way between leaving and arriving: something else can be computed meanwhile

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> Any:
        return self._plan(ids_TK, most_rows(ids_TK.numel(), self.num_experts, limits.capacity), not limits.is_dropless)

    def _plan(self, ids_TK: Tensor, rows: int, has_spare_rows: bool) -> LocalPlan:
        order_A, counts_E = self._order(ids_TK, is_dropless=not has_spare_rows)
        (num_tokens, k), slot_R = ids_TK.shape, order_A[:rows]
        token_R = slot_R if k == 1 else slot_R // k
        row_TK = None if has_spare_rows else rows_by_number(slot_R, k)
        return LocalPlan(slot_R, token_R, counts_E.cumsum(0).to(torch.int32), num_tokens, has_spare_rows, row_TK)

    def _order(self, ids_TK: Tensor, is_dropless: bool = False) -> tuple[Tensor, Tensor]:
        """Assignments by expert, dropped ones behind the last expert; and how many each expert has."""
        expert_TK = ids_TK if is_dropless else torch.where(ids_TK < 0, self.num_experts, ids_TK)
        by_expert_A = expert_TK.reshape(-1).argsort(stable=True)
        return by_expert_A, count_assignments(ids_TK, self.num_experts)

    def through(self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any) -> Tensor:
        """Experts' outputs of all tokens here. `plan`: of `self.plan`."""
        gathers = getattr(experts, "gathers", None)
        if isinstance(plan, LocalPlan) and gathers is not None and gathers(x_TD):  # the rows are never copied
            y_RD = experts(x_TD, plan.offsets_E, row_weights(weights_TK, plan), plan.has_spare_rows, plan.token_R)
            return self.combine(y_RD, plan)
        x_RD, offsets_e, row_weights_R, plan = self.dispatch(x_TD, ids_TK, weights_TK, plan)
        return self.combine(experts(x_RD, offsets_e, row_weights_R, plan.has_spare_rows), plan)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any = None) -> tuple[Tensor, Tensor, Tensor, Any]:
        plan = plan or self.plan(ids_TK)
        return gather_rows(x_TD, plan.token_R, row_TN=plan.row_TK), plan.offsets_E, row_weights(weights_TK, plan), plan

    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        return sum_rows(rows_RD, plan.token_R, plan.num_tokens, row_TN=plan.row_TK)


def row_weights(weights_TK: Tensor, plan: LocalPlan) -> Tensor:
    """[R]: the gate weight of each row, 0 for spare ones."""
    weights_R = weights_TK.reshape(-1).index_select(0, plan.slot_R)
    if plan.has_spare_rows:
        row_R = torch.arange(len(weights_R), device=weights_R.device)
        weights_R = torch.where(row_R < plan.offsets_E[-1], weights_R, 0.0)
    return weights_R


def most_rows(assignments: int, num_experts: int, capacity: int | None) -> int:
    """Rows that these experts can get from one rank, of this many assignments."""
    return assignments if capacity is None else min(assignments, num_experts * capacity)


def sum_rows(rows_RD: Tensor, addend_R: Tensor, num_tokens: int, addends: int = 1, row_TN: Tensor | None = None) -> Tensor:
    """[R, D] -> [T, D], the sum of a token's rows in the canonical order, which all dispatchers share: rows of one addend as they lie
    (experts ascending), then the addends of a token (its owner ranks ascending). addend_R: token * addends + addend.

    In at least float32: k roundings to bf16 would not be those of one process. On CUDA the order within an addend of three rows or
    more is fixed under torch.use_deterministic_algorithms only. row_TN: of `rows_by_number`, where all have one addend and as many rows.
    """
    return _Sum.apply(rows_RD, addend_R, num_tokens, addends, row_TN)


def gather_rows(x_TD: Tensor, addend_R: Tensor, addends: int = 1, row_TN: Tensor | None = None) -> Tensor:
    """[T, D] -> [R, D], row r that of token addend_R[r] // addends. The backward is `sum_rows`."""
    return _Gather.apply(x_TD, addend_R, addends, row_TN)


def reorder_rows(rows: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
    """Row r is rows[order_R[r]]; each is taken once, and `back_R` is the way back, which gradients take. (That of index_select would fill
    zeros and add to them.)"""
    return _Reorder.apply(rows, order_R, back_R)


def inverse(order_R: Tensor) -> Tensor:
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return back_R


def _source(addend_R: Tensor, addends: int) -> Tensor:
    return addend_R if addends == 1 else addend_R // addends


def _summed(rows_RD: Tensor, addend_R: Tensor, num_tokens: int, addends: int, row_TN: Tensor | None) -> Tensor:
    y_AD = add_rows(rows_RD, addend_R, num_tokens * addends, row_TN)
    return add_up(y_AD.view(num_tokens, addends, rows_RD.shape[1]).unbind(1)).to(rows_RD.dtype)


class _Sum(torch.autograd.Function):
    """`sum_rows`, and its backward `gather_rows`. (That of index_add would keep the rows, and gather in float32.)"""

    @staticmethod
    def forward(ctx, rows_RD: Tensor, addend_R: Tensor, num_tokens: int, addends: int, row_TN: Tensor | None) -> Tensor:
        ctx.save_for_backward(addend_R)
        ctx.addends = addends
        return _summed(rows_RD, addend_R, num_tokens, addends, row_TN)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        (addend_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, _source(addend_R, ctx.addends)), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, addend_R: Tensor, addends: int, row_TN: Tensor | None) -> Tensor:
        ctx.save_for_backward(addend_R, row_TN)
        ctx.num_tokens, ctx.addends = len(x_TD), addends
        return x_TD.index_select(0, _source(addend_R, addends))

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        addend_R, row_TN = ctx.saved_tensors
        return _summed(grad_RD, addend_R, ctx.num_tokens, ctx.addends, row_TN), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return rows.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back_R,) = ctx.saved_tensors
        return grad.index_select(0, back_R), None, None


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """From left to right. (torch.sum chooses its own order.)"""
    return reduce(torch.add, parts)


def addends_of(ids_TK: Tensor, owners: int = 1, experts_here: int = 0) -> tuple[Tensor, int]:
    """Which addend a choice belongs to, [T*K], int64: token * addends + the number of its owner rank among those of the token; and how
    many addends a token has at most. One, where the order of a sum does not depend on it: up to two rows, or one owner.

    Example, 2 experts per rank: ids [5, 0, 4, 1] -> [1, 0, 1, 0]: experts 0 and 1 are added, then 4 and 5, then the two sums.
    """
    num_tokens, k = ids_TK.shape
    token_T1 = torch.arange(num_tokens, device=ids_TK.device)[:, None]
    if k <= 2 or owners == 1:
        return token_T1.expand(-1, k).reshape(-1), 1
    most = min(k, owners)
    owner_TK = torch.where(ids_TK < 0, owners, ids_TK // experts_here)  # dropped ones are nobody's
    sorted_TK, order_TK = owner_TK.sort(dim=1, stable=True)
    changes_TK = torch.diff(sorted_TK, dim=1, prepend=sorted_TK[:, :1]) != 0
    number_TK = changes_TK.cumsum(1).clamp_max(most - 1)
    addend_TK = torch.empty_like(order_TK).scatter_(1, order_TK, number_TK)
    return (token_T1 * most + addend_TK).reshape(-1), most


def row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def pad_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]), value=value)
