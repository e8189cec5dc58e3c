"""The experts' MLPs on a CPU as one operator, forward and backward: a loop over experts that writes each product where it belongs.

For each expert, on the rows that are its own:

    h = x w1 (+ b1), g = x w_gate (+ b_gate)    a = act(h, g)    z = a w2 (+ share b2)    y = gate weight of the row * z

What a grouped product and elementwise operators over all rows cost beside this: activations travel through memory between any two
operators, the gate weight meets the inner width instead of the outer one, and weight gradients are made apart and stacked.

It reads on the host how many rows an expert has. On a CPU nothing waits for that; this operator is for CPU tensors alone.

oneDNN (kernels/matmul_cpu.py says when it multiplies) compiles a kernel for every number of rows that it has not seen lately, which in 16 bits
takes as long as the product of an expert. So a few rows of the next experts are multiplied too, up to a number that comes again (`rows_to_multiply`): their
results are overwritten when these experts have their turn, and where rows are added up they are zero.

It is opaque to torch.compile, and so are its loops. torch keeps compiled graphs on the disk and finds them by the names of operators: where the
arguments of one change, so must its name.
"""
# R rows, D hidden, F inner width, E experts; of one expert or of a few in a row: r rows

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_moe.kernels.blocks import block_rows, row_blocks
from megatron_moe.kernels.matmul_cpu import goes_to_onednn, matmul

aten = torch.ops.aten


class Activation(NamedTuple):
    """Of an MLP without a gate."""

    forward: Callable[[Tensor, Tensor], object]  # (h, out): out = act(h)
    backward: Callable[[Tensor, Tensor], object]  # (grad, h): grad *= act'(h)
    is_kept: bool = False  # cheaper written and read than computed twice


ACTIVATIONS = {
    "gelu": Activation(
        lambda h, out: aten.gelu.out(h, approximate="none", out=out),
        lambda grad, h: aten.gelu_backward.grad_input(grad, h, approximate="none", grad_input=grad),
        is_kept=True,
    ),
    "gelu_tanh": Activation(
        lambda h, out: aten.gelu.out(h, approximate="tanh", out=out),
        lambda grad, h: aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=grad),
        is_kept=True,
    ),
    "relu": Activation(
        lambda h, out: torch.clamp_min(h, 0.0, out=out),
        lambda grad, h: aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad),
    ),
    "squared_relu": Activation(
        lambda h, out: torch.clamp_min(h, 0.0, out=out).square_(),
        lambda grad, h: grad.mul_(torch.clamp_min(h, 0.0).mul_(2.0)),
    ),
}
GATED = "swiglu"


def keeps_activation(name: str) -> bool:
    """For the backward; otherwise it is computed once more there, in the cache."""
    return name != GATED and ACTIVATIONS[name].is_kept


def _activate(name: str, h: Tensor, g: Tensor, out: Tensor) -> None:
    if name == GATED:
        aten.silu.out(g, out=out).mul_(h)
    else:
        ACTIVATIONS[name].forward(h, out)


def _differentiate(name: str, grad: Tensor, h: Tensor, g: Tensor, a: Tensor, dg: Tensor) -> None:
    """grad, of the activation's output, becomes that of h. Fills a, its output, where that was not kept, and dg."""
    if name == GATED:
        aten.silu.out(g, out=a)
        torch.mul(grad, h, out=dg)
        aten.silu_backward.grad_input(dg, g, grad_input=dg)
        grad.mul_(a)
        a.mul_(h)
    else:
        if not keeps_activation(name):
            ACTIVATIONS[name].forward(h, a)
        ACTIVATIONS[name].backward(grad, h)


class Stacks(NamedTuple):
    """The weights as this operator gets them: those that there are, in this order."""

    w1: Tensor
    w_gate: Tensor | None
    w2: Tensor
    b1: Tensor | None
    b_gate: Tensor | None
    b2: Tensor | None

    @classmethod
    def of(cls, weights: list[Tensor], activation: str) -> Stacks:
        given, is_gated, has_bias = iter(weights), activation == GATED, len(weights) > 3
        present = (True, is_gated, True, has_bias, has_bias and is_gated, has_bias)
        return cls(*(next(given) if is_there else None for is_there in present))

    def unbind(self) -> Stacks:
        """Of each stack its experts: indexing one at a time costs more than a small product."""
        return Stacks(*(None if w is None else w.unbind() for w in self))


def expert_mlp_cpu(
    x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, weights: list[Tensor], activation: str, bias_share: float
) -> Tensor:
    """[R, D] -> [R, D]; see kernels/expert_mlp.py."""
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (x_RD, row_weights_R, *weights))
    return _forward(x_RD, offsets_E, row_weights_R, weights, activation, bias_share, keeps)[0]


@torch.library.custom_op("megatron_moe::expert_mlp_on_cpu", mutates_args=(), device_types="cpu")
def _forward(
    x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, weights: list[Tensor], activation: str, bias_share: float, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y_RD, and what the backward needs, where it `keeps` that: z_RD, h_RF, of a gated unit g_RF, and a_RF where `keeps_activation`. Of rows
    behind the last expert's only y is defined: zero."""
    w, ends, is_gated = Stacks.of(weights, activation), offsets_E.tolist(), activation == GATED
    rows, used, F = x_RD.shape[0], ends[-1], w.w1.shape[2]
    groups, e_w = list(_groups(ends, x_RD, F)), w.unbind()
    most, behind = max((g.room for g in groups), default=0), max(rows, _end(groups))
    y_RD = x_RD.new_empty(behind, w.w2.shape[2])
    z_RD, room = (torch.empty_like(y_RD), behind) if keeps else (y_RD, most)
    h_RF, g_RF = x_RD.new_empty(room, F), x_RD.new_empty(room if is_gated else 0, F)
    keeps_a = keeps and keeps_activation(activation)
    a_RF = x_RD.new_empty(behind if keeps_a else most, F)
    for group in groups:
        first, first_a = group.rows.start if keeps else 0, group.rows.start if keeps_a else 0  # of h and g; of a
        for e in group.experts:
            x, own = _multiplied(x_RD, e, used), group.local(e, first)
            matmul(x, e_w.w1[e.number], e_w.b1 and e_w.b1[e.number], out=h_RF[own])
            if is_gated:
                matmul(x, e_w.w_gate[e.number], e_w.b_gate and e_w.b_gate[e.number], out=g_RF[own])
        h, g = (t[first : first + group.size] for t in (h_RF, g_RF))
        _activate(activation, h, g, a_RF[first_a : first_a + group.size])
        for e in group.experts:
            b2 = e_w.b2 and (e_w.b2[e.number] if bias_share == 1.0 else e_w.b2[e.number] * bias_share)
            matmul(a_RF[group.local(e, first_a)], e_w.w2[e.number], b2, out=z_RD[e.start : e.stop])
    torch.mul(z_RD[:used], row_weights_R[:used, None].to(z_RD.dtype), out=y_RD[:used])
    y_RD[used:].zero_()
    nothing = x_RD.new_empty(0)
    if not keeps:
        return y_RD[:rows], *(nothing.clone() for _ in range(4))
    return y_RD[:rows], z_RD[:rows], h_RF[:rows], g_RF[:rows], a_RF[:rows] if keeps_a else nothing


@torch.library.custom_op("megatron_moe::expert_mlp_on_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy_RD: Tensor, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, weights: list[Tensor], z_RD: Tensor, h_RF: Tensor,
    g_RF: Tensor, a_RF: Tensor, activation: str, bias_share: float,
) -> list[Tensor]:  # fmt: skip
    """Of x_RD, of row_weights_R, and of each of `weights`; zero for rows behind the last expert's, and for experts without rows."""
    w, ends, is_gated = Stacks.of(weights, activation), offsets_E.tolist(), activation == GATED
    used, F = ends[-1], w.w1.shape[2]
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights]
    drow_weights_R = torch.zeros_like(row_weights_R)
    groups, e_w, e_d = list(_groups(ends, x_RD, F)), w.unbind(), Stacks.of(gradients, activation).unbind()
    most, behind = max((g.room for g in groups), default=0), max(len(x_RD), _end(groups))
    dx_RD, dz_RD = x_RD.new_empty(behind, x_RD.shape[1]), z_RD.new_empty(behind, z_RD.shape[1])
    wide_rD: Tensor | None = None
    for rows in row_blocks(used, max(z_RD.shape[1] // 2, 1), z_RD.device):
        dy, z = dy_RD[:used][rows], z_RD[:used][rows]
        wide_rD = torch.empty_like(dy, dtype=row_weights_R.dtype) if wide_rD is None else wide_rD
        torch.sum(torch.mul(dy, z, out=wide_rD[: len(dy)]), -1, out=drow_weights_R[:used][rows])
    torch.mul(dy_RD[:used], row_weights_R[:used, None].to(z_RD.dtype), out=dz_RD[:used])
    dz_RD[used:].zero_()
    keeps_a = keeps_activation(activation)
    dh_rF, a_rF, dg_rF = x_RD.new_empty(most, F), x_RD.new_empty(0 if keeps_a else most, F), x_RD.new_empty(most if is_gated else 0, F)
    for group in groups:
        rows, size = group.rows, group.size
        dh, a, dg = (t[:size] for t in (dh_rF, a_rF, dg_rF))
        if group.room > size:  # what is multiplied of the next group
            for t in (a_rF, dg_rF):
                t[size : group.room].zero_()
        for e in group.experts:
            matmul(dz_RD[e.start : e.stop], e_w.w2[e.number].t(), out=dh_rF[group.local(e)])
        _differentiate(activation, dh, h_RF[rows], g_RF[rows], a, dg)
        for e in group.experts:
            own = group.local(e)
            dx = matmul(dh_rF[own], e_w.w1[e.number].t(), out=dx_RD[e.start : e.stop])
            if is_gated:
                matmul(dg_rF[own], e_w.w_gate[e.number].t(), out=dx, adds=True)
        for e in reversed(group.experts):  # those behind it are done with
            own, x, dz = group.local(e), _multiplied(x_RD, e, used), dz_RD[e.start : e.stop]
            if e.stop > e.end:
                others = slice(e.end - e.start, None)
                for t in (dh_rF, dg_rF):
                    t[own][others].zero_()
                dz_of_others = dz[others].clone()  # the next group's turn comes
                dz[others].zero_()
            a = _multiplied(a_RF, e, used) if keeps_a else a_rF[own]
            matmul(a.t(), dz, out=e_d.w2[e.number])
            matmul(x.t(), dh_rF[own], out=e_d.w1[e.number])
            if is_gated:
                matmul(x.t(), dg_rF[own], out=e_d.w_gate[e.number])
            if w.b1 is not None:
                torch.sum(dh_rF[own], 0, out=e_d.b1[e.number])
                torch.sum(dz, 0, out=e_d.b2[e.number]).mul_(bias_share)
                if is_gated:
                    torch.sum(dg_rF[own], 0, out=e_d.b_gate[e.number])
            if e.stop > e.end:
                dz[others].copy_(dz_of_others)
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        if start == end:
            for d in e_d:
                if d is not None:
                    d[expert].zero_()
    dx_RD[used:].zero_()
    return [dx_RD[: len(x_RD)], drow_weights_R, *gradients]


class Rows(NamedTuple):
    """Of an expert that has some: from `start` to `end`, and to `stop` with those that are multiplied too."""

    number: int
    start: int
    end: int
    stop: int


class Group(NamedTuple):
    """Experts that follow each other, several where they have few rows: what is done to each element is then done once for a block that
    fits the cache, and not in hundreds of calls."""

    rows: slice
    experts: list[Rows]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def room(self) -> int:
        return max(e.stop for e in self.experts) - self.rows.start

    def local(self, e: Rows, first: int = 0) -> slice:
        """Where an expert's rows are, in memory in which those of the group begin at `first`."""
        return slice(e.start - self.rows.start + first, e.stop - self.rows.start + first)


def _groups(ends: list[int], x_RD: Tensor, width: int) -> Iterator[Group]:
    enough, experts = block_rows(width, torch.device("cpu")), []
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        if start < end:
            experts.append(Rows(expert, start, end, start + rows_to_multiply(end - start, x_RD.dtype, x_RD.shape[1] * width)))
            if end - experts[0].start >= enough:
                yield Group(slice(experts[0].start, end), experts)
                experts = []
    if experts:
        yield Group(slice(experts[0].start, experts[-1].end), experts)


def _end(groups: list[Group]) -> int:
    """Of the last rows that are multiplied: behind the last ones that are anybody's."""
    return max((group.rows.start + group.room for group in groups), default=0)


def _multiplied(x_RD: Tensor, e: Rows, used: int) -> Tensor:
    """Behind the last rows there is nothing to multiply but zeros."""
    return x_RD[e.start : e.stop] if e.stop <= used else nn.functional.pad(x_RD[e.start : used], (0, 0, 0, e.stop - used))


def rows_to_multiply(rows: int, dtype: torch.dtype, weights: int) -> int:
    """Where a kernel is compiled for the product with a matrix of so many weights, the next number with not more than six binary digits before
    its zeros: at most 3 % more, and 32 numbers between any one and its double."""
    is_compiled = dtype.itemsize == 2 or goes_to_onednn(dtype, rows * weights)
    step = 1 << max(rows.bit_length() - 6, 0) if is_compiled else 1
    return -(-rows // step) * step


@_forward.register_fake
def _(x_RD, offsets_E, row_weights_R, weights, activation, bias_share, keeps):
    w = Stacks.of(weights, activation)
    rows, D, F = x_RD.shape[0], w.w2.shape[2], w.w1.shape[2]
    y_RD = x_RD.new_empty(rows, D)
    if not keeps:
        return (y_RD, *(x_RD.new_empty(0) for _ in range(4)))
    a_RF = x_RD.new_empty(rows, F) if keeps_activation(activation) else x_RD.new_empty(0)
    return y_RD, x_RD.new_empty(rows, D), x_RD.new_empty(rows, F), x_RD.new_empty(rows if activation == GATED else 0, F), a_RF


@_backward.register_fake
def _(dy_RD, x_RD, offsets_E, row_weights_R, weights, z_RD, h_RF, g_RF, a_RF, activation, bias_share):
    return [p.new_empty(p.shape) for p in (x_RD, row_weights_R, *weights)]


def _remember(ctx, inputs, output) -> None:
    x_RD, offsets_E, row_weights_R, weights, ctx.activation, ctx.bias_share, keeps = inputs
    assert keeps, "a backward needs what the forward was told not to keep"
    ctx.save_for_backward(x_RD, offsets_E, row_weights_R, *output[1:], *weights)
    ctx.set_materialize_grads(False)  # of what is kept: nobody has gradients for that


def _derive(ctx, dy_RD: Tensor | None, *_):
    x_RD, offsets_E, row_weights_R, z_RD, h_RF, g_RF, a_RF, *weights = ctx.saved_tensors
    dx_RD, drow_weights_R, *gradients = _backward(
        dy_RD, x_RD, offsets_E, row_weights_R, weights, z_RD, h_RF, g_RF, a_RF, ctx.activation, ctx.bias_share
    )
    return dx_RD, None, drow_weights_R, gradients, None, None, None


_forward.register_autograd(_derive, setup_context=_remember)
