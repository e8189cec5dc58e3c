"""What the experts of a layer were asked to do during a step, kept on the device until somebody looks."""
# E experts

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerLoad:
    """One layer's step over the whole global batch, as written to metrics.jsonl."""

    layer: int
    load_max_over_mean: float
    load_min_over_mean: float
    dead_experts: int
    dropped_fraction: float
    router_entropy: float  # mean entropy of the gate's probabilities, in units of log(E): 1 is uniform
    aux_loss: float  # unscaled load-balancing loss: 1 is balanced
    z_loss: float
    expert_load: list[float]  # share of the assignments per expert, before dropping


class RoutingStats:
    """Running sums of one layer. They are all sums over disjoint tokens, so ranks add theirs up to get the whole."""

    SCALARS = 5  # tokens, dropped, entropy, balance loss, z loss

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.sums: Tensor | None = None  # float64 [E + SCALARS]: exact counts

    def reset(self) -> None:
        self.sums = None

    @torch.no_grad()
    def add(self, probs_TE: Tensor, counts_E: Tensor, kept: Tensor, aux: Tensor, z: Tensor) -> None:
        entropy = torch.special.entr(probs_TE).sum()
        tokens = torch.tensor(float(probs_TE.shape[0]), device=probs_TE.device)
        scalars = torch.stack([s.double() for s in (tokens, counts_E.sum() - kept, entropy, aux.detach(), z.detach())])
        step = torch.cat([counts_E.double(), scalars])
        self.sums = step if self.sums is None else self.sums + step

    def vector(self, device: torch.device) -> Tensor:
        """float64 [E + 5] to be summed over ranks; zeros when nothing ran."""
        if self.sums is None:
            return torch.zeros(self.num_experts + self.SCALARS, dtype=torch.float64, device=device)
        return self.sums


def summarise(layer: int, vector: Tensor) -> LayerLoad:
    """`vector` of RoutingStats summed over all ranks -> numbers."""
    counts, (tokens, dropped, entropy, aux, z) = vector[: -RoutingStats.SCALARS], vector[-RoutingStats.SCALARS :].tolist()
    total, tokens = max(float(counts.sum()), 1.0), max(tokens, 1.0)
    share = (counts / total).tolist()
    mean = 1.0 / len(share)
    return LayerLoad(
        layer=layer,
        load_max_over_mean=max(share) / mean,
        load_min_over_mean=min(share) / mean,
        dead_experts=int((counts == 0).sum()),
        dropped_fraction=dropped / total,
        router_entropy=entropy / tokens / float(torch.tensor(float(len(share))).log()),
        aux_loss=aux / tokens,
        z_loss=z / tokens,
        expert_load=[round(s, 6) for s in share],
    )
