"""What the experts of a layer were asked to do during a step, kept on the device until somebody looks."""
# E experts

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """One layer's step over the whole global batch."""

    layer: int
    tokens_per_expert: list[float]  # assignments, before dropping
    dropped_fraction: float  # of the assignments
    router_entropy: float  # mean entropy of the gate's probabilities over log(E): 1 is uniform, 0 decided
    aux_loss: float  # unscaled load-balancing loss: 1 is balanced
    z_loss: float
    sent_bytes: float = 0.0  # by a rank to other ranks, for rows and their gradients; mean over ranks
    far_bytes: float | None = None  # of these, to ranks of other nodes; None where it is not known which ranks share a node
    bias_range: tuple[float, float] | None = None  # smallest and largest expert bias, where experts have one


class RoutingStats:
    """Running sums of one layer. They are all sums over disjoint tokens, so ranks add theirs up to get the whole."""

    SCALARS = 5  # tokens, dropped, entropy, balance loss, z loss

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        self.sums: Tensor | None = None  # float64 [E + SCALARS]: exact counts
        self.sent_bytes = 0  # by this rank; the host knows it
        self.far_bytes: float = 0  # of these, to other nodes; NaN where nobody knows

    def add(self, measured: Tensor) -> None:
        self.sums = measured if self.sums is None else self.sums + measured

    def add_sent(
        self, sent_bytes: tuple[int, int], far_bytes: tuple[int, int] | None, has_backward: bool, is_recomputed: bool
    ) -> None:  # fmt: skip
        """(forward, backward) of a micro-batch. A backward that recomputes sends what the forward sent once more."""
        times = 1 + has_backward * is_recomputed, has_backward
        self.sent_bytes += sum(n * way for n, way in zip(times, sent_bytes))
        self.far_bytes += math.nan if far_bytes is None else sum(n * way for n, way in zip(times, far_bytes))

    @property
    def counts_E(self) -> Tensor:
        """float64: assignments so far, before dropping."""
        assert self.sums is not None, "nothing was routed yet"
        return self.sums[: self.num_experts]

    def vector(self, device: torch.device) -> Tensor:
        """float64 [E + 5] to be summed over ranks; zeros when nothing ran."""
        if self.sums is None:
            return torch.zeros(self.num_experts + self.SCALARS, dtype=torch.float64, device=device)
        return self.sums


@torch.no_grad()
def measure(probs_TE: Tensor, counts_E: Tensor, kept: Tensor, aux: Tensor, z: Tensor) -> Tensor:
    """float64 [E + 5], what RoutingStats adds up: assignments per expert, then the SCALARS."""
    entropy = torch.special.entr(probs_TE).sum()
    tokens = torch.full((), float(probs_TE.shape[0]), device=probs_TE.device)  # filled there: a copy would make the host wait
    scalars = torch.stack([s.double() for s in (tokens, counts_E.sum() - kept, entropy, aux.detach(), z.detach())])
    return torch.cat([counts_E.double(), scalars])


def summarise(layer: int, vector: Tensor) -> LayerLoad:
    """`vector` of RoutingStats summed over all ranks -> numbers."""
    counts, (tokens, dropped, entropy, aux, z) = vector[: -RoutingStats.SCALARS], vector[-RoutingStats.SCALARS :].tolist()
    tokens = max(tokens, 1.0)
    return LayerLoad(
        layer=layer,
        tokens_per_expert=counts.tolist(),
        dropped_fraction=dropped / max(float(counts.sum()), 1.0),
        router_entropy=entropy / tokens / math.log(max(len(counts), 2)),  # one expert: 0
        aux_loss=aux / tokens,
        z_loss=z / tokens,
    )
