"""Muon (Jordan et al. 2024, arXiv 2502.16982): momentum whose matrices are orthogonalised before they are added.

    momentum <- momentum + (1 - m) (gradient - momentum)        update = (1 - m) gradient + m momentum    (Nesterov)
    weight   <- (1 - rate decay) weight - rate s sqrt(max(rows, columns)) orthogonal(update)

`orthogonal` brings all singular values to about 1. That takes the whole matrix: a shard of one means nothing. So sharded matrices
of one shape are dealt out: every rank of a group gets some of them whole, works on those, and returns the parts. A stack of
experts is a matrix per expert, and experts that are sharded by number stay where they are. Replicas all do the same work.

Worked example, 3 matrices [8, D] cut by rows over 2 ranks: each rank has 4 rows of all three. Rank 0 becomes the owner of the
first two, rank 1 of the third: rank 0 sends its rows of the third, gets rank 1's rows of the first two, and after the
orthogonalisation everything goes back the same way.
"""
# k matrices, r rows and c columns of each that are here, R rows and C columns

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megatron_moe.config.training import OptimizerConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: the steepest slope at zero
EPS = 1e-7
MOST_ELEMENTS = 1 << 26  # that a rank works on at a time; the iteration needs a few times as much


class Muon(Optimizer):
    """Groups with `is_muon` are Muon's. `adam` makes the optimizer of the others, which shares their rates and this one's state."""

    found_inf: Tensor | None = None  # where it is 1 nothing moves

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, adam: Callable[[list[dict[str, Any]]], Optimizer]):
        super().__init__(groups, {"lr": config.lr})
        self._step_supports_amp_scaling = True  # torch's name for reading found_inf
        self.momentum, self.is_nesterov = config.muon_momentum, config.muon_use_nesterov
        self.ns_steps, self.scale = config.muon_num_ns_steps, config.muon_extra_scale_factor
        others = [group for group in self.param_groups if not group["is_muon"]]
        self.adam = adam(others) if others else None
        if self.adam is not None:
            self.adam.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["is_muon"]:
                for alike in _alike([p for p in group["params"] if p.grad is not None]):
                    self._move(alike, group["lr"], group["weight_decay"])
        if self.adam is not None:
            if self.found_inf is not None:
                self.adam.found_inf = self.found_inf
            self.adam.step()

    def _move(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        """One step of matrices of one shape and layout. Collective over those that share them."""
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, grads = [_local(p) for p in parameters], [_local(p.grad) for p in parameters]
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in parameters]
        keep: float | Tensor = 1.0
        if self.found_inf is not None:
            keep = 1.0 - self.found_inf.to(weights[0].dtype)
            grads = [g.masked_fill(self.found_inf > 0, 0.0) for g in grads]  # infinity times 0 would be NaN
        change = torch._foreach_sub(grads, momenta)
        torch._foreach_mul_(change, (1.0 - self.momentum) * keep)
        torch._foreach_add_(momenta, change)
        updates = list(torch._foreach_lerp(grads, momenta, self.momentum)) if self.is_nesterov else momenta
        directions = orthogonalised(updates, cuts_of(parameters[0]), self.ns_steps)
        size = self.scale * max(parameters[0].shape[-2:]) ** 0.5
        torch._foreach_mul_(weights, 1.0 - rate * decay * keep)
        torch._foreach_mul_(directions, -rate * size * keep)
        torch._foreach_add_(weights, directions)


def newton_schulz(x_kRC: Tensor, steps: int) -> Tensor:
    """Matrices with the singular vectors of x and singular values near 1; zero stays zero. In the dtype of x."""
    a, b, c = COEFFICIENTS
    is_tall = x_kRC.shape[1] > x_kRC.shape[2]
    x = x_kRC.mT if is_tall else x_kRC
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape and layout, in lots of at most MOST_ELEMENTS here. The same lots on all ranks that share them."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else ()
        kinds.setdefault((p.shape, p.dtype, *layout), []).append(p)
    for same in kinds.values():
        lot = max(MOST_ELEMENTS // _most_elements_here(same[0]), 1)
        yield from (same[i : i + lot] for i in range(0, len(same), lot))


def _most_elements_here(p: nn.Parameter) -> int:
    """Of the largest shard: a number that does not depend on the rank."""
    elements = p.numel()
    for placement, ranks in zip(p.placements, p.device_mesh.shape) if isinstance(p, DTensor) else ():
        if not placement.is_replicate():
            elements = -(-elements // ranks)
    return max(elements, 1)


# ---------------------------------------------------------------- whole matrices


class Cut(NamedTuple):
    """One axis of ranks over which matrices are cut."""

    group: dist.ProcessGroup
    dim: int  # of [k, rows, columns]
    parts: list[int]  # length along `dim` on each rank


def cuts_of(p: nn.Parameter) -> list[Cut]:
    """Of a matrix or a stack of them, the last cut first: FSDP's, its axes come first in the mesh, is one of the shards of TP."""
    if not isinstance(p, DTensor):
        return []
    cuts, dims = [], [None if placement.is_replicate() else placement.dim for placement in p.placements]
    for axis, dim in enumerate(dims):
        ranks = p.device_mesh.size(axis)
        if dim is None or ranks == 1 or (p.ndim == 3 and dim == 0):
            continue
        length = p.shape[dim]
        for later in range(axis + 1, len(dims)):
            if dims[later] == dim:
                length = _parts(length, p.device_mesh.size(later))[p.device_mesh.get_local_rank(later)]
        cuts.append(Cut(p.device_mesh.get_group(axis), dim + 3 - p.ndim, _parts(length, ranks)))
    return cuts


def _parts(length: int, ranks: int) -> list[int]:
    """As torch.chunk cuts: the last ones shorter or empty."""
    each = -(-length // ranks)
    return [max(min(each, length - rank * each), 0) for rank in range(ranks)]


def orthogonalised(updates: list[Tensor], cuts: list[Cut], steps: int) -> list[Tensor]:
    """Shards of matrices -> the same shards of the orthogonalised matrices."""
    stacks = [u if u.ndim == 3 else u[None] for u in updates]
    counts, x = [], torch.cat(stacks)
    for cut in cuts:
        counts.append(len(x))
        x = _deal_out(x, cut)
    x = newton_schulz(x, steps)
    for cut, count in zip(reversed(cuts), reversed(counts)):
        x = _return(x, cut, count)
    return [part.view_as(u) for part, u in zip(x.contiguous().split([len(s) for s in stacks]), updates)]


def _deal_out(x_krc: Tensor, cut: Cut) -> Tensor:
    """Parts of k matrices -> this rank's share of the matrices, whole along the dim of the cut."""
    me, share = dist.get_rank(cut.group), _parts(len(x_krc), len(cut.parts))
    shapes = [_with_length(x_krc, share[me], cut.dim, part) for part in cut.parts]
    each = x_krc[0].numel() if len(x_krc) else 0
    came = _exchange(x_krc.reshape(-1), [shape.numel() for shape in shapes], [n * each for n in share], cut.group)
    return torch.cat([x.view(shape) for x, shape in zip(came.split([shape.numel() for shape in shapes]), shapes)], cut.dim)


def _return(x_kRC: Tensor, cut: Cut, count: int) -> Tensor:
    """The inverse: `count` matrices, of each the part that was here."""
    me, share = dist.get_rank(cut.group), _parts(count, len(cut.parts))
    shape = _with_length(x_kRC, count, cut.dim, cut.parts[me])
    sent = [part.reshape(-1) for part in x_kRC.split(cut.parts, cut.dim)]
    each = shape[1] * shape[2]
    came = _exchange(torch.cat(sent), [n * each for n in share], [len(part) for part in sent], cut.group)
    return came.view(shape)


def _exchange(x_N: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    """Elements in runs of these lengths, one for each rank of the group."""
    came_N = x_N.new_empty(sum(receive))
    dist.all_to_all_single(came_N, x_N.contiguous(), receive, send, group=group)
    return came_N


def _with_length(x: Tensor, count: int, dim: int, length: int) -> torch.Size:
    return torch.Size([count, *(length if d == dim else n for d, n in enumerate(x.shape[1:], start=1))])
