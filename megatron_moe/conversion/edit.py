"""Fewer, more or other experts: a checkpoint in which every expert is made of those of another, optimizer state included.

    layer 3, experts 0 1 2 3:   prune 1        -> 0, 2, 3
                                duplicate 2    -> 0, 1, 2, 3, 2 + noise
                                merge 0 and 3  -> (w_0 x 0 + w_3 x 3), 1, 2
                                add one        -> 0, 1, 2, 3, new

Whatever has a row per expert follows: the stacks of weights, the rows of the router, the expert bias, and their moments.

                          copy                  merged                        new
    weights, router       the same (+ noise)    weighted mean                 as in a new model
    expert bias           the same              weighted mean                 mean of the layer
    exp_avg, momentum     the same              weighted mean                 zero
    exp_avg_sq            the same              weighted mean                 mean of the layer: with zeros the first steps would be too
                                                                              large, as the number of steps is one for the whole stack

A plan (`Edits`) says what each expert of each layer is made of; `EditedSource` reads a source through it, tensor by tensor.
"""
# E experts before, N after

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.model import divisors
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.upcycling import UpcyclingConfig
from megatron_moe.conversion.source import ReadAhead, Source, Tensors
from megatron_moe.model.init import draw, initial_std
from megatron_moe.utils.random import named_generator

MEANS = ("exp_avg", "momentum_buffer")  # of gradients: a new expert has none so far
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
_PER_EXPERT = re.compile(
    r"(?:model|optimizer\.(\w+))\.((?:layers\.(\d+)|mtp\.(\d+)\.block)\.moe\.(?:experts\.\w+|gate\.weight|gate\.expert_bias))"
)


@dataclass(frozen=True)
class Expert:
    """What one expert afterwards is made of. No parts: it is new."""

    parts: tuple[tuple[int, float], ...] = ()  # (expert before, weight); weights add up to 1
    noise: float = 0.0  # on matrices and on the row of the router, relative to the spread of all experts' numbers

    def __str__(self) -> str:
        return "+".join(str(old) for old, _ in self.parts) or "new"


# Layer -> all of its experts afterwards; other layers stay. The block of module n of multi-token prediction is layer --num-layers + n.
Edits = dict[int, tuple[Expert, ...]]


def kept(experts: Sequence[int]) -> tuple[Expert, ...]:
    return tuple(Expert(((i, 1.0),)) for i in experts)


# ---------------------------------------------------------------- plans


def pruned(count: int, gone: Sequence[int]) -> tuple[Expert, ...]:
    return kept([i for i in range(count) if i not in set(gone)])


def least_loaded(loads: Sequence[float], keep: int) -> list[int]:
    """Who goes, so that `keep` stay; of equal loads the higher number."""
    order = sorted(range(len(loads)), key=lambda i: (loads[i], -i))
    return sorted(order[: max(len(loads) - keep, 0)])


def duplicated(count: int, experts: Sequence[int], noise: float) -> tuple[Expert, ...]:
    """Copies stand behind all others, in the order given."""
    return kept(range(count)) + tuple(Expert(((i, 1.0),), noise) for i in experts)


def extended(count: int, new: int) -> tuple[Expert, ...]:
    return kept(range(count)) + (Expert(),) * new


def merged(count: int, clusters: Sequence[Sequence[int]], loads: Sequence[float] | None) -> tuple[Expert, ...]:
    """Each cluster becomes one expert, in the place of its lowest; weights are the loads, equal without them or where nobody came."""
    of_lowest = {min(cluster): sorted(cluster) for cluster in clusters}
    gone = {i for cluster in of_lowest.values() for i in cluster[1:]}
    return tuple(_mean(of_lowest.get(i, [i]), loads) for i in range(count) if i not in gone)


def _mean(cluster: Sequence[int], loads: Sequence[float] | None) -> Expert:
    total = sum(loads[i] for i in cluster) if loads else 0.0
    return Expert(tuple((i, loads[i] / total if loads and total else 1 / len(cluster)) for i in cluster))


def closest(similar: Tensor, keep: int) -> list[list[int]]:
    """Clusters of two or more, so that `keep` experts are left: always the two whose members are, on the mean, the most alike.

    similar: [E, E], larger is more alike. Of equal ones the lowest numbers.
    """
    clusters = [[i] for i in range(len(similar))]
    mean = similar.double().clone()  # between clusters; -inf: the same one, or gone into another
    mean.fill_diagonal_(float("-inf"))
    for _ in range(len(similar) - keep):
        a, b = sorted(divmod(int(mean.argmax()), len(similar)))
        share = len(clusters[a]) / (len(clusters[a]) + len(clusters[b]))
        row = share * mean[a] + (1 - share) * mean[b]
        mean[a], mean[:, a] = row, row
        mean[b], mean[:, b], mean[a, a] = float("-inf"), float("-inf"), float("-inf")
        clusters[a], clusters[b] = clusters[a] + clusters[b], []
    return [cluster for cluster in clusters if len(cluster) > 1]


def similarities(source: Source, layer: int) -> Tensor:
    """[E, E] cosines of the experts' matrices, one stack in memory at a time. Neurons are compared by their place."""
    last = source.meta["config"]["model"]["num_layers"]
    block = f"layers.{layer}" if layer <= last else f"mtp.{layer - last}.block"
    names = [n for n in source.tensors if re.fullmatch(rf"model\.{re.escape(block)}\.moe\.experts\.w\w*", n)]
    products: Tensor | float = 0.0
    for _, stack in source.read(names):
        flat = stack.flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        products = products + (flat @ flat.t()).double()
    lengths = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return products / lengths[:, None] / lengths


# ---------------------------------------------------------------- the configuration


def edited_run(run: RunConfig, edits: Edits, topk: int | None = None) -> tuple[RunConfig, list[str]]:
    """The run whose model this is, and what a person should know about it; ConfigError where there is no such run."""
    if run.moe.moe_router_policy == "hash":
        raise ConfigError([
            "--moe-router-policy hash deals words to experts by their number: with another number all words change experts; train anew"
        ])  # fmt: skip
    before = run.moe.experts_per_layer(run.model.num_layers)
    after = {layer: len(experts) for layer, experts in edits.items()}
    if small := [f"{layer} ({n})" for layer, n in after.items() if n < 2]:
        raise ConfigError([f"a layer with experts has at least two, and of these fewer would be left: layer {', '.join(small)}"])
    counts = [after.get(layer, n) for layer, n in enumerate(before, start=1)]
    for layer in range(len(before) + 1, len(before) + run.model.mtp_num_layers + 1):
        if (here := after.get(layer, before[-1])) != counts[-1]:
            raise ConfigError([
                f"layer {layer} is a block of multi-token prediction, which has as many experts as the last layer, and would have {here} "
                f"where layer {len(before)} has {counts[-1]}; edit both alike, as --keep, --count and all:... do"
            ])  # fmt: skip
    probe = MoEConfig(
        num_experts=(2,), topk=1, expert_interval=run.moe.expert_interval, moe_first_k_dense_replace=run.moe.moe_first_k_dense_replace
    )
    of_slots = tuple(n for n, probed in zip(counts, probe.experts_per_layer(run.model.num_layers)) if probed > 1)
    num_experts = of_slots[:1] if len(set(of_slots)) == 1 else of_slots
    ep, notes = _fitting_degree(run.moe, num_experts), []
    if ep != run.moe.moe_expert_parallel_size:
        notes.append(
            f"--moe-expert-parallel-size was {run.moe.moe_expert_parallel_size}, which {' '.join(map(str, num_experts))} experts do not divide by: "
            f"{ep} is written, and the next run may choose any of {', '.join(map(str, common_divisors(num_experts)))}, or more with "
            "--moe-pyramid-ep auto"
        )
    moe = dataclasses.replace(run.moe, num_experts=num_experts, moe_expert_parallel_size=ep, topk=topk or run.moe.topk)
    edited = dataclasses.replace(run, moe=moe, upcycling=UpcyclingConfig())
    assert list(edited.moe.experts_per_layer(run.model.num_layers)) == counts, f"{num_experts=} for {counts}"
    return edited, notes


def common_divisors(num_experts: Sequence[int]) -> list[int]:
    several = [n for n in num_experts if n > 1]
    return [d for d in divisors(several[0]) if all(n % d == 0 for n in several)]


def _fitting_degree(moe: MoEConfig, num_experts: Sequence[int]) -> int:
    """The largest expert-parallel degree that divides the one of the run and that all layers can have."""
    ep = moe.moe_expert_parallel_size
    if moe.moe_pyramid_ep == "auto":
        return ep
    return max(d for d in divisors(ep) if all(max(n, d) % min(n, d) == 0 for n in num_experts if n > 1))


# ---------------------------------------------------------------- tensors


class EditedSource:
    """A `Source` that is another one with edited experts. New numbers depend on the seed and on names alone."""

    has_checksums = property(lambda self: self.source.has_checksums)

    def __init__(self, source: Source, run: RunConfig, edits: Edits, seed: int, what: str):
        """run: of `edited_run`; what: for the record in the checkpoint."""
        self.source, self.run, self.edits, self.seed = source, run, edits, seed
        self.path, self.iteration, self._ahead = source.path, source.iteration, ReadAhead(source)
        record = {"load": str(source.path), "edit": what, "experts": {str(i): [str(e) for e in experts] for i, experts in edits.items()}}
        self.meta: dict[str, Any] = source.meta | {
            "config": run.to_dict(), "architecture": run.architecture(source.meta["vocab_size"]),
            "edits": [*source.meta.get("edits", []), record],
        }  # fmt: skip
        self.tensors: Tensors = {name: self._entry(name, entry) for name, entry in source.tensors.items()}
        if unknown := sorted({slot for slot, _, _ in filter(None, map(self._place, self.tensors)) if slot not in ("", *MEANS, *SQUARES)}):
            raise ConfigError([f"optimizer state {', '.join(unknown)} has a row per expert, and it is not known what it means"])

    def files(self) -> dict[str, int]:
        return self.source.files()

    def file_problems(self, verify: str) -> list[str]:
        return self.source.file_problems(verify)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        single = len(names) == 1  # as a run directory asks when it is written
        for name, tensor in [(names[0], self._ahead.take(names[0]))] if single else self.source.read(names):
            place = self._place(name)
            yield name, tensor if place is None else self._edited(tensor, *place)

    def _place(self, name: str) -> tuple[str, str, int] | None:
        """(slot of the optimizer or "", parameter, layer) of what has a row per expert in an edited layer."""
        match = _PER_EXPERT.fullmatch(name)
        if match is None or not self.source.tensors[name]["shape"]:
            return None  # the number of steps is one for all
        layer = int(match[3]) if match[3] else self.run.model.num_layers + int(match[4])
        return (match[1] or "", match[2], layer) if layer in self.edits else None

    def _entry(self, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        place = self._place(name)
        return dict(entry) if place is None else {**entry, "shape": [len(self.edits[place[2]]), *entry["shape"][1:]]}

    def _edited(self, old: Tensor, slot: str, parameter: str, layer: int) -> Tensor:
        """[E, ...] -> [N, ...]; one new row at a time."""
        experts = self.edits[layer]
        new = old.new_empty(len(experts), *old.shape[1:])
        is_matrix = slot == "" and (parameter.endswith("gate.weight") or parameter.rpartition(".")[2].startswith("w"))
        spread = float(old.std()) if is_matrix and any(e.noise for e in experts) else 0.0
        for i, expert in enumerate(experts):
            new[i] = self._made(old, expert.parts) if expert.parts else self._new(old, slot, parameter, i)
            if expert.noise and spread:
                generator = named_generator(self.seed, f"{parameter}/edit/{i}")
                new[i] += (torch.randn(old.shape[1:], generator=generator) * expert.noise * spread).to(old.dtype)
        return new

    @staticmethod
    def _made(old: Tensor, parts: Sequence[tuple[int, float]]) -> Tensor:
        if len(parts) == 1:
            return old[parts[0][0]]
        wide = torch.promote_types(old.dtype, torch.float32)
        return sum(old[i].to(wide) * weight for i, weight in parts).to(old.dtype)

    def _new(self, old: Tensor, slot: str, parameter: str, expert: int) -> Tensor:
        if slot in SQUARES or parameter.endswith("expert_bias"):
            return old.mean(0)
        if slot in MEANS:
            return torch.zeros_like(old[0])
        std = initial_std(parameter, self.run.model.init_method_std, self.run.model.num_layers)
        return draw(parameter, f"{parameter}/added/{expert}", tuple(old.shape[1:]), self.seed, std).to(old.dtype)
