"""What all dispatchers share, and the one that has nothing to send."""
# T tokens here, K experts per token, A assignments (T*K), R rows to compute here, E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    offsets_E: Tensor  # int32
    num_tokens: int
    k: int
    has_spare_rows: bool
    sent_bytes: tuple[int, int] = (0, 0)

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.k


class LocalDispatcher:
    """All experts live here."""

    name = "local"
    why = ""  # the choice, where nobody asked for this one

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> Any:
        return self._plan(ids_TK, most_rows(ids_TK.numel(), self.num_experts, limits.capacity), not limits.is_dropless)

    def _plan(self, ids_TK: Tensor, rows: int, has_spare_rows: bool) -> LocalPlan:
        order_A, counts_E = self._order(ids_TK)
        return LocalPlan(order_A[:rows], counts_E.cumsum(0).to(torch.int32), *ids_TK.shape, has_spare_rows)

    def _order(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments by expert, dropped ones behind the last expert; and how many each expert has."""
        by_expert_A = torch.where(ids_TK < 0, self.num_experts, ids_TK).reshape(-1).argsort(stable=True)
        return by_expert_A, count_assignments(ids_TK, self.num_experts)

    def through(self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any) -> Tensor:
        """Experts' outputs of all tokens here. `plan`: of `self.plan`."""
        x_RD, offsets_e, row_weights_R, plan = self.dispatch(x_TD, ids_TK, weights_TK, plan)
        return self.combine(experts(x_RD, offsets_e, row_weights_R, plan.has_spare_rows), plan)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: Any = None) -> tuple[Tensor, Tensor, Tensor, Any]:
        plan = plan or self.plan(ids_TK)
        rows_RD, weights_R = x_TD.index_select(0, plan.token_R), weights_TK.reshape(-1).index_select(0, plan.slot_R)
        if plan.has_spare_rows:
            row_R = torch.arange(len(weights_R), device=weights_R.device)
            weights_R = torch.where(row_R < plan.offsets_E[-1], weights_R, 0.0)
        return rows_RD, plan.offsets_E, weights_R, plan

    def combine(self, rows_RD: Tensor, plan: Any) -> Tensor:
        return sum_rows(rows_RD, plan.token_R, plan.num_tokens)


def most_rows(assignments: int, num_experts: int, capacity: int | None) -> int:
    """Rows that these experts can get from one rank, of this many assignments."""
    return assignments if capacity is None else min(assignments, num_experts * capacity)


def sum_rows(rows_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """A token's rows are added in at least float32: k roundings to bf16 would not be those of one process."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    y_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=wide, device=rows_RD.device)
    return y_TD.index_add(0, token_R, rows_RD.to(wide)).to(rows_RD.dtype)


def row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()


def pad_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]), value=value)
