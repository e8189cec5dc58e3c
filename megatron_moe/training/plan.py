"""The plan of a run, which --dry-run prints. Nothing is started: one process, no sockets, no memory for weights.

    RunConfig, number of ranks -> look at the files that are here -> problems -> plan (a dict) -> as_json

What a rank holds is counted on the model that it would build: the real recipe, on the meta device, in a process group of ranks
that do not exist. It is done for rank 0, which is always the fullest - where something does not divide, FSDP gives the first
ranks more - and for the last rank, the emptiest.

Keys of the plan, which stay as they are. Unknown is null; --dry-run prints one such object:

    world_size, degrees     tp pp cp dp etp ep (each distinct degree) zero_stage, and
                            replicas of what ZeRO shards where there are several
    precision               what matrices are computed in
    layers                  one per layer: layer (from 1), experts (1: dense), experts_per_rank, expert_parallel,
                            expert_data_parallel, dispatcher (null: dense), mlp (dense, standard or residual), width (of an
                            expert, or of the dense MLP); latent_width and shared_expert_width where there are such
    dispatch_reasons        why a dispatcher that was not asked for by name was taken: a line for each distinct case
    pipeline                null without one: schedule, micro_batches (of the last size of a step), idle (share of a step, all stages
                            taken as equal; an upper bound for zero-bubble), stages: stage, pipeline_rank, layers, parts (embedding,
                            positions, tied_logits, embedding_of_mtp, norm, head, mtp), moe_layers (how many), parameters, flops_per_token
    vocabulary              size, padded, and whether it is known
    parameters              total, active (per token), by_part, active_by_part
    per_rank                fullest and emptiest: rank, dense_parameters, expert_parameters, bytes (parameters, gradients,
                            whole_gradients, optimizer, gathered: see parallel/footprint.py);
                            on_host: which of these live on the host, where there is an accelerator (--cpu-optimizer)
    loss                    columns (of the vocabulary on a rank), columns_at_a_time (whose logits are there together), logits_bytes
    teacher                 of distillation, null without: layers (their experts), parameters (total, active), flops_per_token (forward
                            alone), stop_iters, stop_tokens, per_rank: fullest and emptiest: rank, dense_parameters,
                            expert_parameters, bytes (parameters, gathered). It comes on top of per_rank
    upcycling               of a dense model, null without: dense (its directory), parts (experts that an MLP is cut into), router_std
                            (spread of the new routers), inexact_because (why the first logits are not the dense ones; empty: they are)
    groups                  tp dp pp cp etp: number, size, stride, ranks; ep and edp the same for each degree. With hybrid
                            sharding shard and replicate, and for each degree expert_shard and expert_replicate. Above 128 ranks
                            `ranks` has the first and the last group only; the others follow by stride
    batch                   micro_batch_size, global_batch_size, micro_batches_per_step (of a rank), tokens_per_step; sizes: from_step,
                            sequences, length of each phase of a ramp-up or curriculum, the last of them without an end
    length                  iterations, samples, tokens, decided_by (the flag)
    learning_rate           max, min, style, unit, warmup, decay (in the unit), warmup_iterations, decay_iterations
    data                    mock, sources (prefix, weight, tokens, samples, epochs), train_tokens, epochs
    flops                   per_token, per_step, whole_run: forward and backward, nothing counted twice
    settings                everything that is not at its default; also a valid file for --config
    defaults                flag, value, note: what matters and was left out
    missing_paths           files that the command names and that are not here
    not_built_yet           why this cannot be trained yet: features
    before_training         why this cannot be trained yet: settings
    checks                  what guards the run: replicas_interval, timeout_minutes (of a collective), and verify_parallelism: what
                            --verify-parallelism --exit-after-verify would train in one process (processes, folded, changed,
                            not_compared of each layout)
    warnings                what is allowed but has no effect, or is probably not meant
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe.checkpoint.preflight import dense_problems, load_problems, teacher_problems
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.pipeline import stages_of_rank
from megatron_moe.config.presets import GPT2_VOCAB_SIZE
from megatron_moe.config.run import GROUPS, RunConfig
from megatron_moe.config.training import DECAY_LENGTHS, RUN_LENGTHS, WARMUP_LENGTHS
from megatron_moe.config.upcycling import inexact_because, router_std
from megatron_moe.data.loader import data_problems, prefixes_of, training_sizes
from megatron_moe.model.flops import ParameterCounts, flops_per_token, parameter_counts
from megatron_moe.model.loss import columns_at_a_time
from megatron_moe.moe.dispatch.choose import Choice
from megatron_moe.mpu.groups import Groups, dense_groups, expert_groups, expert_tensor_groups, hybrid_groups
from megatron_moe.optimizer.schedule import build_schedule
from megatron_moe.parallel.apply import build_parallel_mesh, build_sharded_model
from megatron_moe.parallel.expert import choice_of
from megatron_moe.parallel.footprint import Footprint, footprint
from megatron_moe.tokenizers import Tokenizer, build_tokenizer
from megatron_moe.training.preflight import schedule_problems, start_problems, tokenizer_problems, vocab_size_of
from megatron_moe.training.stages import idle_of, schedule_name, stages_of
from megatron_moe.training.verify.shrink import fold
from megatron_moe.utils.compat import fake_process_group

LISTED_RANKS = 128


def build_plan(
    run: RunConfig,
    world_size: int,
    given: Collection[str],
    missing: Iterable[str] = (),
    not_yet: Iterable[str] = (),
    warnings: Iterable[str] = (),
) -> dict[str, Any]:
    """The plan for `world_size` ranks; raises ConfigError with all problems. `given`: names of the settings that were set.

    The other arguments are what the command line says beyond the run, and are passed on.
    """
    here = look_here(run)
    problems = list(plan_problems(run, world_size, here))
    if problems:
        raise ConfigError(problems)
    total, active = _by_part(parameter_counts(run.model, run.moe, here.vocab_size))
    return {
        "world_size": world_size,
        "degrees": _degrees(run, world_size),
        "precision": _precision(run),
        "layers": list(_layers(run, world_size)),
        "dispatch_reasons": _dispatch_reasons(run, world_size),
        "pipeline": _pipeline(run, world_size, here.vocab_size),
        "vocabulary": {
            "size": here.vocab_size, "padded": run.model.padded_vocab_size(here.vocab_size), "is_known": here.vocabulary_is_known,
        },
        "parameters": {"total": sum(total.values()), "active": sum(active.values()), "by_part": total, "active_by_part": active},
        "per_rank": _per_rank(run, world_size, here.vocab_size),
        "loss": _loss(run, here.vocab_size),
        "teacher": _teacher(run, world_size, here.vocab_size) if run.distillation.is_on else None,
        "upcycling": _upcycling(run) if run.upcycling.moe_use_upcycling else None,
        "groups": _groups(run, world_size),
        "batch": _batch(run, world_size),
        "length": _length(run, world_size),
        "learning_rate": _learning_rate(run, world_size),
        "data": _data(run, world_size, here),
        "flops": _flops(run, world_size, here.vocab_size),
        "settings": _settings(run),
        "defaults": list(_defaults(run, world_size, frozenset(given), here)),
        "missing_paths": [*missing, *here.missing],
        "not_built_yet": list(not_yet),
        "before_training": list(run.train_problems()),
        "checks": _checks(run, world_size),
        "warnings": [*warnings, *run.world_warnings(world_size)],
    }  # fmt: skip


# ---------------------------------------------------------------- what can be seen from here


@dataclass(frozen=True)
class Here:
    """What the files of this machine say about a run that may be meant for another."""

    missing: list[str]
    problems: list[str]
    tokenizer: Tokenizer | None
    vocab_size: int
    vocabulary_is_known: bool


def look_here(run: RunConfig) -> Here:
    words = run.tokenizer
    files = [f for f in (words.vocab_file, words.merge_file, words.tokenizer_model) if f]
    absent = [f for f in files if not os.path.isfile(f)]
    tokenizer, problems = None, []
    if words.kind and not absent and (words.kind != "NullTokenizer" or run.model.vocab_size):
        try:
            tokenizer = build_tokenizer(words, run.model.vocab_size)
        except ValueError as error:
            problems.append(str(error))
    is_known = bool(run.model.vocab_size or tokenizer or (run.data.mock_data and not words.kind))
    return Here(
        missing=[*absent, *_absent_data(run), *_absent_checkpoint(run)],
        problems=problems,
        tokenizer=tokenizer,
        vocab_size=vocab_size_of(run, tokenizer) if is_known else GPT2_VOCAB_SIZE,
        vocabulary_is_known=is_known,
    )


def _absent_data(run: RunConfig) -> list[str]:
    return [p for p in prefixes_of(run.data) if not all(os.path.isfile(p + suffix) for suffix in (".bin", ".idx"))]


def _absent_checkpoint(run: RunConfig) -> list[str]:
    given = (run.checkpoint.load, run.distillation.load_teacher if run.distillation.is_on else None)
    return list(dict.fromkeys(directory for directory in given if directory and not os.path.isdir(directory)))


def plan_problems(run: RunConfig, world_size: int, here: Here) -> Iterator[str]:
    """What would stop this run on `world_size` ranks, as far as the files here can tell. Nothing is written, --save is not tried."""
    world_problems = list(run.world_problems(world_size))
    yield from (f"{p} (--dry-run-world-size plans for another number)" for p in world_problems)
    yield from here.problems
    yield from tokenizer_problems(run, here.tokenizer)
    # Not knowing the vocabulary is no reason to refuse data or checkpoint for theirs.
    vocab_size = here.vocab_size if here.vocabulary_is_known else 1 << 31
    fingerprint = here.tokenizer.fingerprint if here.tokenizer else None
    yield from data_problems(run.data, run.training.seq_length, vocab_size, fingerprint, unseen=here.missing)
    load, teacher, absent = run.checkpoint.load, run.distillation.load_teacher, _absent_checkpoint(run)
    if load and load not in absent and here.vocabulary_is_known:
        if run.upcycling.moe_use_upcycling:
            yield from dense_problems(run, run.dense().architecture(here.vocab_size), fingerprint)
        else:
            yield from load_problems(run, run.architecture(here.vocab_size))
    yield from start_problems(run, here.vocab_size, verify="off")
    if run.distillation.is_on and teacher and teacher not in absent and here.vocabulary_is_known:
        yield from teacher_problems(run, run.teacher().architecture(here.vocab_size), fingerprint)
    if world_size % run.parallel.model_parallel_size:
        return
    if run.train_ends(world_size):
        yield from schedule_problems(run, world_size)
    if world_problems:
        return
    try:
        _groups(run, world_size)
    except ValueError as error:
        yield str(error)


# ---------------------------------------------------------------- model


def _degrees(run: RunConfig, world_size: int) -> dict[str, Any]:
    p = run.parallel
    return {
        "tp": p.tensor_model_parallel_size, "pp": p.pipeline_model_parallel_size, "cp": p.context_parallel_size,
        "dp": run.data_parallel_size(world_size), "etp": p.etp, "ep": run.expert_degrees(),
        "zero_stage": p.zero_stage,
    } | ({"replicas": p.num_distributed_optimizer_instances} if p.num_distributed_optimizer_instances > 1 else {})  # fmt: skip


def _precision(run: RunConfig) -> str:
    return run.training.half or run.training.params_dtype


def _layers(run: RunConfig, world_size: int) -> Iterator[dict[str, Any]]:
    stage, etp = world_size // run.parallel.pipeline_model_parallel_size, run.parallel.etp
    for layer, experts in enumerate(run.experts_of_blocks(), start=1):
        ep = run.moe.expert_parallel_degree(experts) if experts > 1 else 1
        beside = {"latent_width": run.moe.moe_latent_size, "shared_expert_width": run.moe.moe_shared_expert_intermediate_size}
        yield {
            "layer": layer, "experts": experts, "experts_per_rank": experts // ep, "expert_parallel": ep,
            "expert_data_parallel": stage // (ep * etp) if experts > 1 else None,
            "dispatcher": _dispatcher(run, world_size, experts).name if experts > 1 else None,
            "mlp": run.moe.mlp_type if experts > 1 else "dense",
            "width": run.moe.expert_ffn_size(run.model.ffn_size) if experts > 1 else run.model.ffn_size,
        } | {name: width for name, width in beside.items() if width and experts > 1}  # fmt: skip


def _dispatch_reasons(run: RunConfig, world_size: int) -> list[str]:
    """Of dispatchers that nobody asked for by name: a line for each distinct case."""
    experts = [n for n in run.moe.experts_per_layer(run.model.num_layers) if n > 1]
    return list(dict.fromkeys(why for n in experts if (why := _dispatcher(run, world_size, n).why)))


def _dispatcher(run: RunConfig, world_size: int, experts: int) -> Choice:
    """Of a layer with so many experts, as parallel/expert.py would build it."""
    return choice_of(run.moe, experts, run.parallel.etp, run.node_size(world_size))


def _pipeline(run: RunConfig, world_size: int, vocab_size: int) -> dict[str, Any] | None:
    if run.parallel.pipeline_model_parallel_size == 1:
        return None
    microbatches = run.num_microbatches(world_size)
    return {
        "schedule": schedule_name(run), "micro_batches": microbatches, "idle": round(idle_of(run, microbatches), 4),
        "stages": [
            {
                "stage": s.number, "pipeline_rank": s.rank, "layers": s.layers, "parts": s.parts, "moe_layers": s.moe_layers,
                "parameters": s.parameters, "flops_per_token": s.flops_per_token,
            }
            for s in stages_of(run, vocab_size)
        ],
    }  # fmt: skip


def _by_part(counts: ParameterCounts) -> tuple[dict[str, int], dict[str, int]]:
    """(all, active) parameters of each part; each sums to the whole."""
    layers = counts.per_layer
    total = {
        "embedding": counts.embedding,
        "attention": sum(layer.attention for layer in layers),
        "norms": sum(layer.norms for layer in layers) + counts.final_norm,
        "dense_mlp": sum(layer.mlp for layer in layers if not layer.experts),
        "residual_mlp": sum(layer.mlp for layer in layers if layer.experts),
        "residual_coefficients": sum(layer.coefficient for layer in layers),
        "shared_experts": sum(layer.shared_expert for layer in layers),
        "latent_projections": sum(layer.latent for layer in layers),
        "gates": sum(layer.gate for layer in layers),
        "experts": sum(layer.experts for layer in layers),
        "head": counts.head,
    } | ({"mtp": counts.mtp} if counts.mtp else {})
    assert sum(total.values()) == counts.total, f"{total} is not {counts.total}"
    active = total | {"experts": sum(layer.active_experts for layer in layers)} | ({"mtp": 0} if counts.mtp else {})
    assert sum(active.values()) == counts.active, f"{active} is not {counts.active}"
    return total, active


def _flops(run: RunConfig, world_size: int, vocab_size: int) -> dict[str, float | None]:
    """Of the model that is trained, without a teacher. Short sequences of a curriculum cost less attention per token."""
    pace, end = run.pace(world_size), _length(run, world_size)["tokens"]
    of_length = functools.cache(lambda length: flops_per_token(run.model, run.moe, length, vocab_size))
    per_token = of_length(run.training.seq_length)
    per_step = per_token * run.global_batch_size(world_size) * run.training.seq_length
    edges = [*(p.start.tokens for p in pace.phases[1:]), end]
    whole = sum(of_length(p.length) * max(min(edge, end) - p.start.tokens, 0) for p, edge in zip(pace.phases, edges)) if end else None
    return {"per_token": per_token, "per_step": per_step, "whole_run": whole}


# ---------------------------------------------------------------- ranks


def _per_rank(run: RunConfig, world_size: int, vocab_size: int) -> dict[str, Any]:
    """Within a stage the first rank is the fullest and the last one the emptiest; of stages alike one is counted."""
    pp, split = run.parallel.pipeline_model_parallel_size, run.layers_of_stages()
    experts, stage_ranks = run.moe.experts_per_layer(run.model.num_layers), world_size // pp
    firsts: dict[Any, int] = {}
    for rank in range(pp):
        mine = stages_of_rank(rank, pp, len(split))
        alike = (0 in mine, len(split) - 1 in mine, [experts[layer - 1] for s in mine for layer in split[s]])
        firsts.setdefault(str(alike), rank * stage_ranks)
    fullest = {rank: rank_footprint(run, world_size, vocab_size, rank) for rank in firsts.values()}
    emptiest = {rank: rank_footprint(run, world_size, vocab_size, rank) for rank in (r + stage_ranks - 1 for r in firsts.values())}
    first = max(fullest, key=lambda rank: fullest[rank].at_most)
    last = min(emptiest, key=lambda rank: (emptiest[rank].at_most, -rank))
    on_host = {"on_host": ["parameters", "gradients", "optimizer"] if run.memory.cpu_optimizer else []}
    return {"fullest": _footprint_of(first, fullest[first]) | on_host, "emptiest": _footprint_of(last, emptiest[last]) | on_host}


def _loss(run: RunConfig, vocab_size: int) -> dict[str, int]:
    t = run.training
    columns, tokens = run.model.padded_vocab_size(vocab_size) // run.parallel.tensor_model_parallel_size, t.micro_batch_size * t.seq_length
    asked = 0 if run.distillation.is_on else run.memory.cross_entropy_loss_chunk_size  # a teacher's logits meet whole ones
    at_a_time = columns_at_a_time(asked, tokens, columns) or columns
    return {
        "columns": columns, "columns_at_a_time": at_a_time, "logits_bytes": tokens * at_a_time * getattr(torch, _precision(run)).itemsize,
    }  # fmt: skip


def rank_footprint(run: RunConfig, world_size: int, vocab_size: int, rank: int) -> Footprint:
    with fake_process_group(rank, world_size):
        mesh = build_parallel_mesh(run, "cpu")
        model = build_sharded_model(run, vocab_size, mesh)
        expected = sum(stage.parameters for stage in stages_of(run, vocab_size) if stage.rank == mesh.rank("pp"))
        built = sum(p.numel() for p in model.parameters())
        assert built == expected, f"parameters: built {built}, counted {expected}"
        half = getattr(torch, run.training.half) if run.training.half else None
        return footprint(model, run.optimizer, run.parallel.zero_stage, half)


def _upcycling(run: RunConfig) -> dict[str, Any]:
    return {
        "dense": run.checkpoint.load or run.checkpoint.load_hf, "parts": run.upcycling.moe_upcycling_granularity, "router_std": router_std(run),
        "inexact_because": inexact_because(run),
    }  # fmt: skip


def _teacher(run: RunConfig, world_size: int, vocab_size: int) -> dict[str, Any]:
    teacher = run.teacher()
    counts = parameter_counts(teacher.model, teacher.moe, vocab_size)
    per_rank = _per_rank(teacher, world_size, vocab_size)
    for rank in per_rank.values():  # it is not trained: no gradients, no optimizer
        rank["bytes"] = {name: rank["bytes"][name] for name in ("parameters", "gathered")}
    return {
        "layers": list(teacher.moe.experts_per_layer(teacher.model.num_layers)),
        "parameters": {"total": counts.total, "active": counts.active},
        "flops_per_token": flops_per_token(teacher.model, teacher.moe, run.training.seq_length, vocab_size) / 3,
        "stop_iters": run.distillation.kd_stop_iters, "stop_tokens": run.distillation.kd_stop_tokens,
        "per_rank": per_rank,
    }  # fmt: skip


def _footprint_of(rank: int, f: Footprint) -> dict[str, Any]:
    return {
        "rank": rank, "dense_parameters": f.dense_parameters, "expert_parameters": f.expert_parameters,
        "bytes": {
            "parameters": f.parameters, "gradients": f.gradients, "whole_gradients": f.whole_gradients,
            "optimizer": f.optimizer, "gathered": f.gathered,
        },
    }  # fmt: skip


def _groups(run: RunConfig, world_size: int) -> dict[str, Any]:
    p = run.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    dense = dense_groups(world_size, tp, pp, cp)
    table: dict[str, Any] = {axis: _group_table(dense[axis], world_size) for axis in ("tp", "dp", "pp", "cp")}
    table |= {"etp": _group_table(expert_tensor_groups(world_size, p.etp, pp), world_size), "ep": {}, "edp": {}}
    replicas = p.num_distributed_optimizer_instances
    if replicas > 1:
        data_ranks = dense_groups(world_size, tp, pp)["dp"]  # those of dp and cp together
        table |= _hybrid_tables(data_ranks, replicas, world_size) | {"expert_shard": {}, "expert_replicate": {}}
    for degree in run.expert_degrees():
        ep, edp = expert_groups(world_size, degree, tp=tp, pp=pp, etp=p.etp)
        table["ep"][str(degree)] = _group_table(ep, world_size)
        table["edp"][str(degree)] = _group_table(edp, world_size)
        if replicas > 1:
            for name, groups in _hybrid_tables(edp, math.gcd(replicas, len(edp[0])), world_size).items():
                table[f"expert_{name}"][str(degree)] = groups
    return table


def _hybrid_tables(pools: Groups, replicas: int, world_size: int) -> dict[str, Any]:
    return {name: _group_table(groups, world_size) for name, groups in zip(("shard", "replicate"), hybrid_groups(pools, replicas))}


def _group_table(groups: Groups, world_size: int) -> dict[str, Any]:
    first = groups[0]
    listed = groups if world_size <= LISTED_RANKS or len(groups) <= 2 else [first, groups[-1]]
    return {"number": len(groups), "size": len(first), "stride": first[1] - first[0] if len(first) > 1 else None, "ranks": listed}


# ---------------------------------------------------------------- time


def _batch(run: RunConfig, world_size: int) -> dict[str, Any]:
    batch = run.global_batch_size(world_size)
    sizes = [{"from_step": p.start.iterations + 1, "sequences": p.batch, "length": p.length} for p in run.pace(world_size).phases]
    return {
        "micro_batch_size": run.training.micro_batch_size, "global_batch_size": batch,
        "micro_batches_per_step": run.num_microbatches(world_size), "tokens_per_step": batch * run.training.seq_length,
        "sizes": sizes,
    }  # fmt: skip


def _length(run: RunConfig, world_size: int) -> dict[str, Any]:
    ends = run.train_ends(world_size)
    if not ends:
        return {"iterations": None, "samples": None, "tokens": None, "decided_by": None}
    flag = min(ends, key=ends.__getitem__)
    return run.pace(world_size).after(ends[flag])._asdict() | {"decided_by": flag}


def _learning_rate(run: RunConfig, world_size: int) -> dict[str, Any]:
    o, iterations = run.optimizer, _length(run, world_size)["iterations"]
    told: dict[str, Any] = {"max": o.lr, "min": o.min_lr, "style": o.lr_decay_style}
    lengths: dict[str, Any] = dict.fromkeys(("unit", "warmup", "decay", "warmup_iterations", "decay_iterations"))
    if iterations or any(getattr(o, name) for name in DECAY_LENGTHS):
        pace = run.pace(world_size)
        s = build_schedule(o, pace, iterations or 0)
        lengths |= {
            "unit": s.unit, "warmup": s.warmup, "decay": s.decay,
            "warmup_iterations": pace.iterations_at(s.unit, s.warmup), "decay_iterations": pace.iterations_at(s.unit, s.decay),
        }  # fmt: skip
    return told | lengths


def _data(run: RunConfig, world_size: int, here: Here) -> dict[str, Any]:
    """Epochs: how often the run sees its training split; None without a length, or when a dataset is not here."""
    samples = _length(run, world_size)["samples"]
    are_here = run.data.is_given and not run.data.mock_data and not _absent_data(run)
    sizes = training_sizes(run.data, run.training.seq_length) if are_here else []
    sources = [
        s._asdict() | {"epochs": round(s.weight * samples / s.samples, 4) if samples else None} for s in sizes
    ]  # fmt: skip
    return {
        "mock": run.data.mock_data,
        "sources": sources,
        "train_tokens": sum(s.tokens for s in sizes) or None,
        "epochs": round(samples / sum(s.samples for s in sizes), 4) if samples and sizes else None,
    }


# ---------------------------------------------------------------- settings


def _settings(run: RunConfig) -> dict[str, Any]:
    values = ((s, getattr(getattr(run, group), s.name)) for group, cls in GROUPS.items() for s in fields_of(cls))
    return {s.name: value for s, value in values if value != s.default}


# What a reader of a command wants to know even when it does not say so.
ALWAYS = (
    "vocab_size", "seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size", "lr", "min_lr", "lr_decay_style",
    "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "init_method_std", "hidden_dropout", "attention_dropout",
    "tensor_model_parallel_size", "zero_stage", "bf16", "split", "seed", "eval_interval", "eval_iters", "log_interval",
)  # fmt: skip
WITH_EXPERTS = (
    "expert_interval", "topk", "mlp_type", "moe_expert_parallel_size", "moe_loss_coeff", "moe_token_dropping",
    "moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity",
)  # fmt: skip
LENGTHS = {
    RUN_LENGTHS: "no end is given, and one is needed to train",
    DECAY_LENGTHS: "the whole run",
    WARMUP_LENGTHS: "no warm-up",
}


def _defaults(run: RunConfig, world_size: int, given: frozenset[str], here: Here) -> Iterator[dict[str, Any]]:
    notes = {
        "vocab_size": _vocabulary_note(run, here),
        "global_batch_size": "micro-batch size x data-parallel size",
        "bf16": f"computes in {_precision(run)}",
    }
    computed = {"vocab_size": here.vocab_size, "global_batch_size": run.global_batch_size(world_size)}
    wanted = ALWAYS + (WITH_EXPERTS if run.moe.has_experts else ())
    for group, cls in GROUPS.items():
        for s in fields_of(cls):
            if s.name in wanted and s.name not in given and not (s.name == "bf16" and run.training.fp16):
                value = computed.get(s.name, getattr(getattr(run, group), s.name))
                yield {"flag": s.option, "value": value, "note": notes.get(s.name)}
    for names, note in LENGTHS.items():
        if not given & set(names):
            yield {"flag": " ".join("--" + n.replace("_", "-") for n in names), "value": None, "note": note}


def _vocabulary_note(run: RunConfig, here: Here) -> str:
    padded = run.model.padded_vocab_size(here.vocab_size)
    whose = "that of GPT-2's BPE, because the run's own is not known here" if not here.vocabulary_is_known else (
        "the tokenizer's" if here.tokenizer else "that of mock data"
    )  # fmt: skip
    return f"{whose}; padded to {padded} by --make-vocab-size-divisible-by {run.model.make_vocab_size_divisible_by}"


# ---------------------------------------------------------------- checks


def _checks(run: RunConfig, world_size: int) -> dict[str, Any]:
    """What would be noticed, and what is left for a user to switch on."""
    try:
        layouts = fold(run, world_size)
    except ConfigError:  # a limit of the proof is none of the run
        layouts = []
    return {
        "replicas_interval": run.training.check_replicas_interval,
        "timeout_minutes": run.parallel.distributed_timeout_minutes,
        "verify_parallelism": [
            {"processes": s.world_size, "folded": list(s.folded), "changed": list(s.changed), "not_compared": list(s.not_compared)}
            for s in layouts
        ],
    }


# ---------------------------------------------------------------- print


def as_json(value: Any, indent: int = 0, width: int = 170) -> str:
    """JSON that a person can read: what fits on a line stays on one, and lists of numbers fill theirs."""
    line = json.dumps(value)
    if len(line) + indent <= width or not isinstance(value, dict | list | tuple):
        return line
    pad, end = "\n" + " " * (indent + 2), "\n" + " " * indent
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {as_json(v, indent + 2, width)}" for k, v in value.items()]
        return "{" + pad + ("," + pad).join(items) + end + "}"
    lines: list[str] = []
    is_table = isinstance(value[0], dict)
    for item in (as_json(v, indent + 2, width) for v in value):
        if lines and not is_table and len(lines[-1]) + len(item) + 4 + indent <= width:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return "[" + pad + ("," + pad).join(lines) + end + "]"
