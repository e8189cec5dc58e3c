"""A DeepSpeed JSON -> settings of ours.

Flow: `read_deepspeed` (a path or a dict) -> each key becomes an `Entry`: it sets fields, has no effect here, or asks for a feature
that is not built yet. Misspelt keys and wrong values are problems that name the key. Whether the command line agrees is seen later.

Worked example: {"train_batch_size": 256, "optimizer": {"params": {"betas": [0.9, 0.95]}}, "wall_clock_breakdown": true} gives
values {"global_batch_size": 256, "adam_beta1": 0.9, "adam_beta2": 0.95} and the warning that wall_clock_breakdown has no effect.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_moe.config.flags import FieldSpec, FlagInfo, convert
from megatron_moe.config.run import FIELDS

# ---------------------------------------------------------------- the keys


@dataclass(frozen=True)
class Key:
    """What one key of the JSON is here."""

    fields: Callable[[Any], dict[str, Any]] | None = None  # its value -> raw values by field name; ValueError for a wrong one
    kind: type | None = bool  # type of a value that sets no field; None: not looked at
    feature: str | None = None  # what any value but those of `off` asks for
    off: tuple[Any, ...] = (False, None, "none")


class NotBuiltError(ValueError):
    """The value means something that is not built yet."""


def sets(name: str) -> Key:
    return Key(lambda value: {name: value})


def no_effect(kind: type | None, *names: str) -> dict[str, Key]:
    return {name: Key(kind=kind) for name in names}


def section(name: str, keys: dict[str, Key]) -> dict[str, Key]:
    return {f"{name}.{key}": value for key, value in keys.items()}


def _optimizer_type(value: Any) -> dict[str, Any]:
    names = {"Adam": "adam", "AdamW": "adam", "FusedAdam": "adam", "DeepSpeedCPUAdam": "adam", "SGD": "sgd", "Muon": "muon"}
    ours = {n.lower(): our for n, our in names.items()}.get(str(value).lower())
    if ours is None:
        raise ValueError(f"must be one of {', '.join(names)}, not {value!r}{_did_you_mean(str(value), names)}")
    return {"optimizer": ours}


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"wants two numbers such as [0.9, 0.95], not {value!r}")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


def _static_scale(value: Any) -> dict[str, Any]:
    """0 is DeepSpeed's word for a dynamic scale."""
    return {} if type(value) in (int, float) and value == 0 else {"loss_scale": value}


def _scale_power(value: Any) -> dict[str, Any]:
    if type(value) not in (int, float) or not -126 <= value <= 126:
        raise ValueError(f"wants a number from -126 to 126, the power of 2 that the scale starts at, not {value!r}")
    return {"initial_loss_scale": 2.0**value}


def _offload(value: Any) -> dict[str, Any]:
    """FSDP2 moves parameters, gradients and optimizer state together."""
    if value == "nvme":
        raise NotBuiltError("offload to NVMe is not built yet; use cpu")
    if value not in ("cpu", "none", None, True, False):
        raise ValueError(f"must be cpu or none, not {value!r}")
    return {"cpu_optimizer": True} if value in ("cpu", True) else {}


def _switch(value: Any, on: dict[str, Any], off: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError(f"wants true or false, not {value!r}")
    return on if value else off


SCHEDULER_TYPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": None, "OneCycle": None, "LRRangeTest": None}
SCHEDULER_PARAMS = ("warmup_type", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")


def _schedule(value: Any) -> dict[str, Any]:
    """WarmupLR and WarmupDecayLR with a linear warm-up from zero are ours; the others are not."""
    kind, params = (value.get("type"), value.get("params") or {}) if isinstance(value, dict) else (None, {})
    if kind not in SCHEDULER_TYPES or not isinstance(params, dict):
        raise ValueError(f'wants {{"type": ..., "params": {{...}}}} with a type of {", ".join(SCHEDULER_TYPES)}, not {value!r}')
    flags = "give --lr-decay-style, --lr-warmup-iters and --min-lr instead"
    if SCHEDULER_TYPES[kind] is None:
        raise NotBuiltError(f"the schedule {kind} is not built yet; {flags}")
    if wrong := next((name for name in params if name not in SCHEDULER_PARAMS), None):
        raise ValueError(f"has no key params.{wrong}{_did_you_mean(wrong, SCHEDULER_PARAMS)}")
    params = {name: v for name, v in params.items() if v != "auto"}
    warmup = params.get("warmup_num_steps", 1000)  # this and the logarithm are DeepSpeed's defaults
    if params.get("warmup_type", "log") != "linear" and warmup:
        raise NotBuiltError(f'a logarithmic warm-up is not built yet; write "warmup_type": "linear", or {flags}')
    if params.get("warmup_min_lr", 0):
        raise NotBuiltError(
            f"a warm-up from another rate than 0 (warmup_min_lr {params['warmup_min_lr']}) is not built yet; write 0, or {flags}"
        )
    ours = {"lr_decay_style": SCHEDULER_TYPES[kind], "lr_warmup_iters": warmup}
    renamed = {"lr": params.get("warmup_max_lr"), "lr_decay_iters": params.get("total_num_steps") if kind == "WarmupDecayLR" else None}
    return ours | {name: v for name, v in renamed.items() if v is not None}


_OFFLOAD = {
    "device": Key(_offload),
    **no_effect(bool, "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
    **no_effect(float, "buffer_count", "buffer_size", "max_in_cpu", "ratio"),
    **no_effect(str, "nvme_path"),
}
_ZERO = {
    "stage": sets("zero_stage"),
    "cpu_offload": Key(_offload),
    "cpu_offload_param": Key(_offload),
    **section("offload_optimizer", _OFFLOAD),
    **section("offload_param", _OFFLOAD),
    **no_effect(bool, "allgather_partitions", "reduce_scatter", "overlap_comm", "contiguous_gradients", "round_robin_gradients",
                "ignore_unused_parameters", "load_from_fp32_weights", "elastic_checkpoint", "legacy_stage1",
                "cpu_offload_use_pin_memory", "use_multi_rank_bucket_allreduce", "stage3_gather_16bit_weights_on_model_save",
                "stage3_gather_fp16_weights_on_model_save", "zero_quantized_weights", "zero_quantized_gradients",
                "memory_efficient_linear", "override_module_apply"),
    **no_effect(float, "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
                "zero_hpz_partition_size", "mics_shard_size"),
}  # fmt: skip
_FP16 = {
    "enabled": sets("fp16"),
    "fp16_master_weights_and_grads": sets("fp16_master_weights_and_grads"),
    "loss_scale": Key(_static_scale),
    "initial_scale_power": Key(_scale_power),
    "loss_scale_window": sets("loss_scale_window"),
    "hysteresis": sets("hysteresis"),
    "min_loss_scale": sets("min_loss_scale"),
    **no_effect(bool, "auto_cast", "consecutive_hysteresis"),
}
_BF16 = {"enabled": sets("bf16"), **no_effect(bool, "immediate_grad_update", "check_grad_overflow")}
_OPTIMIZER = {
    "type": Key(_optimizer_type),
    "params.lr": sets("lr"),
    "params.betas": Key(_betas),
    "params.eps": sets("adam_eps"),
    "params.weight_decay": sets("weight_decay"),
    "params.momentum": sets("sgd_momentum"),
    "params.adam_w_mode": Key(feature="Adam with L2 regularisation in place of decoupled weight decay", off=(True, None)),
    "params.bias_correction": Key(feature="Adam without bias correction", off=(True, None)),
    "params.amsgrad": Key(feature="AMSGrad"),
    **no_effect(bool, "params.torch_adam", "params.fused", "params.foreach", "legacy_fusion"),
}
# No section of DeepSpeed's: the form in which tutorials write the flags of Megatron-DeepSpeed.
_MOE = {
    "enabled": Key(lambda value: _switch(value, {}, {"num_experts": [1]})),
    "num_experts": sets("num_experts"),
    "expert_parallel_size": sets("moe_expert_parallel_size"),
    "moe_loss_coeff": sets("moe_loss_coeff"),
    "router_z_loss_coeff": sets("moe_router_z_loss_coeff"),
    "k": sets("topk"),
    "capacity_factor": sets("moe_train_capacity_factor"),
    "train_capacity_factor": sets("moe_train_capacity_factor"),
    "eval_capacity_factor": sets("moe_eval_capacity_factor"),
    "min_capacity": sets("moe_min_capacity"),
    "drop_tokens": sets("moe_token_dropping"),
    "use_rts": sets("moe_rts"),
    "noisy_gate_policy": Key(lambda value: {"moe_noisy_gate_policy": "None" if value is None else value}),
    "use_residual": Key(lambda value: _switch(value, {"mlp_type": "residual"}, {"mlp_type": "standard"})),
    **no_effect(bool, "use_tutel"),
}


_CURRICULUM = {
    "enabled": sets("curriculum_learning"),
    "curriculum_type": Key(kind=str, feature="a curriculum of anything but the length (seqlen)", off=("seqlen", None)),
    "schedule_type": sets("curriculum_schedule_type"),
    "min_difficulty": sets("curriculum_min_difficulty"),
    "max_difficulty": sets("curriculum_max_difficulty"),
    "schedule_config.total_curriculum_step": sets("curriculum_total_step"),
    "schedule_config.difficulty_step": sets("curriculum_difficulty_step"),
    "schedule_config.root_degree": sets("curriculum_root_degree"),
    "schedule_config.difficulty": sets("curriculum_difficulty"),
    "schedule_config.max_step": sets("curriculum_max_step"),
}
_RECOMPUTE = {
    **no_effect(bool, "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "synchronize_checkpoint_boundary",
                "profile"),
    **no_effect(float, "number_checkpoints"),
}  # fmt: skip
_WHOLE_SECTIONS = {
    "amp": "NVIDIA apex AMP", "torch_autocast": "torch autocast", "data_efficiency": "the data efficiency library",
    "progressive_layer_drop": "progressive layer drop", "elasticity": "elastic training", "wandb": "Weights & Biases",
    "expert_parallel": "AutoEP", "quantize_training": "quantised training", "compression_training": "compression",
    "sparse_attention": "sparse attention",
}  # fmt: skip

KEYS: dict[str, Key] = {
    "train_batch_size": sets("global_batch_size"),
    "train_micro_batch_size_per_gpu": sets("micro_batch_size"),
    "gradient_accumulation_steps": sets("gradient_accumulation_steps"),
    "gradient_clipping": sets("clip_grad"),
    "steps_per_print": sets("log_interval"),
    **section("optimizer", _OPTIMIZER),
    "scheduler": Key(_schedule),
    **section("fp16", _FP16),
    **section("bf16", _BF16),
    **section("bfloat16", _BF16),  # its name in old versions
    **section("zero_optimization", _ZERO),
    **section("moe", _MOE),
    **section("curriculum_learning", _CURRICULUM),
    **section("activation_checkpointing", _RECOMPUTE),
    **no_effect(bool, "prescale_gradients", "sparse_gradients", "wall_clock_breakdown", "memory_breakdown", "dump_state",
                "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "use_data_before_expert_parallelism",
                "disable_allgather", "check_overflow", "dataloader_drop_last"),
    **no_effect(float, "gradient_predivide_factor"),
    **no_effect(str, "communication_data_type", "seq_parallel_communication_data_type", "log_level"),
    **no_effect(None, "data_types", "checkpoint", "flops_profiler", "tensorboard", "csv_monitor", "comet", "comms_logger", "aio",
                "compile", "pipeline", "hybrid_engine", "nebula", "autotuning", "eigenvalue"),
    **{name: Key(kind=None, feature=feature) for name, feature in _WHOLE_SECTIONS.items()},
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """What a reader of a JSON knows: its keys, and the fields that these set."""

    keys: dict[str, Key]
    fields: dict[str, FieldSpec]

    @cached_property
    def sections(self) -> set[str]:
        return {key[:i] for key in self.keys for i, letter in enumerate(key) if letter == "."}


PRETRAINING = Table(KEYS, FIELDS)
SECTIONS = PRETRAINING.sections

# DeepSpeed prints lines of its own beside Megatron's: an --log-interval that differs is no contradiction.
WEAK_FIELDS = ("log_interval",)

# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Entry:
    """One key of a JSON, and what became of it."""

    key: str  # dotted: zero_optimization.stage
    value: Any
    fields: tuple[str, ...] = ()  # the fields that it sets
    note: str = ""  # else why it sets none

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.value)}"


NO_EFFECT = "no effect here"
ASLEEP = "its section is switched off"
AUTO = '"auto" leaves it to the other settings'


@dataclass
class DeepSpeedJson:
    """What a DeepSpeed JSON says, in our words. `name` is how messages call it."""

    name: str
    entries: list[Entry] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # typed, by field name
    problems: list[str] = field(default_factory=list)
    not_yet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        unused = [e.key for e in self.entries if e.note in (NO_EFFECT, AUTO)]
        return self.notes + ([f"{self.name}: not acted on here: {', '.join(unused)}"] if unused else [])

    def origin(self, field_name: str) -> Entry:
        """The key that sets a field."""
        return next(e for e in self.entries if field_name in e.fields)


def read_deepspeed(source: str | dict[str, Any], table: Table = PRETRAINING) -> DeepSpeedJson:
    """From a path or a dict. Mistakes are in `problems`; only a file that is not there raises, FileNotFoundError."""
    result = DeepSpeedJson(source if isinstance(source, str) else "the DeepSpeed config")
    try:
        data = _load(source, result.notes) if isinstance(source, str) else source
        if not isinstance(data, dict):
            raise ValueError(f"wants one object {{...}}, not {type(data).__name__}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or not UTF-8
        result.problems.append(f"{result.name}: cannot be read: {error}")
        return result
    leaves = dict(_leaves(data, table.sections))
    for key, value in leaves.items():
        parent, _, name = key.partition(".")
        is_asleep = name not in ("", "enabled") and leaves.get(f"{parent}.enabled") is False
        _read_entry(result, table, key, value, is_asleep)
    return result


_STRING = r'("(?:\\.|[^"\\])*")'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")


def _load(path: str, notes: list[str]) -> Any:
    """The file as JSON. Comments and trailing commas, which editors and people like, are passed over with a note."""
    with open(path, encoding="utf-8-sig") as f:
        text = f.read()
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        plain = _TRAILING_COMMA.sub(lambda m: m[1] or "", _COMMENT.sub(lambda m: m[1] or " ", text))
        try:
            data = json.loads(plain, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError:
            raise error from None  # its line is that of the file
        notes.append(f"{path}: comments or trailing commas were passed over; they are no JSON")
        return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"given twice in one section: {', '.join(twice)}; keep one of each")
    return dict(pairs)


def _leaves(data: dict[str, Any], sections: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), down to what is no section."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in sections:
            yield from _leaves(value, sections, f"{key}.")
        else:
            yield key, value


def _read_entry(result: DeepSpeedJson, table: Table, key: str, value: Any, is_asleep: bool) -> None:
    """Adds what one key says to `result`."""
    known = table.keys.get(key)
    if known is None:
        result.problems.append(f"{result.name}: {_unknown(table, key, value)}")
        return
    values: dict[str, Any] = {}
    note = ASLEEP if is_asleep else AUTO if value == "auto" else "asks for nothing" if known.fields or known.feature else NO_EFFECT
    try:
        if value != "auto":
            values = _typed(table, known, value)
        if note not in (ASLEEP, AUTO) and known.feature and _asks(key, known, value):
            raise NotBuiltError(f"{known.feature} is not built yet; leave it out")
    except NotBuiltError as error:
        note = str(error)
        result.not_yet.append(f"{result.name}: {key}: {note}")
    except ValueError as error:
        result.problems.append(f"{result.name}: {key} {error}")
        return
    values = {} if is_asleep else values
    result.entries.append(Entry(key, value, tuple(values), "" if values else note))
    for name, typed in values.items():
        if result.values.setdefault(name, typed) != typed:
            result.problems.append(f"{result.name}: {result.origin(name)} and {result.entries[-1]} set the same thing "
                                   f"({table.fields[name].option}); keep one")  # fmt: skip


def _asks(key: str, known: Key, value: Any) -> bool:
    """Whether a value asks for the feature of its key."""
    if isinstance(value, dict):  # sections are off by default, but for those that have no "enabled"
        return bool(value) and value.get("enabled", key in ("compression_training", "sparse_attention")) is not False
    return not any(type(value) is type(off) and value == off for off in known.off)


# ---------------------------------------------------------------- values and keys that are wrong

_ANY = FieldSpec("value", bool, None, FlagInfo(help=""))


def _typed(table: Table, known: Key, value: Any) -> dict[str, Any]:
    """Values of our fields. ValueError with what is wrong, to be read behind the key."""
    if known.fields is None:
        if known.kind is not None and value is not None:
            _checked(replace(_ANY, kind=known.kind), value)
        return {}
    raw = known.fields(value)
    specs = table.fields
    return {name: _checked(specs[name], v, "" if len(raw) == 1 else f"for {specs[name].option} ") for name, v in raw.items()}


def _checked(spec: FieldSpec, raw: Any, lead: str = "") -> Any:
    """Converted and within its bounds; what is said leaves out the flag's name, which the user has not given."""
    try:
        if spec.kind is str and not isinstance(raw, str):
            raise ValueError(f"{spec.option} wants text, not {raw!r}")
        if raw is None:
            raise ValueError(f"{spec.option} wants a value, not null")
        value = convert(spec, raw)
        if problems := list(spec.problems(value)):
            raise ValueError(problems[0])
        return value
    except ValueError as error:
        raise ValueError(lead + re.sub(rf"^{spec.option}:? ", "", str(error))) from None


def _unknown(table: Table, key: str, value: Any) -> str:
    """A key that there is not, or that is a section where it should be a value or the other way round."""
    if key in table.sections:
        return f"{key} wants a section {{...}}, not {value!r}"
    prefix = key[: key.rfind(".") + 1]
    siblings = {k.removeprefix(prefix).partition(".")[0] for k in table.keys if k.startswith(prefix)}
    leaf = key.removeprefix(prefix)
    near = [prefix + n for n in difflib.get_close_matches(leaf, siblings, 1)] or [k for k in table.keys if k.rpartition(".")[2] == leaf]
    hint = f"; did you mean {near[0]}?" if near else f"; {prefix[:-1] or 'the top level'} knows {', '.join(sorted(siblings))}"
    return f"there is no key {key}{hint}"


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]}?" if near else ""
