"""Where a tensor of ours lies in a transformers checkpoint: the name maps, one per family, and what turns a name into places.

model.layers.3.attn.q_proj.weight -> model.layers.2.self_attn.q_proj.weight              the same matrix
model.layers.3.attn.q_proj.weight -> transformer.h.2.attn.c_attn.weight                  GPT-2: the first third, turned
model.layers.3.moe.experts.w1     -> model.layers.2.mlp.experts.{0..E-1}.up_proj.weight  a stack: E matrices, each turned
model.layers.3.moe.experts.w1     -> model.layers.2.mlp.experts.gate_up_proj             fused: the second half of one stack, turned
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_moe.conversion.source import Tensors


@dataclass(frozen=True)
class Place:
    """A tensor of theirs, or part `which` of `parts` equal ones along `dim`; is_turned: its last two dims are swapped here."""

    name: str
    is_turned: bool = False
    dim: int = 0
    which: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Places:
    """All of one tensor of ours. `is_stack`: one place per expert, dim 0 here. `vocab`: rows of theirs, when ours has padding beyond."""

    of: tuple[Place, ...]
    is_stack: bool = False
    vocab: int | None = None


@dataclass(frozen=True)
class Names:
    """The map of one family. Keys are module paths here; in a layer without `layers.N.`. Values: module paths there.

    `whole` names single tensors of a layer; `experts` names the matrix of one expert by our stack, `fused` the stack of all:
    (name, which, parts). `thirds` are modules that are one there. `is_conv1d`: matrices are [in, out] there.
    """

    top: Mapping[str, str]
    layer: str  # "model.layers.{}."
    modules: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    thirds: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    is_conv1d: bool = False
    ignored: tuple[str, ...] = ()  # patterns of what a checkpoint may hold and no forward needs

    def places(self, ours: str, entry: dict, vocab: int, is_fused: bool = False) -> Places | None:
        """`ours` without `model.`; entry: its shape here. None for a tensor that has no place there."""
        if (match := re.fullmatch(r"layers\.(\d+)\.(.+)", ours)) is None:
            module, _, leaf = ours.rpartition(".")
            if module not in self.top:
                return None
            return Places((Place(f"{self.top[module]}.{leaf}"),), vocab=vocab if module in ("embedding", "head") else None)
        layer, rest = self.layer.format(int(match[1]) - 1), match[2]
        if rest in self.whole:
            return Places((Place(layer + self.whole[rest]),))
        if (stack := re.fullmatch(r"moe\.experts\.(\w+)", rest)) is not None:
            return self._stack(layer, stack[1], entry["shape"][0], is_fused)
        module, _, leaf = rest.rpartition(".")
        is_turned = self.is_conv1d and len(entry["shape"]) == 2
        if module in self.thirds:
            name, which = self.thirds[module]
            return Places((Place(f"{layer}{name}.{leaf}", is_turned, -1, which, 3),))
        if module not in self.modules:
            return None
        return Places((Place(f"{layer}{self.modules[module]}.{leaf}", is_turned),))

    def _stack(self, layer: str, key: str, experts: int, is_fused: bool) -> Places | None:
        if is_fused and key in self.fused:
            name, which, parts = self.fused[key]
            return Places((Place(layer + name, True, -2, which, parts),))
        if key not in self.experts:
            return None
        return Places(tuple(Place(layer + self.experts[key].format(e), True) for e in range(experts)), is_stack=True)


@dataclass(frozen=True)
class OwnNames(Names):
    """Of the modelling file that we write ourselves (standalone/): our names and stacks, the head where transformers has it."""

    def places(self, ours: str, entry: dict, vocab: int, is_fused: bool = False) -> Places | None:
        if ours == "head.weight":
            return Places((Place("lm_head.weight"),), vocab=vocab)
        return Places((Place(f"model.{ours}"),), vocab=vocab if ours == "embedding.weight" else None)


def theirs_shape(place: Place, places: Places, shape: list[int]) -> list[int]:
    """Of the whole tensor there, where ours is `shape`."""
    shape = list(shape[1:]) if places.is_stack else list(shape)
    if places.vocab is not None:
        shape[0] = places.vocab
    if place.is_turned:
        shape[-2:] = reversed(shape[-2:])
    shape[place.dim] *= place.parts
    return shape


def coverage_problems(map_: Mapping[str, Places]) -> list[str]:
    """Every tensor there is taken exactly once, in whole or in all its parts."""
    taken: dict[str, list[tuple[int, int]]] = {}
    for places in map_.values():
        for place in places.of:
            taken.setdefault(place.name, []).append((place.which, place.parts))
    return [
        f"{name}: parts {sorted(p)} of it are taken" for name, p in taken.items() if sorted(p) != [(i, p[0][1]) for i in range(p[0][1])]
    ]


def theirs_of(map_: Mapping[str, Places], ours: Tensors) -> Tensors:
    """Names, shapes and types of all tensors there, in the order of ours."""
    return {
        place.name: {"shape": theirs_shape(place, places, ours[name]["shape"]), "dtype": ours[name]["dtype"]}
        for name, places in map_.items()
        for place in places.of
    }


# ---------------------------------------------------------------- families

_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
}  # fmt: skip
_MLP = {"mlp.fc_gate": "mlp.gate_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
_ROTARY = (r"(.*\.)?rotary_emb\.inv_freq",)

DENSE = Names(_TOP, "model.layers.{}.", _NORMS | _ATTENTION | _MLP, ignored=_ROTARY)


def _shared(name: str) -> dict[str, str]:
    return {f"shared_expert.{ours.removeprefix('mlp.')}": theirs.replace("mlp", f"mlp.{name}") for ours, theirs in _MLP.items()}


_EXPERTS = {key: f"mlp.experts.{{}}.{name}_proj.weight" for key, name in (("w_gate", "gate"), ("w1", "up"), ("w2", "down"))}
_FUSED = {"w_gate": ("mlp.experts.gate_up_proj", 0, 2), "w1": ("mlp.experts.gate_up_proj", 1, 2), "w2": ("mlp.experts.down_proj", 0, 1)}
QWEN_MOE = Names(
    _TOP, "model.layers.{}.",
    _NORMS | _ATTENTION | _MLP | {"moe.gate": "mlp.gate", "shared_expert_gate": "mlp.shared_expert_gate"} | _shared("shared_expert"),
    _EXPERTS, _FUSED, ignored=_ROTARY,
)  # fmt: skip
_LATENT = {
    "attn.q_proj": "self_attn.q_proj", "attn.q_down_proj": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.q_up_proj": "self_attn.q_b_proj", "attn.kv_down_proj": "self_attn.kv_a_proj_with_mqa", "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.kv_up_proj": "self_attn.kv_b_proj", "attn.out_proj": "self_attn.o_proj",
}  # fmt: skip
DEEPSEEK = Names(
    _TOP, "model.layers.{}.", _NORMS | _LATENT | _MLP | {"moe.gate": "mlp.gate"} | _shared("shared_experts"), _EXPERTS, _FUSED,
    {"moe.gate.expert_bias": "mlp.gate.e_score_correction_bias"}, ignored=_ROTARY,
)  # fmt: skip
MIXTRAL = Names(
    _TOP, "model.layers.{}.", _NORMS | _ATTENTION | {"moe.gate": "block_sparse_moe.gate"},
    {key: f"block_sparse_moe.experts.{{}}.{name}.weight" for key, name in (("w_gate", "w1"), ("w1", "w3"), ("w2", "w2"))}, ignored=_ROTARY,
)  # fmt: skip
GPT2 = Names(
    {"embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    "transformer.h.{}.",
    {"attn_norm": "ln_1", "mlp_norm": "ln_2", "attn.out_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    thirds={f"attn.{x}_proj": ("attn.c_attn", i) for i, x in enumerate("qkv")}, is_conv1d=True,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)  # fmt: skip
STANDALONE = OwnNames({}, "model.layers.{}.", {})
