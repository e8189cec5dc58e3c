"""A layout: how one model is laid out over ranks, as numbers and as flags. Whether it is valid only the configuration says."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.flags import ConfigError, words_of
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import FIELDS, RunConfig
from megatron_moe.config.training import TrainingConfig

# What a layout calls an axis -> the setting that it is.
SETTINGS = {
    "tp": "tensor_model_parallel_size",
    "sp": "sequence_parallel",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "virtual": "num_layers_per_virtual_pipeline_stage",
    "ep": "moe_expert_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "zero": "zero_stage",
    "replicas": "num_distributed_optimizer_instances",
    "micro_batch": "micro_batch_size",
    "recompute": "recompute_granularity",
}
_OWNERS = {name: cls for cls in (ParallelConfig, MoEConfig, TrainingConfig) for name in (f.name for f in dataclasses.fields(cls))}
# Other spellings of the same, which would contradict what a layout says.
_NEUTRAL = {
    "enable_expert_tensor_parallelism": False, "checkpoint_activations": False, "recompute_activations": False,
    "gradient_accumulation_steps": None,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """`virtual`: layers of a virtual pipeline stage, None where a rank has one stage. `replicas`: of hybrid sharding. `ep`: the largest
    degree, of which a layer with fewer experts takes a part."""

    devices: int
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    virtual: int | None = None
    ep: int = 1
    etp: int = 1
    zero: int = 1
    replicas: int = 1
    micro_batch: int = 1
    recompute: str | None = None

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.devices // self.pp

    @property
    def data_ranks(self) -> int:
        """Ranks over which dense parameters are sharded or replicated: dp x cp."""
        return self.stage_ranks // self.tp

    @property
    def dp(self) -> int:
        return self.data_ranks // self.cp

    def shards(self, ranks: int) -> int:
        """Over how many of `ranks` data ranks a parameter is cut (mpu/mesh.py): none in stage 0, a part of them in hybrid sharding."""
        if self.zero == 0:
            return 1
        return ranks // math.gcd(self.replicas, ranks)

    @property
    def at_rest(self) -> Layout:
        """What parameters and optimizer state depend on."""
        return dataclasses.replace(self, micro_batch=1, recompute=None, sp=False)

    @property
    def of_tokens(self) -> Layout:
        """What the activations of a micro-batch depend on."""
        return dataclasses.replace(self, zero=1, replicas=1)

    def microbatches(self, global_batch: int) -> int:
        return max(global_batch // (self.micro_batch * self.dp), 1)

    def chunks(self, num_layers: int) -> int:
        """Pipeline stages on a rank."""
        return max(num_layers // self.pp // self.virtual, 1) if self.virtual else 1

    def layers_of_rank(self, num_layers: int, rank: int) -> list[int]:
        """The layers, from 1, of a pipeline rank: stage s is on rank s mod PP. Where they do not divide, the stages in the middle take
        one more, then the first, never the last."""
        stages = self.pp * self.chunks(num_layers)
        each, more = divmod(num_layers, stages)
        order = sorted(range(stages), key=lambda s: (s == stages - 1, s == 0, s))
        sizes = [each + (order.index(s) < more) for s in range(stages)]
        starts = [sum(sizes[:s]) for s in range(stages)]
        return [starts[s] + i + 1 for s in range(rank, stages, self.pp) for i in range(sizes[s])]

    # ------------------------------------------------------------ as settings

    def settings(self) -> dict[str, Any]:
        """By name of the setting; those that do not exist are left out, and are at their default."""
        values = {name: getattr(self, axis) for axis, name in SETTINGS.items()}
        return {name: value for name, value in values.items() if name in FIELDS}

    def applied(self, run: RunConfig) -> RunConfig:
        """`run` in this layout; raises ConfigError. A global batch that `run` leaves open stays open."""
        values: dict[type, dict[str, Any]] = {ParallelConfig: {}, MoEConfig: {}, TrainingConfig: {}}
        for name, value in {**_NEUTRAL, **self.settings()}.items():
            if name in _OWNERS:
                values[_OWNERS[name]][name] = value
        parallel = _replaced(run.parallel, tuple(values[ParallelConfig].items()))
        moe = _replaced(run.moe, tuple(values[MoEConfig].items()))
        training = _replaced(run.training, tuple(values[TrainingConfig].items()))
        return dataclasses.replace(run, parallel=parallel, moe=moe, training=training)

    def problems(self, run: RunConfig) -> list[str]:
        """Why `run` cannot be trained in this layout: what its configuration says, all of it. `run` has its global batch."""
        try:
            laid_out = self.applied(run)
        except ConfigError as error:
            return error.problems
        return list(laid_out.world_problems(self.devices))

    def flags(self, command: RunConfig) -> list[str]:
        """The words that, behind those of `command`, make it this layout at its global batch: the last word counts."""
        target = self.applied(command).training
        steps = None
        if command.training.gradient_accumulation_steps is not None:
            steps = self.microbatches(target.global_batch_size)
        wanted = {**_NEUTRAL, **self.settings(), "gradient_accumulation_steps": steps}
        out: list[str] = []
        for name, value in wanted.items():
            has = next(getattr(g, name) for g in (command.parallel, command.moe, command.training) if hasattr(g, name))
            is_shown = name in ("zero_stage", "micro_batch_size") or value != FIELDS[name].default
            if value is not None and (is_shown or value != has):
                out += words_of(FIELDS[name], value)
        return out

    def __str__(self) -> str:
        parts = [f"TP {self.tp}{' SP' if self.sp else ''}" if self.tp > 1 else "", f"CP {self.cp}" if self.cp > 1 else ""]
        parts.append(f"PP {self.pp}{f' x {self.virtual} layers' if self.virtual else ''}" if self.pp > 1 else "")
        parts += [f"EP {self.ep}" if self.ep > 1 else "", f"ETP {self.etp}" if self.etp > 1 else "", f"DP {self.dp}"]
        parts.append(f"ZeRO {self.zero}{f' x {self.replicas} parts' if self.replicas > 1 else ''}")
        parts += [f"micro-batch {self.micro_batch}", f"recompute {self.recompute or 'none'}"]
        return ", ".join(p for p in parts if p)


def exists(axis: str) -> bool:
    """Whether this version has the setting at all."""
    return SETTINGS[axis] in FIELDS


def of_run(run: RunConfig, devices: int) -> Layout:
    """The layout that a run's own settings describe."""
    values = {}
    for axis, name in SETTINGS.items():
        for group in (run.parallel, run.moe, run.training):
            if hasattr(group, name):
                values[axis] = getattr(group, name)
    return Layout(devices, **values | {"recompute": run.training.recompute})


def divisors_up_to(n: int, most: int) -> Iterator[int]:
    return (d for d in range(1, min(n, most) + 1) if n % d == 0)


@functools.lru_cache(maxsize=4096)
def _replaced(group: Any, changes: tuple[tuple[str, Any], ...]) -> Any:
    return dataclasses.replace(group, **dict(changes))
