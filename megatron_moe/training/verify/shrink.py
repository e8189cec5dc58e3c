"""A run -> a small one that has every switch of it which matters to the layout, and a word for each thing that was changed.

Sizes shrink to a few units per rank and stay divisible by what divided them. Degrees stay as they are where their ranks are here;
for ranks that are not here they fold: every degree above 1 to 2, expert parallelism to 2 and 4 where layers have several degrees.

Worked example, 64 ranks, TP 4, 16 layers of which every second has 32 or 64 experts, EP 64: degrees of expert parallelism are 32 and 64
-> 2 and 4, experts 32 64 -> 2 4, layers 16 -> 4, TP 4 -> 2, data ranks 16 -> 2; 4 processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.curriculum import CurriculumConfig
from megatron_moe.config.data import DataConfig, TokenizerConfig
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.memory import MemoryConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.output import CheckpointConfig, LoggingConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.pipeline import fits_rounds, num_stages
from megatron_moe.config.run import RunConfig
from megatron_moe.parallel.expert import choice_of

MOST_PROCESSES = 8
STEPS = 2

# Every number of ParallelConfig that is a degree, with its short name, and what is none. A new axis gets a line here, and folds;
# tests/training/test_verify_shrink.py asks for it.
DEGREES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_tensor_parallel_size": "ETP",
    "num_distributed_optimizer_instances": "replicas of the sharded parameters",
}
NO_DEGREES = (
    "zero_stage", "distributed_timeout_minutes", "num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Small:
    """What is trained in place of a run."""

    run: RunConfig
    vocab_size: int
    world_size: int
    folded: tuple[str, ...]  # degrees, from what to what
    shrunk: tuple[str, ...]  # sizes
    changed: tuple[str, ...]  # what makes the proof sharp: type, kernels
    not_compared: tuple[str, ...]  # what depends on the layout by definition

    @property
    def data_ranks(self) -> int:
        return self.run.data_parallel_size(self.world_size)


@dataclass
class _Layout:
    """Degrees of the small run."""

    parallel: ParallelConfig
    world_size: int
    expert_degrees: dict[int, int]  # of the run -> of the small one
    expert_data: dict[int, tuple[int, int]]  # by the run's degree: expert data ranks there, and in the small one
    folded: list[str] = field(default_factory=list)


def shrink(run: RunConfig, world_size: int) -> Small:
    """For ranks that are here: degrees stay."""
    p, degrees = run.parallel, run.expert_degrees()
    stage = world_size // p.pipeline_model_parallel_size
    expert_data = {ep: (stage // (ep * p.etp),) * 2 for ep in degrees}
    return _small(run, world_size, _Layout(p, world_size, {ep: ep for ep in degrees}, expert_data))


def fold(run: RunConfig, world_size: int | None) -> list[Small]:
    """For ranks that are not here; `world_size` None: more than one data rank. Several where 8 processes are too few for all axes."""
    whole = _folded(run, world_size, {})
    if whole.world_size <= MOST_PROCESSES:
        return [_small(run, world_size, whole)]
    axes = [name for name in ("pipeline_model_parallel_size", "context_parallel_size", "tensor_model_parallel_size")
            if getattr(whole.parallel, name) > 1]  # fmt: skip
    layouts = [_folded(run, world_size, {name: 1}) for name in axes]
    layouts = [layout for layout in layouts if layout.world_size <= MOST_PROCESSES][:2]  # together they have every axis
    assert layouts, f"no folding of {run.parallel} fits into {MOST_PROCESSES} processes"
    return [_small(run, world_size, layout) for layout in layouts]


# ---------------------------------------------------------------- degrees


def _folded(run: RunConfig, world_size: int | None, fixed: dict[str, int]) -> _Layout:
    """`fixed`: axes that are left out, because all of them together are too many."""
    p = run.parallel
    degrees = {name: fixed.get(name, min(getattr(p, name), 2)) for name in DEGREES}
    pp, cp, tp, replicas = (
        degrees[name]
        for name in ("pipeline_model_parallel_size", "context_parallel_size", "tensor_model_parallel_size", "num_distributed_optimizer_instances")
    )  # fmt: skip
    parallel = dataclasses.replace(p, **degrees)
    etp = parallel.etp
    experts = _folded_experts(run.expert_degrees(), _has_two_legs(run, world_size))
    most = max(experts.values()) * etp if experts else 1
    has_data = world_size is None or run.data_parallel_size(world_size) > 1
    dp = 2 if has_data else 1
    while dp * cp * tp % most or dp * cp % replicas:
        dp += 1
    # copies of the experts, and shards beside replicas: where the run has them and there is room
    copies = {ep: world_size // (p.pipeline_model_parallel_size * ep * p.etp) if world_size else 2 for ep in experts}
    has_copies = most > 1 and copies[max(experts)] > 1  # most > 1: there are experts
    is_hybrid = replicas > 1 and (world_size is None or run.data_parallel_size(world_size) * p.context_parallel_size > replicas)
    wants_more = (has_data and has_copies and dp * cp * tp == most) or (is_hybrid and dp * cp == replicas)
    if wants_more and 2 * pp * dp * cp * tp <= MOST_PROCESSES:
        dp *= 2
    size = pp * dp * cp * tp
    notes = [f"{short} {getattr(p, name)} -> {degrees[name]}" for name, short in DEGREES.items() if getattr(p, name) != degrees[name]]
    notes += [f"EP {old} -> {new}" for old, new in experts.items() if old != new]
    was = "more than 1" if world_size is None else run.data_parallel_size(world_size)
    if was != dp:
        notes.append(f"data ranks {was} -> {dp}")
    for name in fixed:
        notes.append(
            f"without {DEGREES[name]} here, which another layout below has: all axes at once are more than {MOST_PROCESSES} processes"
        )
    expert_data = {ep: (copies[ep], size // (pp * new * etp)) for ep, new in experts.items()}
    return _Layout(parallel, size, experts, expert_data, notes)


def _folded_experts(degrees: Sequence[int], has_two_stages: bool) -> dict[int, int]:
    """1 stays; the smallest above becomes 2, the others 4. Rows that travel within nodes and then between them need a 4."""
    above = [ep for ep in sorted(degrees) if ep > 1]
    smallest = 4 if has_two_stages and len(above) == 1 and above[0] > 2 else 2
    return {ep: 1 if ep == 1 else smallest if ep == above[0] else 4 for ep in degrees}


# ---------------------------------------------------------------- sizes


def _small(run: RunConfig, world_size: int | None, layout: _Layout) -> Small:
    notes = _Notes()
    moe, layers, teacher, sizes = _experts(run, layout, notes)
    layout.parallel = _stages(run, layout, layers, notes)
    tp, cp = layout.parallel.tensor_model_parallel_size, layout.parallel.context_parallel_size
    if tp * cp > 1:
        moe = _same_under_every_split(moe, notes)
    moe = _dispatch_as_now(moe, run, world_size, sizes, layout, notes)
    etp = layout.parallel.etp
    data_ranks = layout.world_size // layout.parallel.model_parallel_size
    training = _training(run, world_size, layout, data_ranks, notes)
    model, vocab_size = _model(run, layout, layers, training.seq_length, data_ranks * cp, notes)
    unit = math.lcm(tp, etp)
    widths = {
        "moe_ffn_hidden_size": _near(24, etp),
        "moe_shared_expert_intermediate_size": _near(24, unit),
        "moe_latent_size": _near(12, 4),
    }
    for name, size in widths.items():
        if (old := getattr(moe, name)) is not None and old > size:
            notes.size(name, old, size)
            moe = dataclasses.replace(moe, **{name: size})
    optimizer = dataclasses.replace(run.optimizer, adam_eps=max(run.optimizer.adam_eps, 1e-5), adam_kernel="torch")
    if run.optimizer.adam_kernel != "torch":
        notes.changed.append(f"--adam-kernel {run.optimizer.adam_kernel} -> torch")
    if optimizer.optimizer != "sgd" and optimizer.adam_eps != run.optimizer.adam_eps:
        notes.changed.append(
            f"--adam-eps {run.optimizer.adam_eps:g} -> 1e-05: a smaller one makes steps out of the rounding of gradients that are zero"
        )
    d = run.data
    data = DataConfig(mock_data=True, reset_position_ids=d.reset_position_ids, reset_attention_mask=d.reset_attention_mask,
                      eod_mask_loss=d.eod_mask_loss)  # fmt: skip
    distillation = run.distillation
    if distillation.is_on:
        distillation = dataclasses.replace(distillation, **teacher, **_teacher_widths(run, model))
        notes.changed.append("the teacher: random weights in place of those of --load-teacher")
    try:
        small = RunConfig(
            model=model, moe=moe, parallel=layout.parallel, training=training, memory=_memory(run, vocab_size, notes),
            optimizer=optimizer, curriculum=CurriculumConfig(),
            distillation=distillation, tokenizer=TokenizerConfig(), data=data, checkpoint=CheckpointConfig(), logging=LoggingConfig(),
        )  # fmt: skip
        problems = list(small.world_problems(layout.world_size))
    except ConfigError as error:
        problems = error.problems
    if problems:
        raise ConfigError(f"--verify-parallelism has no small model for this command: {p}" for p in problems)
    return Small(
        small, vocab_size, layout.world_size, tuple(layout.folded), tuple(notes.sizes), tuple(notes.changed), tuple(notes.not_compared)
    )


def _stages(run: RunConfig, layout: _Layout, num_layers: int, notes: _Notes) -> ParallelConfig:
    """The same schedule over the small number of layers."""
    p, changes = layout.parallel, {}
    if p.pipeline_model_parallel_size == 1:
        changes = {"num_layers_per_virtual_pipeline_stage": None, "pipeline_schedule": "auto", "enable_zbh1_pipeline": False}
    elif p.num_layers_per_virtual_pipeline_stage:
        changes = {"num_layers_per_virtual_pipeline_stage": num_layers // (p.pipeline_model_parallel_size * _virtual(run, layout))}
    if p.decoder_first_pipeline_num_layers or p.decoder_last_pipeline_num_layers:
        notes.changed.append("layers are spread evenly over the pipeline stages")
        changes |= {"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None}
    for name, value in changes.items():
        if name.startswith("num_layers"):
            notes.size(name, getattr(p, name), value)
    return dataclasses.replace(p, **changes)


def _virtual(run: RunConfig, layout: _Layout) -> int:
    """Stages of a rank: two stand for several."""
    pp = run.parallel.pipeline_model_parallel_size
    return min(num_stages(run.parallel, run.model.num_layers) // pp, 2) if layout.parallel.pipeline_model_parallel_size > 1 else 1


def _memory(run: RunConfig, vocab_size: int, notes: _Notes) -> MemoryConfig:
    m = run.memory
    if m.cpu_optimizer:
        notes.changed.append("--cpu-optimizer is left out: the update is made on the device")
    chunk = m.cross_entropy_loss_chunk_size
    if chunk and chunk > vocab_size // 3:
        notes.size("cross_entropy_loss_chunk_size", chunk, vocab_size // 3)
        chunk = vocab_size // 3
    return dataclasses.replace(m, cpu_optimizer=False, cross_entropy_loss_chunk_size=chunk)


class _Notes:
    def __init__(self) -> None:
        self.sizes: list[str] = []
        self.changed: list[str] = []
        self.not_compared: list[str] = []

    def size(self, name: str, old: Any, new: Any) -> None:
        if old != new:
            words = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (old, new)]
            self.sizes.append(f"{name.replace('_', '-')} {words[0]} -> {words[1]}")


def _near(size: int, unit: int) -> int:
    """The multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


def _training(run: RunConfig, world_size: int | None, layout: _Layout, data_ranks: int, notes: _Notes) -> Any:
    t, p = run.training, layout.parallel
    micro = min(t.micro_batch_size, 2 if data_ranks < 32 else 1)
    given = run.num_microbatches(world_size) if world_size else t.gradient_accumulation_steps or (2 if t.global_batch_size else 1)
    pp = p.pipeline_model_parallel_size
    steps = min(given, 2 * pp if pp > 1 else 2)
    while pp > 1 and not fits_rounds(steps, pp):
        steps -= 1
    notes.size("micro_batch_size", t.micro_batch_size, micro)
    notes.size("micro_batches of a step and rank", given, steps)
    unit = p.sequence_unit
    length = min(t.seq_length, 15 if unit == 1 else _near(16, unit))  # odd where it may be: slices of unequal length
    notes.size("seq_length", t.seq_length, length)
    was = "float16" if t.fp16 else "bfloat16" if t.bf16 else t.params_dtype
    if was != "float64":
        notes.changed.append(f"{was} -> float64, in which a wrong sum stands out from rounding")
    if t.moe_kernels != "reference":
        notes.changed.append("--moe-kernels auto -> reference")
    if t.compile:
        notes.changed.append("--compile is left out")
    if t.rampup_batch_size or run.curriculum.curriculum_learning:
        notes.changed.append("steps of one size: no batch ramp-up, no curriculum")
    return dataclasses.replace(
        t, micro_batch_size=micro, global_batch_size=micro * steps * data_ranks, gradient_accumulation_steps=None, seq_length=length,
        train_iters=STEPS, train_samples=None, train_tokens=None, rampup_batch_size=None, bf16=False, fp16=False, params_dtype="float64",
        moe_kernels="reference", compile=False, fp16_master_weights_and_grads=False,
    )  # fmt: skip


def _model(run: RunConfig, layout: _Layout, num_layers: int, length: int, data_ranks: int, notes: _Notes) -> tuple[Any, int]:
    m, tp = run.model, layout.parallel.tensor_model_parallel_size
    was_tp = run.parallel.tensor_model_parallel_size
    groups = max(tp, 2) if m.key_value_heads >= was_tp else max(tp * m.key_value_heads // was_tp, 1)
    groups = min(groups, m.key_value_heads)
    queries = min(m.num_attention_heads // m.key_value_heads, 2)
    heads = math.lcm(groups * queries, tp)
    groups = heads if m.num_key_value_heads is None else groups
    # as many channels as can be shared out over the data ranks, where those of the run can
    ranks = data_ranks if m.hidden_size % data_ranks == 0 and data_ranks <= 64 else 1
    hidden = _near(32, math.lcm(2 * heads, ranks) if m.kv_channels is None else ranks)
    unit = math.lcm(tp, layout.parallel.etp)
    ffn, vocab_multiple = _near(48, unit), math.lcm(16, tp)
    vocab_size = max(5 * vocab_multiple - 4, 60)  # not a multiple: there is padding, as in most runs
    for name, old, new in (
        ("num_layers", m.num_layers, num_layers), ("hidden_size", m.hidden_size, hidden),
        ("num_attention_heads", m.num_attention_heads, heads), ("num_key_value_heads", m.key_value_heads, groups),
        ("ffn_hidden_size", m.ffn_size, ffn), ("mtp_num_layers", m.mtp_num_layers, min(m.mtp_num_layers, 2)),
    ):  # fmt: skip
        notes.size(name, old, new)
    notes.sizes.append(f"vocabulary {m.vocab_size or '(the data says)'} -> {vocab_size}")
    model = dataclasses.replace(
        m, num_layers=num_layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=None if m.num_key_value_heads is None else groups, kv_channels=None if m.kv_channels is None else 8,
        ffn_hidden_size=ffn, max_position_embeddings=length + 1, make_vocab_size_divisible_by=vocab_multiple, vocab_size=vocab_size,
        init_method_std=max(m.init_method_std, 0.02), mtp_num_layers=min(m.mtp_num_layers, 2),
        **_attention_variants(m, hidden // heads, num_layers, length, notes),
    )  # fmt: skip
    return model, vocab_size


def _attention_variants(m: Any, head_width: int, num_layers: int, length: int, notes: _Notes) -> dict[str, Any]:
    """Widths of latent attention, a window within the short sequences and on as many kinds of layers, rotated channels in pairs."""
    small: dict[str, Any] = {}
    if m.multi_latent_attention:
        small = {"kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 10}
        if m.q_lora_rank:
            small["q_lora_rank"] = 14
        small = {name: min(getattr(m, name), size) for name, size in small.items()}
    elif m.rotary_percent < 1:
        width = 8 if m.kv_channels else head_width
        if int(width * m.rotary_percent) % 2 or int(width * m.rotary_percent) < 2:
            small["rotary_percent"] = 0.5 if width % 4 == 0 else 1.0
    if m.window_size:
        windows = {m.window_of(layer) for layer in range(1, m.num_layers + 1)}
        small["window_size"] = min(m.window_size, length // 3)
        # both kinds: every second layer is full; one kind: that of all layers
        small["window_attn_skip_freq"] = (2,) if len(windows) > 1 else (1,) if windows == {None} else None
    for name, size in small.items():
        notes.size(name, getattr(m, name), size)
    return small


def _teacher_widths(run: RunConfig, model: Any) -> dict[str, Any]:
    """A teacher of another width than the student's stays one."""
    d, widths = run.distillation, {}
    if d.hidden_size_teacher:
        widths["hidden_size_teacher"] = model.hidden_size * (1 if d.hidden_size_teacher == run.model.hidden_size else 2)
    if d.num_attention_heads_teacher:
        widths["num_attention_heads_teacher"] = model.num_attention_heads
    return widths


# ---------------------------------------------------------------- experts


def _experts(run: RunConfig, layout: _Layout, notes: _Notes) -> tuple[MoEConfig, int, dict[str, Any], dict[int, int]]:
    """Experts of the small run, its number of layers, those of its teacher, and what became of each number of experts."""
    old, interval = run.moe, min(run.moe.expert_interval, 2)
    ep = max(layout.expert_degrees.values(), default=1)
    kept = {n: layout.expert_degrees[old.expert_parallel_degree(n)] for n in _sizes(run)}
    k, sampling, order = _topk(run, kept, ep, notes)
    groups = _groups(run, kept, ep, k, notes)
    sizes = _small_sizes(run, layout, kept, ep, k, groups)
    slots, num_layers = _layers(run, run, interval, sizes, layout)
    teacher: dict[str, Any] = {}
    if run.distillation.is_on:
        t_slots, t_layers = _layers(run.teacher(), run, interval, sizes, layout)
        teacher = {"num_experts_teacher": t_slots, "num_layers_teacher": t_layers}
    best = 1 if old.moe_router_group_best and groups[0] else None
    notes.size("moe_router_group_best", old.moe_router_group_best, best)
    notes.size("num_experts", old.num_experts, slots)
    notes.size("expert_interval", old.expert_interval, interval)
    if old.moe_loss_warmup_iters > STEPS:
        notes.changed.append(f"--moe-loss-warmup-iters {old.moe_loss_warmup_iters} -> {STEPS}")
    if old.moe_token_dropping and old.moe_min_capacity > 1 and run.moe.has_experts:
        notes.changed.append(f"--moe-min-capacity {old.moe_min_capacity} -> 1: so few tokens would else never be dropped")
    for option, is_on in (("--moe-fp8-experts", old.moe_fp8_experts), ("--moe-fp8-dispatch", old.moe_fp8_dispatch)):
        if is_on:
            notes.changed.append(f"{option} is left out: its rounding would hide a wrong sum")
    moe = dataclasses.replace(
        old, moe_fp8_experts=False, moe_fp8_dispatch=False, num_experts=slots, expert_interval=interval, moe_first_k_dense_replace=interval if old.moe_first_k_dense_replace else 0, topk=k, moe_expert_parallel_size=ep, moe_router_num_groups=groups[0],
        moe_router_group_topk=groups[1], moe_router_group_best=best, moe_top2_2nd_expert_sampling=sampling, moe_token_drop_policy=order,
        moe_loss_warmup_iters=min(old.moe_loss_warmup_iters, STEPS), moe_min_capacity=min(old.moe_min_capacity, 1),
    )  # fmt: skip
    return moe, num_layers, teacher, sizes


def _sizes(run: RunConfig) -> list[int]:
    """Distinct numbers of experts of a layer, the teacher's among them."""
    runs = [run, run.teacher()] if run.distillation.is_on else [run]
    return sorted({n for r in runs for n in r.moe.experts_per_layer(r.model.num_layers) if n > 1})


def _can_grow(run: RunConfig, degree: int, ep: int) -> bool:
    """Whether a layer may get more experts without another degree: with fewer experts than EP it has as many ranks as experts."""
    return run.moe.moe_pyramid_ep == "auto" or degree == ep


def _topk(run: RunConfig, kept: dict[int, int], ep: int, notes: _Notes) -> tuple[int, bool, Any]:
    """(experts per token, sampling of a second one, who is dropped). 1 and 2 have rules of their own, so they stay what they are."""
    m = run.moe
    room_for = min((degree for n, degree in kept.items() if not _can_grow(run, degree, ep)), default=m.topk)
    k = min(m.topk, 3, room_for)
    notes.size("topk", m.topk, k)
    is_special = m.topk > 2 and k <= 2
    order = m.moe_token_drop_policy
    if is_special and order == "auto" and m.moe_token_dropping and m.moe_router_policy != "expert_choice":
        order = "probs"
    return k, m.moe_top2_2nd_expert_sampling and not is_special, order


def _groups(run: RunConfig, kept: dict[int, int], ep: int, k: int, notes: _Notes) -> tuple[int | None, int | None]:
    """(groups, groups of a token): two, of which a token may send to one where a group has room for its experts."""
    if run.moe.moe_router_num_groups is None:
        return None, None
    if all(_can_grow(run, degree, ep) or degree >= 2 * k for degree in kept.values()):
        return 2, 1
    if k % 2 == 0:
        return 2, 2
    notes.not_compared.append("--moe-router-num-groups: no small number of experts has room for it")
    return None, None


def _small_sizes(
    run: RunConfig, layout: _Layout, kept: dict[int, int], ep: int, k: int, groups: tuple[int | None, int | None]
) -> dict[int, int]:
    """Experts of a layer -> as few as have the same degree, room for k, and the same way of sharding; more where the run has more."""
    m, sizes = run.moe, {1: 1}

    def fits(n: int, here: int, above: int) -> bool:
        size, degree = kept[n] * here, kept[n]
        were, copies = layout.expert_data[m.expert_parallel_degree(n)]
        is_auto = m.moe_pyramid_ep == "auto"
        has_degree = math.gcd(size, ep) == degree if is_auto else min(size, ep) == degree and max(size, ep) % min(size, ep) == 0
        has_groups = groups[0] is None or (size % groups[0] == 0 and groups[1] * (size // groups[0]) >= k)
        # with fewer experts than expert data ranks ZeRO shards another dim of the stacks
        same_shards = copies == 1 or (here % copies == 0) == (n // m.expert_parallel_degree(n) % were == 0)
        return size >= max(2, k, above) and has_degree and has_groups and same_shards

    for n in sorted(kept):
        # more than those of a smaller layer, and, where the run has a choice of experts, more than k
        above = max(max(sizes.values()), k if n > m.topk else 0) + 1 if _can_grow(run, kept[n], ep) else 0
        here = next((h for more in (above, 0) for h in range(1, 129) if fits(n, h, more)), None)
        sizes[n] = kept[n] * (here or max(1, -(-max(2, k) // kept[n])))
    return sizes


def _layers(run: RunConfig, student: RunConfig, interval: int, sizes: dict[int, int], layout: _Layout) -> tuple[tuple[int, ...], int]:
    """One MoE layer for each kind that the run has, at least one for each pipeline stage; and the number of layers."""
    experts, old, dense = (
        run.moe.experts_per_layer(run.model.num_layers),
        student.moe.expert_interval,
        student.moe.moe_first_k_dense_replace,
    )
    slots = tuple(dict.fromkeys(sizes[experts[i]] for i in range(old - 1, len(experts), old) if i >= dense))
    pp = layout.parallel.pipeline_model_parallel_size
    stages = pp * _virtual(student, layout)
    if all(n == 1 for n in slots):
        return (1,), _near(2, interval * stages)
    first = int(bool(dense))  # the first of the places for experts is dense
    has_both_windows = len({run.model.window_of(layer) for layer in range(1, len(experts) + 1)}) > 1
    count = _near(max(len(slots) + first, 1 + has_both_windows), stages)
    has_tail = len(experts) % old and interval == 2 and pp == 1
    return tuple(slots[i % len(slots)] for i in range(count - first)), interval * count + bool(has_tail)


def _same_under_every_split(moe: MoEConfig, notes: _Notes) -> MoEConfig:
    """With TP or CP a rank routes a slice of a micro-batch, and some rules look at all tokens that a rank routes: no one device
    does what they do. They are set so that they choose alike, and named."""
    if not moe.has_experts:
        return moe
    everything = float(max(moe.num_experts) / moe.topk)  # an expert has room for all tokens
    policy = moe.moe_router_policy
    if policy == "sinkhorn":
        notes.not_compared.append(
            "--moe-router-policy sinkhorn balances over the tokens that a rank routes, a slice under TP and CP; compared with topk"
        )
        moe = dataclasses.replace(
            moe, moe_router_policy="topk", moe_router_sinkhorn_iterations=MoEConfig.moe_router_sinkhorn_iterations,
            moe_router_normalize="none" if moe.moe_router_normalize == "auto" else moe.moe_router_normalize, moe_top2_2nd_expert_sampling=False,
        )  # fmt: skip
    if policy == "expert_choice":
        notes.not_compared.append(
            "which tokens experts choose is decided among those that a rank routes, a slice under TP and CP; here experts take all"
        )
        return dataclasses.replace(moe, moe_train_capacity_factor=everything)
    if moe.moe_token_dropping:
        notes.not_compared.append("who is dropped over capacity is decided among the tokens that a rank routes, a slice under TP and CP; here "
                                  "experts have room for all")  # fmt: skip
        return dataclasses.replace(moe, moe_train_capacity_factor=everything, moe_eval_capacity_factor=everything)
    return moe


def _dispatch_as_now(
    moe: MoEConfig, run: RunConfig, world_size: int | None, sizes: dict[int, int], layout: _Layout, notes: _Notes
) -> MoEConfig:
    """What `auto` takes depends on the sizes, and on the nodes: name what it takes in the run."""
    old, etp, small_nodes = run.moe, layout.parallel.etp, _node_size(run, world_size)
    if layout.folded:
        small_nodes = 2 * etp if _has_two_legs(run, world_size) else None  # two nodes of two ranks, or all on one
        if small_nodes:
            notes.size("moe_node_size", old.moe_node_size or "(of the machines)", small_nodes)
        moe = dataclasses.replace(moe, moe_node_size=small_nodes)
    if old.moe_token_dispatcher != "auto" or old.moe_pad_expert_input_to_capacity:
        return moe
    taken = {(sizes[n], kind) for n, kind in _taken(run, world_size).items()}
    fits = lambda kind: sum(choice_of(moe, n, etp, small_nodes, kind).kind == one for n, one in taken)  # noqa: E731
    if fits("auto") == len(taken):
        return moe
    kinds = sorted({kind for _, kind in taken})  # the same order on every rank
    kind = max(kinds, key=fits)  # hierarchical is alltoall where a layer's ranks are on one node
    if fits(kind) < len(taken):
        notes.not_compared.append(f"--moe-token-dispatcher auto takes {' and '.join(kinds)}; compared with {kind} in all layers")
    notes.changed.append(f"--moe-token-dispatcher auto -> {kind}, what it takes in this run")
    return dataclasses.replace(moe, moe_token_dispatcher=kind, moe_node_size=moe.moe_node_size if kind == "hierarchical" else None)


def _taken(run: RunConfig, world_size: int | None) -> dict[int, str]:
    """How rows travel, by the experts of a layer; of layers whose rows do."""
    etp, nodes = run.parallel.etp, _node_size(run, world_size)
    experts = [n for n in run.moe.experts_per_layer(run.model.num_layers) if n > 1]
    return {n: choice_of(run.moe, n, etp, nodes).kind for n in experts if run.moe.expert_parallel_degree(n) * etp > 1}


def _has_two_legs(run: RunConfig, world_size: int | None) -> bool:
    """Whether rows of a layer travel between nodes and then within them; whoever asks for that is shown it whatever the nodes are."""
    return run.moe.moe_token_dispatcher == "hierarchical" or "hierarchical" in _taken(run, world_size).values()


def _node_size(run: RunConfig, world_size: int | None) -> int | None:
    """Ranks of a node where they may matter. Without --moe-node-size nothing is known of the nodes of an unknown number of ranks."""
    if world_size is None and run.moe.moe_node_size is None:
        return None
    return run.node_size(world_size or 1)


def lines(small: Small) -> Iterator[str]:
    """What stands for what, for the report."""
    for title, words in (("folded", small.folded), ("shrunk", small.shrunk)):
        if words:
            yield f"{title}: {', '.join(words)}"
    yield from (f"changed: {word}" for word in small.changed)
    yield from (f"not compared: {word}" for word in small.not_compared)
