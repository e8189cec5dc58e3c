"""Synthetic checkpoints of Megatron-DeepSpeed, built from the description of their layout with loops of their own."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Plan:
    """A model and a layout. `experts`: per layer."""

    experts: tuple[int, ...] = (1, 4, 1, 8)
    num_experts: tuple[int, ...] = (4, 8)
    interval: int = 2
    hidden: int = 16
    heads: int = 4
    groups: int = 4
    width: int = 24
    words: int = 50
    rows: int = 64
    multiple: int = 64
    is_gated: bool = False
    is_tied: bool = True
    is_rotary: bool = False
    has_bias: bool = True
    norm: str = "layernorm"
    residual: bool = True
    tp: int = 1
    ep: int = 2
    etp: bool = False
    dtype: torch.dtype = torch.float32
    topk: int = 1
    version: float | None = 3.0
    gate_dtype: torch.dtype | None = None  # DeepSpeed kept it in float32 for a while
    prefix: str = "language_model.encoder."
    one_copy: bool = False  # of an expert that several ranks would look for
    tag: str = "global_step30"
    without: tuple[str, ...] = ()  # arguments that are not there
    holder: type = argparse.Namespace
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def head(self) -> int:
        return self.hidden // self.heads


def our_weights(plan: Plan) -> dict[str, Tensor]:
    """By our names, as a native checkpoint has them."""
    torch.manual_seed(3)
    D, F, out = plan.hidden, plan.width, {}

    def put(name: str, *shape: int) -> None:
        out[f"model.{name}"] = (torch.randn(shape) / 3).to(plan.dtype)

    def linear(name: str, rows: int, columns: int, bias: bool = plan.has_bias) -> None:
        put(f"{name}.weight", rows, columns)
        if bias:
            put(f"{name}.bias", rows)

    def norm(name: str) -> None:
        put(f"{name}.weight", D)
        if plan.norm == "layernorm":
            put(f"{name}.bias", D)

    put("embedding.weight", plan.rows, D)
    if not plan.is_rotary:
        put("position_embedding.weight", 16, D)
    for i, count in enumerate(plan.experts, start=1):
        here = f"layers.{i}"
        norm(f"{here}.attn_norm")
        for p, heads in (("q", plan.heads), ("k", plan.groups), ("v", plan.groups)):
            linear(f"{here}.attn.{p}_proj", heads * plan.head, D)
        linear(f"{here}.attn.out_proj", D, D)
        norm(f"{here}.mlp_norm")
        if count == 1 or plan.residual:
            linear(f"{here}.mlp.fc1", F, D)
            if plan.is_gated:
                linear(f"{here}.mlp.fc_gate", F, D)
            linear(f"{here}.mlp.fc2", D, F)
        if count == 1:
            continue
        put(f"{here}.moe.gate.weight", count, D)
        if plan.gate_dtype:
            out[f"model.{here}.moe.gate.weight"] = torch.randn(count, D).to(plan.gate_dtype)
        for stack, shape in (("w1", (D, F)), ("w2", (F, D)), *([("w_gate", (D, F))] if plan.is_gated else [])):
            put(f"{here}.moe.experts.{stack}", count, *shape)
        if plan.has_bias:
            for stack, size in (("b1", F), ("b2", D), *([("b_gate", F)] if plan.is_gated else [])):
                put(f"{here}.moe.experts.{stack}", count, size)
        if plan.residual:
            linear(f"{here}.coefficient", 2, D, bias=True)
    norm("norm")
    if not plan.is_tied:
        put("head.weight", plan.rows, D)
    return out


def rows_of_rank(t: Tensor, rank: int, ranks: int) -> Tensor:
    each = t.shape[0] // ranks
    return t[rank * each : (rank + 1) * each]


def heads_of_rank(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rank: int) -> Tensor:
    """Group by group: its queries, its key, its value."""
    each, h, pieces = plan.heads // plan.groups, plan.head, []
    for g in range(rank * plan.groups // plan.tp, (rank + 1) * plan.groups // plan.tp):
        pieces += [q[g * each * h : (g + 1) * each * h], k[g * h : (g + 1) * h], v[g * h : (g + 1) * h]]
    return torch.cat(pieces)


def mlp_of_rank(plan: Plan, get, rank: int, ranks: int) -> dict[str, Tensor]:
    """get(name of fc1, fc_gate, fc2 with .weight or .bias) -> [out, in] or [out]."""
    out = {}
    for leaf in ("weight", "bias") if plan.has_bias else ("weight",):
        first = rows_of_rank(get(f"fc1.{leaf}"), rank, ranks)
        if plan.is_gated:
            first = torch.cat([rows_of_rank(get(f"fc_gate.{leaf}"), rank, ranks), first])
        out[f"dense_h_to_4h.{leaf}"] = first
    out["dense_4h_to_h.weight"] = rows_of_rank(get("fc2.weight").t(), rank, ranks).t()
    if plan.has_bias:
        out["dense_4h_to_h.bias"] = get("fc2.bias")
    return out


def module_of_rank(plan: Plan, w: dict[str, Tensor], rank: int) -> dict[str, Any]:
    at, encoder = lambda name: w[f"model.{name}"], {}
    leaves = ("weight", "bias") if plan.has_bias else ("weight",)
    norm_leaves = ("weight", "bias") if plan.norm == "layernorm" else ("weight",)
    for i, count in enumerate(plan.experts, start=1):
        ours, theirs = f"layers.{i}", f"layers.{i - 1}"
        for leaf in norm_leaves:
            encoder[f"{theirs}.input_layernorm.{leaf}"] = at(f"{ours}.attn_norm.{leaf}")
        for leaf in leaves:
            encoder[f"{theirs}.self_attention.query_key_value.{leaf}"] = heads_of_rank(
                plan, *(at(f"{ours}.attn.{p}_proj.{leaf}") for p in "qkv"), rank
            )
        encoder[f"{theirs}.self_attention.dense.weight"] = rows_of_rank(at(f"{ours}.attn.out_proj.weight").t(), rank, plan.tp).t()
        if plan.has_bias:
            encoder[f"{theirs}.self_attention.dense.bias"] = at(f"{ours}.attn.out_proj.bias")
        for leaf in norm_leaves:
            encoder[f"{theirs}.post_attention_layernorm.{leaf}"] = at(f"{ours}.mlp_norm.{leaf}")
        dense = lambda name, ours=ours: at(f"{ours}.mlp.{name}")  # noqa: E731
        if count == 1:
            encoder |= {f"{theirs}.mlp.{name}": t for name, t in mlp_of_rank(plan, dense, rank, plan.tp).items()}
            continue
        encoder[f"{theirs}.mlp.deepspeed_moe.gate.wg.weight"] = at(f"{ours}.moe.gate.weight")
        if plan.residual:
            share = (rank, plan.tp) if plan.etp else (0, 1)
            encoder |= {f"{theirs}.mlp.mlp.{name}": t for name, t in mlp_of_rank(plan, dense, *share).items()}
            encoder |= {f"{theirs}.mlp.coefficient.{leaf}": at(f"{ours}.coefficient.{leaf}") for leaf in ("weight", "bias")}
    encoder |= {f"final_layernorm.{leaf}": at(f"norm.{leaf}") for leaf in norm_leaves}
    embedding = {"word_embeddings": {"weight": rows_of_rank(at("embedding.weight"), rank, plan.tp)}}
    if not plan.is_rotary:
        embedding["position_embeddings"] = {"weight": at("position_embedding.weight")}
    model = {"embedding": embedding, "encoder": {name: t.clone().contiguous() for name, t in encoder.items()}}
    if not plan.is_tied:
        model["output_layer"] = {"weight": rows_of_rank(at("head.weight"), rank, plan.tp).clone()}
    return {"language_model": model}


def expert_files(plan: Plan, w: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    files = {}
    for number, layer in enumerate(i for i, count in enumerate(plan.experts, start=1) if count > 1):
        count = plan.experts[layer - 1]
        degree = min(plan.ep, count)
        for e in range(count):
            ours = {"fc1": "1", "fc_gate": "_gate", "fc2": "2"}

            def get(name: str, layer=layer, e=e, ours=ours) -> Tensor:
                which, leaf = name.split(".")
                stack = w[f"model.layers.{layer}.moe.experts.{'w' if leaf == 'weight' else 'b'}{ours[which]}"]
                return stack[e].t() if leaf == "weight" else stack[e]

            owner = e // (count // degree)  # rank in the group of experts; world ranks owner, owner + degree, ... have it
            ranks = (
                range(plan.tp) if plan.etp else [0] if plan.one_copy else sorted({w_ % plan.tp for w_ in range(owner, 64 * degree, degree)})
            )
            for rank in ranks:
                share = (rank, plan.tp) if plan.etp else (0, 1)
                prefix = f"{plan.prefix}layers.{layer - 1}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}."
                content = {prefix + name: t.clone().contiguous() for name, t in mlp_of_rank(plan, get, *share).items()}
                files[f"layer_{number}_expert_{e}_mp_rank_{rank:02d}_model_states.pt"] = content
    return files


def arguments(plan: Plan) -> Any:
    values = {
        "num_layers": len(plan.experts), "hidden_size": plan.hidden, "num_attention_heads": plan.heads, "num_key_value_heads": plan.groups,
        "kv_channels": plan.head, "ffn_hidden_size": plan.width, "max_position_embeddings": 16, "seq_length": 16,
        "num_experts": list(plan.num_experts), "expert_interval": plan.interval, "mlp_type": "residual" if plan.residual else "standard",
        "topk": plan.topk, "moe_expert_parallel_size": plan.ep, "enable_expert_tensor_parallelism": plan.etp,
        "tensor_model_parallel_size": plan.tp, "pipeline_model_parallel_size": 1, "swiglu": plan.is_gated, "squared_relu": False,
        "normalization": plan.norm, "layernorm_epsilon": 1e-5, "add_bias_linear": plan.has_bias, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "use_rotary_position_embeddings": plan.is_rotary, "add_position_embedding": not plan.is_rotary, "rope_theta": 10000,
        "untie_embeddings_and_output_weights": not plan.is_tied, "make_vocab_size_divisible_by": plan.multiple, "vocab_size": plan.words,
        "padded_vocab_size": plan.rows, "fp16": plan.dtype == torch.float16, "bf16": plan.dtype == torch.bfloat16,
        "params_dtype": plan.dtype, "iteration": 30, "consumed_train_samples": 240, "consumed_train_tokens": 3840, "seed": 5,
        "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/nowhere/vocab.json", "merge_file": "/nowhere/merges.txt",
        "moe_train_capacity_factor": 1.25, "moe_loss_coeff": 0.01, "data_path": ["1.0", "a"], "betas": (0.9, 0.95),
    } | plan.args  # fmt: skip
    return plan.holder(**{name: value for name, value in values.items() if name not in plan.without})


def state_of_rank(plan: Plan, rank: int) -> dict[str, Any]:
    """What DeepSpeed and Megatron put beside the weights."""
    generator = random.Random(rank)
    state = dict.fromkeys(("optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "data_sampler"))
    state |= {
        "buffer_names": [], "lr_scheduler": {"max_lr": 1e-3, "num_steps": 240, "start_wd": 0.1}, "random_ltd": None,
        "sparse_tensor_module_names": [], "skipped_steps": 1, "global_steps": 30, "global_samples": 240, "dp_world_size": 2,
        "mp_world_size": plan.tp, "ds_config": {"train_batch_size": 8, "fp16": {"enabled": True}}, "ds_version": "0.10.3",
        "num_experts": [n for n in plan.experts if n > 1], "args": arguments(plan), "iteration": 30, "tokens": 3840,
        "random_rng_state": generator.getstate(), "np_rng_state": np.random.RandomState(rank).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(rank).get_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.arange(16, dtype=torch.uint8) + rank},
        "universal_checkpoint_info": {"version": 0.2, "patterns": ["a", "b"]}, "checkpoint_version": plan.version,
    }  # fmt: skip
    if plan.version is None:
        del state["checkpoint_version"]
    return state


def write_files(directory: Path, plan: Plan, weights: dict[str, Tensor]) -> Path:
    """DIR/global_step30, latest and Megatron's tracker. Returns the tag's directory."""
    tag = directory / plan.tag
    tag.mkdir(parents=True)
    for rank in range(plan.tp):
        torch.save({"module": module_of_rank(plan, weights, rank)} | state_of_rank(plan, rank), tag / f"mp_rank_{rank:02d}_model_states.pt")
    for name, content in expert_files(plan, weights).items():
        torch.save(content, tag / name)
    (directory / "latest").write_text(plan.tag)
    (directory / "latest_checkpointed_iteration.txt").write_text("30")
    return tag


def same(a: Any, b: Any, where: str = "") -> list[str]:
    """Differences of two contents of files, each with the way to it; dicts in the same order."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return [] if a.dtype == b.dtype and np.array_equal(a, b) else [f"{where}: other numbers"]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        is_same = (
            a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        )
        return [] if is_same else [f"{where}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)} or other values"]
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, (argparse.Namespace, SimpleNamespace)):
        return same(vars(a), vars(b), where + " args")
    if isinstance(a, dict):
        if sorted(map(str, a)) != sorted(map(str, b)):
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in same(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b)) for line in same(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]
