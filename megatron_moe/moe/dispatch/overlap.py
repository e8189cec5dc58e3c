"""Rows travel while experts compute: the tokens are cut into parts, and each part is under way while another is computed.

    forward     send 0 | send 1, compute 0, return 0 | send 2, compute 1, return 1 | compute 2, return 2 | wait for the returns
    backward    the same from the end: gradients of results come in, gradients of rows go out, while others are computed

Routing, counts and the one wait of the host are those of the layer without parts. Within a part rows are in the usual order.

The order of the backward is autograd's: of what is ready, the node that was made last runs first. What lands last in the forward
is so sent off first in the backward (exchange.py).
"""
# T tokens, t tokens of a part, K experts per token, D hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.base import NO_LIMITS, Limits


@dataclass
class OverlappedPlan:
    """A plan for each part of the tokens, and how many tokens it has."""

    parts: list[Any]  # plans of the exchange
    tokens: list[int]

    @property
    def sent_bytes(self) -> tuple[int, int]:
        forward, backward = (sum(n) for n in zip(*(part.sent_bytes for part in self.parts)))
        return forward, backward

    @property
    def far_bytes(self) -> tuple[int, int] | None:
        each = [part.far_bytes for part in self.parts]
        return None if None in each else tuple(map(sum, zip(*each)))


class OverlappedDispatcher:
    """An all-to-all, direct or hierarchical, in `chunks` parts. What overlaps is the exchange between nodes, or the only one; neighbours on
    a node, and slices of an expert, are waited for."""

    why = ""
    has_gap = True

    def __init__(self, exchange: AllToAllDispatcher, chunks: int):
        self.exchange, self.chunks = exchange, chunks

    @property
    def name(self) -> str:
        return f"{self.exchange.name} in {self.chunks} chunks"

    def plan(self, ids_TK: Tensor, limits: Limits = NO_LIMITS) -> OverlappedPlan:
        parts = ids_TK.tensor_split(self.chunks)  # the last ones shorter, or empty
        return OverlappedPlan(self.exchange.plans(parts), [len(ids_tK) for ids_tK in parts])

    def through(
        self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, plan: OverlappedPlan,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """`meanwhile` is called when the first part has set off, for which the experts would wait; in the backward it comes last."""
        # one call of the experts in the eyes of FSDP, which gathers their parameters, and reduces the gradients, once per call
        return experts.in_one_call(partial(self._pipeline, weights_TK, plan, meanwhile), x_TD)

    def _pipeline(
        self, weights_TK: Tensor, plan: OverlappedPlan, meanwhile: Callable[[], None] | None, experts: Callable[..., Tensor], x_TD: Tensor
    ) -> Tensor:
        exchange = self.exchange
        parts = list(zip(x_TD.split(plan.tokens), weights_TK.split(plan.tokens), plan.parts))
        returning = []
        coming = exchange.depart(*parts[0])
        if meanwhile is not None:
            meanwhile()
        for number, part in enumerate(plan.parts):
            arriving = coming
            if number + 1 < len(parts):
                coming = exchange.depart(*parts[number + 1])
            rows_RD, row_weights_R = exchange.arrive(arriving, part)
            y_RD = experts(rows_RD, part.offsets_e, row_weights_R, part.has_spare_rows)
            returning.append(exchange.depart_back(y_RD, part))
        return torch.cat([exchange.arrive_back(flight, part) for flight, part in zip(returning, plan.parts)])
