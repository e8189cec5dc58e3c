"""A dense model's tensors -> those of a model with experts (sparse upcycling, arXiv 2212.05055).

    layers.2.mlp.fc1.weight [F, D] --turned--> layers.2.moe.experts.w1 [E, D, F]   every expert a copy, or a part of the width F
    layers.2.mlp.fc2.weight [D, F] --turned--> layers.2.moe.experts.w2 [E, F, D]   times a factor: config/upcycling.py
                                   \\--------> layers.2.mlp.fc2.weight             the branch beside the experts, where there is one
    everything else                ----------> itself
    nothing                        ----------> router, coefficient, gate of the shared expert, expert bias

With a granularity of G, experts G g, G g + 1, ... G g + G - 1 are the parts of one MLP, in the order of its neurons. Their rows of
the router are equal, so a token that takes one of them takes them all, at equal weights (arXiv 2410.07524, virtual groups).

`Upcycling` writes any slice of any target tensor from a whole dense tensor; `fill` does so for what of a model is on this rank. It
reads each dense tensor that it needs once, from any `Source`.
"""
# D hidden, F inner width of the dense MLP, E experts, G parts of an MLP

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.checkpoint.state import model_state
from megatron_moe.config.run import RunConfig
from megatron_moe.config.upcycling import branch_factors, router_std
from megatron_moe.conversion.source import Source
from megatron_moe.model.init import draw
from megatron_moe.model.plain import build_plain
from megatron_moe.utils.dtensor import local_part
from megatron_moe.utils.random import named_generator

Slices = tuple[slice, ...]
_OF_MLP = {"w1": "fc1.weight", "w_gate": "fc_gate.weight", "w2": "fc2.weight", "b1": "fc1.bias", "b_gate": "fc_gate.bias", "b2": "fc2.bias"}
_STACK = re.compile(rf"(.*\.)moe\.experts\.({'|'.join(_OF_MLP)})")
_SHARED = re.compile(r"(.*\.)shared_expert\.((?:fc1|fc_gate|fc2)\.(?:weight|bias))")
_NEW = re.compile(r".*\.(moe\.gate\.weight|moe\.gate\.expert_bias|coefficient\.weight|coefficient\.bias|shared_expert_gate\.weight)")


def dense_name(name: str) -> str | None:
    """The dense tensor that a target tensor is made of; None: of nothing. Names without `model.`."""
    if match := _STACK.fullmatch(name):
        return f"{match[1]}mlp.{_OF_MLP[match[2]]}"
    if match := _SHARED.fullmatch(name):
        return f"{match[1]}mlp.{match[2]}"
    return None if _NEW.fullmatch(name) else name


def fit_problems(run: RunConfig, vocab_size: int, source: Source) -> list[str]:
    """Every tensor of the dense model is used, every one of the target has its origin, and the shapes are those of these flags."""
    target = {name.removeprefix("model.") for name in model_state(build_plain(run, vocab_size))}
    dense = {name.removeprefix("model."): list(t.shape) for name, t in model_state(build_plain(run.dense(), vocab_size)).items()}
    stored = {n.removeprefix("model."): e["shape"] for n, e in source.tensors.items() if n.startswith("model.")}
    used = {dense_name(name): name for name in target}
    lines = [f"missing  {name}: not in {source.path}, and {used[name]} is made of it" for name in used if name and name not in stored]
    lines += [f"unused   {name}: in {source.path}, and nothing is made of it" for name in stored if name not in used]
    lines += [
        f"shape    {name}: {shape} in {source.path}, {dense[name]} expected"
        for name, shape in stored.items()
        if shape != dense.get(name, shape)
    ]
    return lines


@dataclass(frozen=True)
class Layer:
    """What decides the experts of one layer."""

    num_experts: int
    w2_factor: float
    b2_factor: float
    branch_factor: float  # of the MLP beside the experts


class Upcycling:
    """Target tensors by name (without `model.`). `run` is that of the target; numbers that are drawn depend on its seed and on names."""

    def __init__(self, run: RunConfig):
        self.run, self.config = run, run.upcycling
        counts = enumerate(run.moe.experts_per_layer(run.model.num_layers), start=1)
        self.layers = {i: Layer(n, *branch_factors(run, n)) for i, n in counts if n > 1}

    def write(self, local: Tensor, name: str, shape: torch.Size, where: Slices, dense: Tensor | None) -> None:
        """Into `local`, which is `where` of the target tensor `name` of this shape; `dense`: the whole of `dense_name(name)`."""
        if match := _STACK.fullmatch(name):
            for i, expert in enumerate(range(where[0].start, where[0].stop)):
                _copy(name, local[i], self._expert(name, match[2], expert, dense)[where[1:]])
        else:
            _copy(name, local, self._tensor(name, shape, where, dense))

    def _tensor(self, name: str, shape: torch.Size, where: Slices, dense: Tensor | None) -> Tensor:
        layer = self._layer_of(name)
        if match := _SHARED.fullmatch(name):
            return _shared(match[2], shape, dense)[where]
        if _NEW.fullmatch(name):
            return (self._router(name, shape) if name.endswith("gate.weight") and ".moe." in name else torch.zeros(shape))[where]
        if layer is not None and re.search(r"\.mlp\.fc2\.(weight|bias)$", name):
            dense = dense * layer.branch_factor
        return dense[where]

    def _layer_of(self, name: str) -> Layer | None:
        match = re.match(r"layers\.(\d+)\.", name)
        return self.layers.get(int(match[1])) if match else None

    def _router(self, name: str, shape: torch.Size) -> Tensor:
        """[E, D], drawn as for a new model; the parts of an MLP share a row."""
        std, parts = router_std(self.run), self.config.moe_upcycling_granularity
        rows = draw(name, name, (shape[0] // parts, shape[1]), self.run.training.seed, std)
        return rows.repeat_interleave(parts, dim=0)

    def _expert(self, name: str, stack: str, expert: int, dense: Tensor) -> Tensor:
        """One expert of a stack, whole."""
        layer = self._layer_of(name)
        whole = dense.t() if dense.dim() == 2 else dense
        piece = self._piece(stack, whole, expert)
        if stack != "b2" and self.config.moe_upcycling_drop_ratio:
            piece = self._drawn_anew(name, stack, piece, whole, expert)
        if stack[0] == "w" and self.config.moe_upcycling_noise_std:
            piece = piece + self._normal(f"{name}/noise/{expert}", piece) * self.config.moe_upcycling_noise_std
        factor = {"w2": layer.w2_factor, "b2": layer.b2_factor}.get(stack, 1.0)
        return piece if factor == 1.0 else piece * factor

    def _piece(self, stack: str, whole: Tensor, expert: int) -> Tensor:
        """The neurons of this expert: all of them, or one of G parts. The output bias is in every part."""
        parts = self.config.moe_upcycling_granularity
        if parts == 1 or stack == "b2":
            return whole
        return whole.chunk(parts, dim=_neuron_dim(stack))[expert % parts]

    def _drawn_anew(self, name: str, stack: str, piece: Tensor, whole: Tensor, expert: int) -> Tensor:
        """Drop-upcycling, section 3: the same neurons in all matrices of an expert; their biases start at zero."""
        dim, piece = _neuron_dim(stack), piece.clone()
        width, prefix = piece.shape[dim], name.rpartition(".")[0]
        order = torch.randperm(width, generator=named_generator(self.run.training.seed, f"{prefix}/drop/{expert}"))
        chosen = order[: round(width * self.config.moe_upcycling_drop_ratio)]
        new = torch.zeros_like(piece)
        if stack[0] == "w":
            new = self._normal(f"{name}/drop/{expert}", piece) * whole.std() + whole.mean()
        return piece.index_copy_(dim, chosen, new.index_select(dim, chosen))

    def _normal(self, key: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=named_generator(self.run.training.seed, key)).to(like.dtype)


def _widened(dense: Tensor) -> Tensor:
    """At least float32: factors, noise and what is drawn anew are rounded once, when they are copied to where they stay."""
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


def _copy(name: str, local: Tensor, part: Tensor) -> None:
    """copy_ alone would broadcast."""
    if part.shape != local.shape:
        raise CheckpointError(f"{name}: {list(part.shape)} of the dense model, {list(local.shape)} here")
    local.copy_(part)


def _neuron_dim(stack: str) -> int:
    """Of one expert: where its inner neurons are."""
    return 1 if stack in ("w1", "w_gate") else 0


def _shared(of: str, shape: torch.Size, dense: Tensor) -> Tensor:
    """A shared expert of any width sees what the dense MLP's first neurons see (from the first again where it is wider); its output
    starts at zero, since the routed experts are the whole MLP."""
    if of.startswith("fc2"):
        return torch.zeros(shape)
    return dense[torch.arange(shape[0]) % dense.shape[0]]


@torch.no_grad()
def fill(model: nn.Module, source: Source, run: RunConfig, on_bytes: Callable[[int], Any] = lambda _: None) -> int:
    """Every parameter and buffer of what is here of the target model, sharded or not; returns how many. Not collective.

    One dense tensor after the other: memory is the largest of them, and one whole expert, beside what is filled.
    """
    upcycling, targets = Upcycling(run), {n.removeprefix("model."): t for n, t in model_state(model).items()}
    by_origin: dict[str | None, list[str]] = {}
    for name in targets:
        by_origin.setdefault(dense_name(name), []).append(name)
    written: list[str] = []

    def write(names: Iterable[str], dense: Tensor | None) -> None:
        for name in names:
            local, where = local_part(targets[name])
            if local.numel():
                upcycling.write(local, name, targets[name].shape, where, dense)
            written.append(name)

    write(by_origin.pop(None, ()), None)
    origins = [f"model.{name}" for name in by_origin]
    for name, dense in source.read(origins):
        names = by_origin[name.removeprefix("model.")]
        write(names, dense if names == [name.removeprefix("model.")] else _widened(dense))
        on_bytes(dense.numel() * dense.element_size())
    assert sorted(written) == sorted(targets), f"{len(written)} of {len(targets)} tensors written"
    return len(written)
