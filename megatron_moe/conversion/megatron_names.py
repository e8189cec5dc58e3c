"""Megatron-DeepSpeed's names of a GPT's tensors, and how its tensor-parallel ranks cut them.

    ours                                       theirs                                                           cut along
    layers.3.attn.{q,k,v}_proj.weight          encoder.layers.2.self_attention.query_key_value.weight           0, by heads
    layers.3.attn.out_proj.weight              encoder.layers.2.self_attention.dense.weight                     1
    layers.3.mlp.{fc_gate,fc1}.weight          encoder.layers.2.mlp.dense_h_to_4h.weight                        0
    layers.4.moe.gate.weight                   encoder.layers.3.mlp.deepspeed_moe.gate.wg.weight                -
    layers.4.moe.experts.w1   [E, D, F]        ...deepspeed_moe.experts.deepspeed_experts.<e>.dense_h_to_4h.weight   [F, D] each
    layers.4.mlp.fc1.weight (residual branch)  encoder.layers.3.mlp.mlp.dense_h_to_4h.weight

Layers count from 0 there. A rank's query_key_value has, for each of its key/value heads, the queries of that group, the key, the
value, one head after the other (checkpoint version 2 and later). With SwiGLU a rank's dense_h_to_4h is its part of the gate over its
part of the value. Example with 4 heads on 2 ranks: rank 1 has q2 k2 v2 q3 k3 v3.
"""
# T tensor-parallel ranks, H query heads, G key/value heads, h head width, E experts, D hidden, F inner width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_moe.config.run import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts"


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs, and those of ours that it is made of.

    `theirs` has a place {} for the number of the expert where `layer` is given. cut: the dim along which tensor-parallel ranks share it;
    None: every rank has all of it.
    """

    theirs: str
    ours: tuple[str, ...]
    cut: int | None = None
    kind: str = "plain"  # qkv, gated, vocab
    layer: int | None = None  # of the experts: from 1
    number: int | None = None  # of the experts: of their layer among the MoE layers, from 0
    num_experts: int = 1

    @property
    def is_turned(self) -> bool:
        """Whether an expert's matrix is [in, out] here; there it is [out, in]."""
        return self.layer is not None and self.theirs.endswith(".weight")


def entries(run: RunConfig, cuts_experts: bool) -> Iterator[Entry]:
    """Of all tensors of the model, in the order of the model. `cuts_experts`: the ranks share experts and residual branches too."""
    m = run.model
    yield Entry("embedding.word_embeddings.weight", ("model.embedding.weight",), 0, "vocab")
    if m.position_embedding_type == "learned_absolute":
        yield Entry("embedding.position_embeddings.weight", ("model.position_embedding.weight",))
    number = 0
    for layer, num_experts in enumerate(run.moe.experts_per_layer(m.num_layers), start=1):
        yield from _layer(run, layer, num_experts, number, cuts_experts)
        number += num_experts > 1
    yield from _norm(run, "model.norm", "encoder.final_layernorm")
    if not m.is_tied:
        yield Entry("output_layer.weight", ("model.head.weight",), 0, "vocab")


def _layer(run: RunConfig, layer: int, num_experts: int, number: int, cuts_experts: bool) -> Iterator[Entry]:
    ours, theirs = f"model.layers.{layer}", f"encoder.layers.{layer - 1}"
    attention, has_bias = f"{theirs}.self_attention", run.model.add_bias_linear
    yield from _norm(run, f"{ours}.attn_norm", f"{theirs}.input_layernorm")
    for leaf in ("weight", "bias") if has_bias else ("weight",):
        yield Entry(f"{attention}.query_key_value.{leaf}", tuple(f"{ours}.attn.{p}_proj.{leaf}" for p in "qkv"), 0, "qkv")
    yield from _linear(f"{ours}.attn.out_proj", f"{attention}.dense", 1, has_bias)
    yield from _norm(run, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
    if num_experts == 1:
        yield from _mlp(run, f"{ours}.mlp", f"{theirs}.mlp", is_cut=True)
        return
    yield Entry(f"{theirs}.mlp.deepspeed_moe.gate.wg.weight", (f"{ours}.moe.gate.weight",))
    for leaf, inner, outer in (("weight", "w1", "w2"), ("bias", "b1", "b2")) if has_bias else (("weight", "w1", "w2"),):
        gate = {"w1": "w_gate", "b1": "b_gate"}[inner]
        is_gated = run.model.activation == "swiglu"
        stacks = (gate, inner) if is_gated else (inner,)
        where = {"layer": layer, "number": number, "num_experts": num_experts}
        yield Entry(
            f"{theirs}.{EXPERTS}.{{}}.dense_h_to_4h.{leaf}", tuple(f"{ours}.moe.experts.{s}" for s in stacks),
            0 if cuts_experts else None, "gated" if is_gated else "plain", **where)  # fmt: skip
        cut = 1 if cuts_experts and leaf == "weight" else None
        yield Entry(f"{theirs}.{EXPERTS}.{{}}.dense_4h_to_h.{leaf}", (f"{ours}.moe.experts.{outer}",), cut, **where)
    if run.moe.residual:
        yield from _mlp(run, f"{ours}.mlp", f"{theirs}.mlp.mlp", is_cut=cuts_experts)
        for leaf in ("weight", "bias"):
            yield Entry(f"{theirs}.mlp.coefficient.{leaf}", (f"{ours}.coefficient.{leaf}",))


def _norm(run: RunConfig, ours: str, theirs: str) -> Iterator[Entry]:
    for leaf in ("weight", "bias") if run.model.normalization == "LayerNorm" else ("weight",):
        yield Entry(f"{theirs}.{leaf}", (f"{ours}.{leaf}",))


def _linear(ours: str, theirs: str, cut: int | None, has_bias: bool) -> Iterator[Entry]:
    """Cut along 1 (row-parallel), the bias is whole on every rank."""
    yield Entry(f"{theirs}.weight", (f"{ours}.weight",), cut)
    if has_bias:
        yield Entry(f"{theirs}.bias", (f"{ours}.bias",), 0 if cut == 0 else None)


def _mlp(run: RunConfig, ours: str, theirs: str, is_cut: bool) -> Iterator[Entry]:
    names, kind = ((f"{ours}.fc_gate", f"{ours}.fc1"), "gated") if run.model.activation == "swiglu" else ((f"{ours}.fc1",), "plain")
    for leaf in ("weight", "bias") if run.model.add_bias_linear else ("weight",):
        yield Entry(f"{theirs}.dense_h_to_4h.{leaf}", tuple(f"{name}.{leaf}" for name in names), 0 if is_cut else None, kind)
    yield from _linear(f"{ours}.fc2", f"{theirs}.dense_4h_to_h", 1 if is_cut else None, run.model.add_bias_linear)


# ---------------------------------------------------------------- ranks' parts <-> whole tensors of ours


@dataclass(frozen=True)
class Heads:
    """What the order within query_key_value depends on. `version`: of the checkpoint; below 2 there are no groups."""

    queries: int
    groups: int
    width: int
    version: float = 3.0


def whole(entry: Entry, heads: Heads, parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts of all ranks (one part, where it is not cut) -> whole tensors of ours, of one expert where there are several.

    ValueError when the sizes do not fit."""
    import torch

    if entry.kind == "qkv":
        ours = [torch.cat(same, 0) for same in zip(*(_apart(part, heads, len(parts)) for part in parts))]
    elif entry.kind == "gated":
        if any(part.shape[0] % 2 for part in parts):
            raise ValueError(f"{parts[0].shape[0]} rows are no gate and value of the same width (SwiGLU)")
        ours = [torch.cat(same, 0) for same in zip(*(part.chunk(2, 0) for part in parts))]
    else:
        ours = [parts[0] if len(parts) == 1 else torch.cat(list(parts), entry.cut)]
    return [t.t() for t in ours] if entry.is_turned else ours


def parts(entry: Entry, heads: Heads, ours: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """The inverse: a part for each of the ranks, one for all of them where it is not cut."""
    import torch

    ours = [t.t() for t in ours] if entry.is_turned else ours
    if entry.cut is None:
        return [_together(entry, heads, ours, 1)]
    pieces = zip(*(torch.tensor_split(t, ranks, entry.cut) for t in ours))
    return [_together(entry, heads, piece, ranks) for piece in pieces]


def _together(entry: Entry, heads: Heads, ours: Sequence[Tensor], ranks: int) -> Tensor:
    import torch

    if entry.kind != "qkv":
        return ours[0] if len(ours) == 1 else torch.cat(list(ours), 0)
    groups, rest = heads.groups // ranks, ours[0].shape[1:]
    by_group = [t.reshape(groups, -1, heads.width, *rest) for t in ours]
    joined = torch.cat(by_group, 1)  # [G/T, H/G + 2, h, ...]
    if heads.version < 1:
        joined = joined.transpose(0, 1)
    elif heads.version < 2:
        joined = joined.transpose(1, 2)
    return joined.reshape(-1, *rest)


def _apart(part: Tensor, heads: Heads, ranks: int) -> list[Tensor]:
    """One rank's query_key_value -> its queries, keys and values, [heads x width, ...] each."""
    rest, groups, each = part.shape[1:], heads.groups // ranks, heads.queries // heads.groups
    if groups * ranks != heads.groups or part.shape[0] != groups * (each + 2) * heads.width:
        raise ValueError(
            f"{part.shape[0]} rows on each of {ranks} rank(s) are not the queries, keys and values of {heads.queries} heads in {heads.groups} "
            f"groups of width {heads.width}"
        )
    if heads.version < 1:
        joined = part.reshape(3, groups, heads.width, *rest).transpose(0, 1)
    elif heads.version < 2:
        joined = part.reshape(groups, heads.width, 3, *rest).transpose(1, 2)
    else:
        joined = part.reshape(groups, each + 2, heads.width, *rest)
    return [t.reshape(-1, *rest) for t in joined.split([each, 1, 1], 1)]


def fit_rows(table: Tensor, rows: int) -> Tensor:
    """Of a padded vocabulary: cut, or filled up with copies of the last row, as Megatron's own tools do."""
    import torch

    if table.shape[0] >= rows:
        return table[:rows]
    return torch.cat([table, table[-1:].expand(rows - table.shape[0], *table.shape[1:])])


def mp_ranks_of(expert: int, num_experts: int, expert_parallel: int, tensor_parallel: int) -> list[int]:
    """In whose names DeepSpeed looks for the file of an expert that the ranks do not share, with so many ranks at least.

    World rank w has the tensor-parallel rank w mod T, and in a layer of degree ep the expert-parallel rank w mod ep.
    """
    degree = min(expert_parallel, num_experts)
    owner = expert // (num_experts // degree)
    return sorted({w % tensor_parallel for w in range(owner, owner + degree * tensor_parallel, degree)})
