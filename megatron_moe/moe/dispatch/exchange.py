"""Exchanges of rows that may be under way while something else is computed, in the forward and in the backward.

    flight = launch(x, receive, send, group)      the rows set off
    ...                                           compute something else
    y = flight.land()                             wait for those that come here

Autograd sees two functions for one exchange. In the backward they swap their roles: that of `land` sends the gradients off, that of
`launch` waits for them. Between the two autograd runs what is ready, the node that was made last first - so what was computed
between launch and land in the forward is differentiated between them in the backward.

A tensor that is under way is read by nobody: only `land` gives it away.

With `fp8` rows travel in e4m3, each with its scale in four bytes behind it, and land in the type in which they set off; their gradients
travel as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.kernels.fp8 import pack_rows, unpack_rows
from megatron_moe.moe.dispatch.base import add_up
from megatron_moe.utils.compat import all_gather_rows

Sizes = list[int]


class _Link:
    """One exchange and its reverse. At most one of them is under way at a time."""

    def __init__(self, receive: Sizes, send: Sizes, group: dist.ProcessGroup, fp8: bool):
        self.receive, self.send, self.group, self.fp8 = receive, send, group, fp8
        self.under_way: tuple[Any, Tensor, Tensor] | None = None

    def start(self, x: Tensor, receive: Sizes, send: Sizes) -> Tensor:
        """Where the rows will be; not to be read before they are."""
        x = x.contiguous()
        y = x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(y, x, receive, send, group=self.group, async_op=True)
        self.under_way = work, x, y  # x is read until the exchange has ended
        return y

    def wait(self) -> Tensor:
        assert self.under_way is not None, "nothing is under way"
        work, _, y = self.under_way
        work.wait()
        self.under_way = None
        return y


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, link: _Link) -> Tensor:
        ctx.link = link
        if not link.fp8:
            return link.start(x, link.receive, link.send)
        link.start(pack_rows(x), link.receive, link.send)
        return x.new_empty(1).expand(sum(link.receive), x.shape[1])  # stands for what will land: bytes have no gradient

    @staticmethod
    def backward(ctx, _: Tensor):
        return ctx.link.wait(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, link: _Link) -> Tensor:
        ctx.link = link
        landed = link.wait()
        return unpack_rows(landed, y.dtype) if link.fp8 else y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.link.start(grad, ctx.link.send, ctx.link.receive)
        return grad, None  # of the shape that autograd asks for; what _Launch gives on is what comes back over the link


class Flight:
    """Rows under way."""

    def __init__(self, rows: Tensor, link: _Link):
        self._rows, self._link = rows, link

    def land(self) -> Tensor:
        return _Land.apply(self._rows, self._link)


def launch(x: Tensor, receive: Sizes, send: Sizes, group: dist.ProcessGroup, fp8: bool = False) -> Flight:
    """Rows [sum(send), ...] set off to the ranks of `group`; [sum(receive), ...] will land here. fp8: of [sum(send), D] alone."""
    link = _Link(receive, send, group, fp8)
    return Flight(_Launch.apply(x, link), link)


def exchange_rows(x: Tensor, receive: Sizes, send: Sizes, group: dist.ProcessGroup) -> Tensor:
    """The same with nothing between: rows [sum(send), ...] -> rows [sum(receive), ...]."""
    return launch(x, receive, send, group).land()


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _sum_in_order(grad, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_in_order(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_gather_rows(grad, ctx.group), None


def gather_from_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] -> [P n, ...]; the backward is `sum_over_ranks`."""
    return _GatherFromRanks.apply(x, group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P n, ...] -> [n, ...]: of everyone's rows for this rank, the sum in ascending order of ranks; the backward is `gather_from_ranks`.

    A reduce-scatter sums in an order of its backend's, in the type of the rows. This sends as many bytes, sums in at least float32, and
    the same values give the same bits whatever the backend and the number of rows.
    """
    return _SumOverRanks.apply(x, group)


def _sum_in_order(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    each = [len(x) // ranks] * ranks
    parts = exchange_rows(x, each, each, group).split(each)
    wide = torch.promote_types(x.dtype, torch.float32)
    return add_up([part.to(wide) for part in parts]).to(x.dtype)


def exchange_counts(counts_CP: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[C, P, ...] of what goes to each rank P -> of what comes from each. The host need not know them for that."""
    send_PC = counts_CP.transpose(0, 1).contiguous()
    receive_PC = torch.empty_like(send_PC)
    dist.all_to_all_single(receive_PC, send_PC, group=group)
    return receive_PC.transpose(0, 1)
