"""Replica watch: ranks that hold the same part of a parameter must hold the same bits of it, for ever.

They start from the same numbers and make the same steps, and nothing compares them again. A bit that flips in the memory of one
rank, or a gradient that one rank has not summed, makes it train a model of its own, and the loss shows nothing for thousands of steps.

    every N steps, on every rank:  (part, hash of its bits) for parameters, expert biases and optimizer state
    -> one all-gather of two integers each -> parts that are on several ranks with different hashes

No mesh is asked: a part is a name and the place that a rank's shard has in the whole, so whoever holds the same place is a replica,
whatever layout put it there (dense over TP where it is whole, over dp_replicate; experts over edp_replicate; expert biases everywhere).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_moe.kernels.blocks import row_blocks
from megatron_moe.utils.compat import all_gather_into_tensor, local_slices

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: spreads what it multiplies over 64 bits and loses none of them
_SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Drift:
    """One tensor of which equal parts are not equal."""

    name: str
    ranks: tuple[tuple[int, ...], ...]  # those that hold the same bits together, the most numerous first

    def __str__(self) -> str:
        if all(len(ranks) == 1 for ranks in self.ranks):
            return f"{self.name} is different on {_listed(r for (r,) in self.ranks)}"
        first, *others = (_listed(ranks) for ranks in self.ranks)
        return f"{self.name} on {', on '.join(others)} is not that of {first}"


class ReplicaDriftError(RuntimeError):
    """Replicas that are none any more."""


class ReplicaWatch:
    """Collective: all ranks make one and check together. Between checks it costs nothing."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device):
        self.model, self.optimizer, self.device = model, optimizer, device
        self._keys: dict[str, int] = {}  # names do not move: each is hashed once
        self._parts: dict[str, str] = {}  # nor do shards
        self._most: int | None = None  # entries of the rank that has most (of pipeline stages)

    @torch.no_grad()
    def check(self) -> list[Drift]:
        """What differs between ranks, the same list on all of them. Between two steps; the host waits for the answer, once."""
        entries = list(self._entries())
        found = self._gathered([self._key(name, part) for name, part, _ in entries], [hashed for *_, hashed in entries])
        drifted = _drifted(found)
        if not drifted:
            return []
        names = self._names_of(drifted, entries)
        together = ((names[key], ranks) for key, ranks in drifted.items())
        return [Drift(name, ranks) for name, ranks in sorted(together)]

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, which part of it is here, hash) of everything that may have a replica."""
        for name, p in self.model.named_parameters():
            if _local(p).numel():
                yield name, self._part(name, p), bits_hash(p)
            state = self.optimizer.state.get(p, {}) if self.optimizer is not None else {}
            moments = [s for _, s in sorted(state.items()) if isinstance(s, Tensor) and s.shape == p.shape and s.ndim]
            if moments and _local(p).numel():
                yield f"optimizer state of {name}", self._part(name, p), sum(bits_hash(s) * (2 * i + 1) for i, s in enumerate(moments))
        for name, b in self.model.named_buffers():
            if b.numel():
                yield name, self._part(name, b), bits_hash(b)

    def _part(self, name: str, x: Tensor) -> str:
        if name not in self._parts:
            self._parts[name] = _part(x)
        return self._parts[name]

    def _key(self, name: str, part: str) -> int:
        word = f"{name}{part}"
        if word not in self._keys:
            self._keys[word] = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little", signed=True)
        return self._keys[word]

    def _gathered(self, keys: list[int], hashes: list[Tensor]) -> Tensor:
        """int64 [ranks, entries, (key, hash)] of all ranks, on the host; key 0 fills up. Collective."""
        if self._most is None:
            most = torch.tensor(len(keys), device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            self._most = int(most)
        mine = torch.zeros(self._most, 2, dtype=torch.int64, device=self.device)
        mine[: len(keys), 0] = torch.tensor(keys, dtype=torch.int64).to(self.device, non_blocking=True)
        mine[: len(keys), 1] = torch.stack([h.to(self.device) for h in hashes])  # with --cpu-optimizer some are of the host
        everyone = mine.new_empty(dist.get_world_size() * self._most, 2)
        all_gather_into_tensor(everyone, mine)
        return everyone.view(-1, self._most, 2).cpu()

    def _names_of(self, drifted: dict[int, tuple], entries: list[tuple[str, str, Tensor]]) -> dict[int, str]:
        """Names of parts, also of those that only other ranks have. Collective, and only after a drift."""
        mine = {key: name for name, part, _ in entries if (key := self._key(name, part)) in drifted}
        everyone: list[dict[int, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return {key: name for names in everyone for key, name in names.items()}


def bits_hash(x: Tensor) -> Tensor:
    """0-dim int64: the bits of what of `x` is here, each element times an odd number of its place, added up modulo 2**64.

    One element that changes always changes the sum; several that do so by chance leave it alone once in 2**64.
    """
    ints_N = _local(x).detach().contiguous().view(-1).view(_SAME_WIDTH[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=ints_N.device)
    for block in row_blocks(ints_N.numel(), 1, ints_N.device):
        place_N = torch.arange(block.start, min(block.stop, ints_N.numel()), dtype=torch.int64, device=ints_N.device)
        total += (ints_N[block].to(torch.int64) * (place_N * _GOLDEN | 1)).sum()
    return total


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _part(x: Tensor) -> str:
    """Where in the whole the shard of this rank lies; '' for a tensor that is whole here."""
    if not isinstance(x, DTensor):
        return ""
    slices = local_slices(x)
    is_whole = all(s.start == 0 and s.stop == n for s, n in zip(slices, x.shape))
    return "" if is_whole else str([(s.start, s.stop) for s in slices])


def _drifted(found: Tensor) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Key -> ranks that agree with each other, for keys with more than one hash. `found`: [ranks, entries, (key, hash)]."""
    pairs, keys = found.flatten(0, 1).unique(dim=0), found[..., 0].unique()
    if len(pairs) == len(keys):
        return {}
    values, counts = pairs[:, 0].unique(return_counts=True)
    out = {}
    for key in values[counts > 1].tolist():
        ranks: dict[int, list[int]] = {}
        for rank, entry in (found[..., 0] == key).nonzero().tolist():
            ranks.setdefault(int(found[rank, entry, 1]), []).append(rank)
        out[key] = tuple(sorted(map(tuple, ranks.values()), key=lambda group: (-len(group), group)))
    return out


def _listed(ranks) -> str:
    words = [str(r) for r in ranks]
    if len(words) == 1:
        return f"rank {words[0]}"
    if len(words) > 8:
        words = [*words[:4], f"{len(words) - 5} others", words[-1]]
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"
