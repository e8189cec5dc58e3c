"""Experts that stay on the disk: one is read when a token wants it, and kept as long as there is room.

The dense part of the model is in memory. Of the experts of all layers together, at most `--expert-cache-gb` are. Who has to go is the
one used longest ago of the layer that has most: with a single list over all layers, which every token walks from the first to the last,
a layer's experts would be gone whenever it is its turn again. A layer computes expert by expert, those that are in memory first, so
that room for a single one is enough.
"""
# D hidden, F inner width, E experts here, R routed rows

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.load import describe, describe_metadata, differences
from megatron_moe.checkpoint.rows import RowReader
from megatron_moe.checkpoint.state import MTP, model_state
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.experts import Experts, StackedExperts
from megatron_moe.moe.layer import moe_layers
from megatron_moe.utils.dtensor import local_part

Key = tuple[int, int]  # layer, expert
Weights = dict[str, Tensor]


@dataclass
class ExpertCache:
    """At most `limit` bytes of weights, and what was asked of it."""

    limit: int
    used: int = 0
    peak: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    total: int = 0  # bytes of all experts on this rank
    _layers: dict[int, OrderedDict[int, Weights]] = field(default_factory=dict, repr=False)  # of each, those used last at the end

    def __contains__(self, key: Key) -> bool:
        return key[1] in self._layers.get(key[0], ())

    def get(self, key: Key, size: int, read: Callable[[], Weights]) -> Weights:
        """The weights of an expert of `size` bytes. Room is made before they are read: there are never more than the limit."""
        layer, expert = key
        mine = self._layers.setdefault(layer, OrderedDict())
        if expert in mine:
            self.hits += 1
            mine.move_to_end(expert)
            return mine[expert]
        assert size <= self.limit, f"{size} bytes in a cache of {self.limit}"
        self.misses += 1
        while self.used + size > self.limit:
            self._drop_one(layer, size)
        mine[expert] = read()
        self.used += size
        self.peak = max(self.peak, self.used)
        self.bytes_read += size
        return mine[expert]

    def _drop_one(self, layer: int, size: int) -> None:
        """Of the layer that would have most if `layer` had `size` bytes more."""
        shares = {number: bytes_of(experts) for number, experts in self._layers.items() if experts}
        most = max(shares, key=lambda number: (shares[number] + (size if number == layer else 0), number == layer))
        _, oldest = self._layers[most].popitem(last=False)
        self.used -= sum(t.nbytes for t in oldest.values())

    def report(self) -> str:
        asked = self.hits + self.misses
        rate = f"{self.hits / asked:.1%}" if asked else "none"
        return (
            f"experts: asked for {asked} times, {self.hits} in memory ({rate}), {megabytes(self.bytes_read)} read from disk; at most "
            f"{megabytes(self.peak)} of {megabytes(self.total)} in memory (limit {megabytes(self.limit)})"
        )


def bytes_of(experts: OrderedDict[int, Weights]) -> int:
    return sum(t.nbytes for weights in experts.values() for t in weights.values())


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


class OffloadedExperts(StackedExperts):
    """`Experts` without weights of its own.

    `first`: the number of the first one of this rank among all of the layer. `stacks`: name of a stack -> its name in the checkpoint.
    """

    def __init__(self, experts: Experts, layer: int, stacks: dict[str, str], reader: RowReader, cache: ExpertCache, device: torch.device):
        super().__init__()
        self.layer, self.stacks, self.reader, self.cache, self.device = layer, stacks, reader, cache, device
        local = {name: local_part(p) for name, p in experts.named_parameters()}
        self.shapes = {name: (tuple(p.shape[1:]), p.dtype) for name, (p, _) in local.items()}
        self.num_experts, self.first = len(local["w1"][0]), local["w1"][1][0].start
        one = Experts(1, *self.shapes["w1"][0], experts.activation, experts.b1 is not None).to("meta")
        one.use_reference, one.bias_share = experts.use_reference, experts.bias_share
        self._one = (one,)  # how an expert computes; in a tuple, for it is no part of the model

    @property
    def expert_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes.values())

    def forward(self, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, has_spare_rows: bool = False) -> Tensor:
        """As that of `Experts`. Rows behind the last expert's come out as zero."""
        ends = offsets_E.tolist()
        starts = [0, *ends[:-1]]
        wanted = [expert for expert in range(self.num_experts) if starts[expert] < ends[expert]]
        y_RD = x_RD.new_zeros(x_RD.shape[0], self.shapes["w2"][0][1])
        # those in memory first: reading the others may drive them out
        for expert in sorted(wanted, key=lambda expert: (self.layer, self.first + expert) not in self.cache):
            rows = slice(starts[expert], ends[expert])
            end = torch.full((1,), ends[expert] - starts[expert], dtype=torch.int32, device=x_RD.device)
            y_RD[rows] = self._compute(self.first + expert, x_RD[rows], end, row_weights_R[rows])
        return y_RD

    def _compute(self, expert: int, x_rD: Tensor, end: Tensor, row_weights_r: Tensor) -> Tensor:
        weights = self.cache.get((self.layer, expert), self.expert_bytes, lambda: self._read(expert))
        return torch.func.functional_call(self._one[0], weights, (x_rD, end, row_weights_r))

    def _read(self, expert: int) -> Weights:
        weights = {}
        for name, (shape, dtype) in self.shapes.items():
            row = torch.empty(shape, dtype=dtype)
            self.reader.read(self.stacks[name], expert, row)
            weights[name] = row[None].to(self.device)
        return weights


def offload_experts(model: GPT, path: Path, limit: int, device: torch.device) -> ExpertCache:
    """Take the experts out of a model that has no memory yet; they will come from the checkpoint at `path`.

    Raises CheckpointError when it does not fit the model, ValueError when `limit` (bytes) holds no expert.
    """
    problems = misfits(path, model)
    if problems:
        raise CheckpointError("\n  ".join([f"{path.name} does not fit, nothing was loaded:", *problems[:10]]))
    cache, reader = ExpertCache(limit), RowReader(path)
    for moe in moe_layers(model):
        assert isinstance(moe.experts, Experts), "experts of a factory are no stacks"
        stacks = {name: f"model.layers.{moe.layer}.moe.experts.{name}" for name, _ in moe.experts.named_parameters()}
        moe.experts = OffloadedExperts(moe.experts, moe.layer, stacks, reader, cache, device)
    layers = moe_layers(model)
    if not layers:
        raise ValueError("--expert-cache-gb is about experts, and this model has none; leave it out")
    cache.total = sum(moe.experts.expert_bytes * moe.experts.num_experts for moe in layers)
    least = max(moe.experts.expert_bytes for moe in layers)
    if limit < least:
        raise ValueError(
            f"--expert-cache-gb {limit / 1e9:g} ({limit} bytes) has no room for one expert, the largest of which has {least} bytes; give "
            f"at least {-(-least // 1000) / 1e6:.6f}"
        )
    return cache


def misfits(path: Path, model: GPT) -> list[str]:
    """Where names, shapes and types of the checkpoint are not those of the model."""
    saved, wanted = describe_metadata(path), describe(model_state(model))
    extra = sorted(name for name in saved.keys() - wanted.keys() if name.startswith("model.") and not name.startswith(MTP))
    return differences(saved, wanted) + [f"extra    {name}: in the checkpoint, not in this model" for name in extra]
