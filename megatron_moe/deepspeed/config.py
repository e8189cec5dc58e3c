"""A DeepSpeed JSON -> what the engine is made from.

Read by config/deepspeed_json.py, as `pretrain_gpt_moe.py --deepspeed_config` reads it, with a table of keys of its own: schedules and
optimizers are DeepSpeed's here, and the `moe` section speaks of layers that the user's code has made.

Worked example on 4 ranks: {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": true}} gives
micro_batch_size 2, accumulation 16 / (2 x 4) = 2, half "bfloat16", ZeRO 0, clipping at 1.0 (DeepSpeed's default, too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_moe.config.curriculum import CurriculumConfig
from megatron_moe.config.deepspeed_json import KEYS, DeepSpeedJson, Key, Table, no_effect, read_deepspeed, section, sets
from megatron_moe.config.flags import ConfigError, fields_of, flag
from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.config.run import FIELDS
from megatron_moe.deepspeed.schedulers import scheduler_problems
from megatron_moe.utils.logging import logger

# ---------------------------------------------------------------- fields that pretraining does not have


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer section. Where a number is None torch's default holds, which is DeepSpeed's."""

    optimizer_type: Literal["Adam", "AdamW", "SGD"] | None = flag(None, "which; None: whatever the caller brings")
    lr: float | None = flag(None, "learning rate", minimum=0)
    adam_beta1: float | None = flag(None, "decay of the first moment", minimum=0, maximum=0.9999999)
    adam_beta2: float | None = flag(None, "decay of the second moment", minimum=0, maximum=0.9999999)
    adam_eps: float | None = flag(None, "added to the root of the second moment", minimum=0)
    weight_decay: float | None = flag(None, "of groups without one of their own", minimum=0)
    adam_w_mode: bool = flag(True, "decoupled decay also for the type Adam")
    amsgrad: bool = flag(False, "the largest second moment so far")
    sgd_momentum: float | None = flag(None, "momentum of SGD", minimum=0, maximum=0.99999)
    dampening: float | None = flag(None, "of the momentum", minimum=0)
    nesterov: bool = flag(False, "look one step ahead along the momentum")


@dataclass(frozen=True)
class SchedulerSection:
    """The scheduler section: type, and the parameters of that type (see schedulers.py). None: the default there."""

    scheduler_type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"] | None = flag(None, "which, if any")
    warmup_min_lr: float | None = flag(None, "rate at the start", minimum=0)
    warmup_max_lr: float | None = flag(None, "rate at the end of the warm-up", minimum=0)
    warmup_num_steps: int | None = flag(None, "length of the warm-up", minimum=1)
    warmup_type: Literal["log", "linear"] | None = flag(None, "its shape")
    total_num_steps: int | None = flag(None, "warm-up and decay together", minimum=1)
    warmup_min_ratio: float | None = flag(None, "share of the rate at the start", minimum=0)
    cos_min_ratio: float | None = flag(None, "share of the rate at the end", minimum=0)
    lr_range_test_min_lr: float | None = flag(None, "rate at the start", above=0)
    lr_range_test_step_size: int | None = flag(None, "steps of one rise", minimum=1)
    lr_range_test_step_rate: float | None = flag(None, "rise, in starting rates", above=0)
    lr_range_test_staircase: bool | None = flag(None, "rise at once at the end of each step")
    cycle_min_lr: float | None = flag(None, "rate at both ends of the cycle", minimum=0)
    cycle_max_lr: float | None = flag(None, "rate in its middle", minimum=0)
    decay_lr_rate: float | None = flag(None, "decay behind the cycle", minimum=0)
    cycle_first_step_size: int | None = flag(None, "steps up", minimum=1)
    cycle_second_step_size: int | None = flag(None, "steps down; as many as up", minimum=1)
    cycle_first_stair_count: int | None = flag(None, "stairs up; 0: none", minimum=0)
    cycle_second_stair_count: int | None = flag(None, "stairs down", minimum=0)
    decay_step_size: int | None = flag(None, "steps of one decay; 0: none", minimum=0)
    cycle_momentum: bool | None = flag(None, "turn the momentum (beta 1 of Adam) the other way round")
    cycle_min_mom: float | None = flag(None, "momentum in the middle", minimum=0, maximum=0.99999)
    cycle_max_mom: float | None = flag(None, "momentum at both ends", minimum=0, maximum=0.99999)
    decay_mom_rate: float | None = flag(None, "rise of the momentum behind the cycle", minimum=0)


@dataclass(frozen=True)
class LoaderSection:
    """What the loader of training_data does."""

    dataloader_drop_last: bool = flag(False, "leave out a last batch that is not full")


@dataclass(frozen=True)
class MonitorSection:
    """Where numbers are written for people (monitor.py)."""

    csv_monitor: bool = flag(False, "CSV files")
    csv_monitor_output_path: str = flag("", "directory")
    csv_monitor_job_name: str = flag("DeepSpeedJobName", "directory in it")
    tensorboard: bool = flag(False, "TensorBoard")
    tensorboard_output_path: str = flag("", "directory")
    tensorboard_job_name: str = flag("DeepSpeedJobName", "directory in it")


# ---------------------------------------------------------------- the keys


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"wants two numbers such as [0.9, 0.999], not {value!r}")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


def _true_or_false(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError(f"wants true or false, not {value!r}")
    return {}


def _monitor(name: str) -> dict[str, Key]:
    return {"enabled": sets(name)} | {key: sets(f"{name}_{key}") for key in ("output_path", "job_name")}


_OPTIMIZER = {
    "type": sets("optimizer_type"),
    "params.lr": sets("lr"),
    "params.betas": Key(_betas),
    "params.eps": sets("adam_eps"),
    "params.weight_decay": sets("weight_decay"),
    "params.momentum": sets("sgd_momentum"),
    "params.dampening": sets("dampening"),
    "params.nesterov": sets("nesterov"),
    "params.adam_w_mode": sets("adam_w_mode"),
    "params.amsgrad": sets("amsgrad"),
    "params.bias_correction": KEYS["optimizer.params.bias_correction"],
    **no_effect(bool, "params.torch_adam", "params.fused", "params.foreach", "legacy_fusion"),
}
_SCHEDULER = {"type": sets("scheduler_type")} | {
    f"params.{spec.name}": sets(spec.name) for spec in fields_of(SchedulerSection) if spec.name != "scheduler_type"
}
_OWN = {
    **section("optimizer", _OPTIMIZER),
    **section("scheduler", _SCHEDULER),
    "dataloader_drop_last": sets("dataloader_drop_last"),
    **section("csv_monitor", _monitor("csv_monitor")),
    **section("tensorboard", _monitor("tensorboard")),
    "moe.enabled": Key(_true_or_false),
    # the loss is the caller's: MoE hands out l_aux, and he adds it
    **section("moe", no_effect(float, "moe_loss_coeff", "router_z_loss_coeff")),
}
_REPLACED = ("optimizer.", "scheduler", "csv_monitor", "tensorboard")
TABLE = Table(
    {key: value for key, value in KEYS.items() if not key.startswith(_REPLACED)} | _OWN,
    FIELDS
    | {spec.name: spec for group in (OptimizerSection, SchedulerSection, LoaderSection, MonitorSection) for spec in fields_of(group)},
)
# What the moe section may say of the layers: the fields of their MoEConfig, and three that are the wrapper's.
MOE_FIELDS = (
    "num_experts", "moe_expert_parallel_size", "mlp_type", "topk", "moe_train_capacity_factor", "moe_eval_capacity_factor",
    "moe_min_capacity", "moe_token_dropping", "moe_rts", "moe_noisy_gate_policy",
)  # fmt: skip

# ---------------------------------------------------------------- what is made of them


@dataclass(frozen=True)
class EngineConfig:
    """Everything that a JSON settles, checked. The sections hold what was given, by field name."""

    train_batch_size: int
    micro_batch_size: int
    accumulation: int
    zero_stage: int
    half: Literal["float16", "bfloat16"] | None  # what is computed in
    is_stored_in_half: bool  # fp16_master_weights_and_grads
    loss_scale: LossScaleConfig | None  # None but for fp16
    clip_grad: float
    is_offloaded: bool
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    curriculum: CurriculumConfig
    steps_per_print: int | None
    drop_last: bool
    monitor: dict[str, Any]
    moe: dict[str, Any]
    json: DeepSpeedJson


def read_config(source: str | dict[str, Any], ranks: int) -> EngineConfig:
    """From a path or a dict. Raises ConfigError with every problem; what is not acted on is named in one warning."""
    try:
        read = read_deepspeed(source, TABLE)
    except FileNotFoundError:
        raise ConfigError([f"the DeepSpeed config {source} is not there; give the path of a JSON file, or a dict"]) from None
    v, problems = read.values, [*read.problems, *read.not_yet]
    problems += [*_contradictions(v), *scheduler_problems(_section(SchedulerSection, v))]
    curriculum = _built(CurriculumConfig, v, problems)
    if curriculum is not None and curriculum.curriculum_learning and not curriculum.longest(0):
        problems.append("curriculum_learning.max_difficulty is missing: the engine does not know how long the sequences are")
    loss_scale = None
    if v.get("fp16"):  # DeepSpeed starts at 2 ** 16
        loss_scale = _built(LossScaleConfig, {"initial_loss_scale": 2.0**16} | v, problems)
    try:
        sizes = batch_sizes(v.get("global_batch_size"), v.get("micro_batch_size"), v.get("gradient_accumulation_steps"), ranks)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    for warning in read.warnings:
        logger.warning(warning)
    return EngineConfig(
        *sizes,
        zero_stage=v.get("zero_stage", 0),
        half="float16" if v.get("fp16") else "bfloat16" if v.get("bf16") else None,
        is_stored_in_half=v.get("fp16_master_weights_and_grads", False),
        loss_scale=loss_scale,
        clip_grad=v.get("clip_grad", 1.0),
        is_offloaded=v.get("cpu_optimizer", False),
        optimizer=_section(OptimizerSection, v),
        scheduler=_section(SchedulerSection, v),
        curriculum=curriculum,
        steps_per_print=v.get("log_interval"),
        drop_last=v.get("dataloader_drop_last", False),
        monitor=_section(MonitorSection, v),
        moe={name: v[name] for name in MOE_FIELDS if name in v},
        json=read,
    )


def batch_sizes(train: int | None, micro: int | None, steps: int | None, ranks: int) -> tuple[int, int, int]:
    """(train batch, micro batch, accumulation steps) from those that are given: train = micro x steps x ranks."""
    if train is None and micro is None:
        raise ValueError("neither train_batch_size nor train_micro_batch_size_per_gpu is given; give one of them, or both")
    if train is None:
        train = micro * (steps or 1) * ranks
    elif micro is None:
        micro = train // ((steps or 1) * ranks)
    steps = steps or max(train // (micro * ranks or 1), 1)
    if train != micro * steps * ranks:
        raise ValueError(
            f"train_batch_size ({train}) must be train_micro_batch_size_per_gpu ({micro}) x gradient_accumulation_steps ({steps}) x "
            f"data-parallel ranks ({ranks}), which is {micro * steps * ranks}; change one of them, or give two and leave the third out"
        )
    return train, micro, steps


def _contradictions(v: dict[str, Any]) -> Iterator[str]:
    """Between keys."""
    half = v.get("fp16_master_weights_and_grads", False)
    if v.get("fp16") and v.get("bf16"):
        yield "fp16.enabled and bf16.enabled are both true; switch one of them off"
    if half and not v.get("fp16"):
        yield "fp16.fp16_master_weights_and_grads is true and fp16.enabled is not; switch fp16 on, or this off"
    if half and (v.get("optimizer_type") not in ("Adam", "AdamW") or not v.get("adam_w_mode", True) or v.get("amsgrad")):
        yield (
            "fp16.fp16_master_weights_and_grads needs an optimizer section of type AdamW (or Adam with adam_w_mode, without amsgrad): "
            f"its arithmetic is float32 on weights stored in float16; it is {v.get('optimizer_type') or 'not given'}"
        )
    if v.get("optimizer_type") in ("Adam", "AdamW"):
        yield from (f"optimizer.params.{key} is SGD's, and the type is {v['optimizer_type']}; leave it out"
                    for key, name in _OF_SGD.items() if name in v)  # fmt: skip
    if v.get("optimizer_type") == "SGD":
        yield from (f"optimizer.params.{key} is Adam's, and the type is SGD; leave it out" for key, name in _OF_ADAM.items() if name in v)
    if v.get("optimizer_type") is None and (given := _section(OptimizerSection, v)):
        yield f"the optimizer section has parameters ({', '.join(given)}) and no type; give one of Adam, AdamW, SGD"


_OF_SGD = {"momentum": "sgd_momentum", "dampening": "dampening", "nesterov": "nesterov"}
_OF_ADAM = {"betas": "adam_beta1", "eps": "adam_eps", "amsgrad": "amsgrad", "adam_w_mode": "adam_w_mode"}


def _section(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {spec.name: values[spec.name] for spec in fields_of(cls) if spec.name in values}


def _built(cls: type, values: dict[str, Any], problems: list[str]) -> Any:
    """An object of `cls`, or None and its problems, in the words of the JSON."""
    try:
        return cls(**_section(cls, values))
    except ConfigError as error:
        problems += [re.sub(r"--[a-z-]+", lambda m: _KEYS_OF_FLAGS.get(m[0], m[0]), problem) for problem in error.problems]
        return None


_KEYS_OF_FLAGS = {
    "--curriculum-schedule-type": "curriculum_learning.schedule_type",
    "--curriculum-min-difficulty": "curriculum_learning.min_difficulty",
    "--curriculum-max-difficulty": "curriculum_learning.max_difficulty",
    "--curriculum-total-step": "curriculum_learning.schedule_config.total_curriculum_step",
    "--curriculum-difficulty-step": "curriculum_learning.schedule_config.difficulty_step",
    "--curriculum-root-degree": "curriculum_learning.schedule_config.root_degree",
    "--curriculum-difficulty": "curriculum_learning.schedule_config.difficulty",
    "--curriculum-max-step": "curriculum_learning.schedule_config.max_step",
    "--initial-loss-scale": "fp16.initial_scale_power",
    "--min-loss-scale": "fp16.min_loss_scale",
}
