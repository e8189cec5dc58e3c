"""Expert tensor parallelism: each expert is cut along its inner width over S ranks, and each of these needs all rows of the expert.

A row travels to one owner of its expert, the one with its source's number, and is spread over the slices there; the parts of its
result are summed there before it travels back:

    source --all-to-all--> owner (expert, s) --gather over s--> all slices compute --sum over s--> owner --all-to-all--> source

So what crosses the wider group is no more than without slices, and the rest stays among S neighbours, which are on one node as a
rule. (One exchange that sends each row to all S owners would move as many rows, S times as many of them far.)
"""
# S slices

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.exchange import exchange_rows
from megatron_moe.utils.compat import all_gather_into_tensor, all_gather_rows, reduce_scatter_rows


class Slices:
    """The ranks among which the experts here are cut; one rank has them whole."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def all_counts(self, counts: Tensor) -> Tensor:
        """[...] -> [S, ...]: everyone's."""
        if self.size == 1:
            return counts[None]
        out = counts.new_empty(self.size * counts.numel())
        all_gather_into_tensor(out, counts.flatten(), group=self.group)
        return out.view(self.size, *counts.shape)

    def largest(self, number: Tensor) -> Tensor:
        """In place."""
        if self.size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return number

    def gather(self, rows: Tensor, rows_S: list[int] | None = None) -> Tensor:
        """Everyone's rows, one rank's behind another's; the backward sums. rows_S: how many each has, None for all as many."""
        if self.size == 1:
            return rows
        if rows_S is None:
            return all_gather_rows(rows, self.group)
        copies = rows.expand(self.size, *rows.shape).flatten(0, 1)
        return exchange_rows(copies, rows_S, [len(rows)] * self.size, self.group)

    def sum(self, rows_RD: Tensor, rows_S: list[int] | None = None) -> Tensor:
        """The reverse: everyone's parts of the results of this rank's rows, added up."""
        if self.size == 1:
            return rows_RD
        if rows_S is None:
            return reduce_scatter_rows(rows_RD, self.group)
        here = rows_S[self.rank]
        parts = exchange_rows(rows_RD, [here] * self.size, rows_S, self.group).view(self.size, here, rows_RD.shape[1])
        return parts.sum(0, dtype=torch.promote_types(rows_RD.dtype, torch.float32)).to(rows_RD.dtype)

    def sent_rows(self, rows_S: list[int]) -> tuple[int, int]:
        """Rows that `gather` sends to others, and `sum`; the backward of one sends what the other does."""
        here = rows_S[self.rank]
        return here * (self.size - 1), sum(rows_S) - here
