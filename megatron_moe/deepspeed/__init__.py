"""DeepSpeed's front door on this runtime: scripts of DeepSpeed-MoE run after their import lines are changed.

    from megatron_moe import deepspeed
    from megatron_moe.deepspeed.moe.layer import MoE

    engine, optimizer, loader, _ = deepspeed.initialize(args=args, model=Net(), model_parameters=parameters, training_data=images)
    for images, labels in loader:
        loss = criterion(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()

Start it with torchrun, or with plain python for one process. docs/from_deepspeed.md says what else is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from megatron_moe import mpu as process_groups
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.deepspeed import moe, optimizers, utils
from megatron_moe.deepspeed.config import EngineConfig, read_config
from megatron_moe.deepspeed.data import ShareLoader
from megatron_moe.deepspeed.engine import DeepSpeedEngine
from megatron_moe.deepspeed.moe import layer as _layer  # noqa: F401  deepspeed.moe.layer is there without an import of its own
from megatron_moe.deepspeed.moe import utils as _moe_utils  # noqa: F401
from megatron_moe.deepspeed.parallelise import Storage, check_layers, check_module, expert_degrees, names_of, parallelise, place
from megatron_moe.deepspeed.schedulers import build_scheduler
from megatron_moe.deepspeed.utils import groups as _groups  # noqa: F401
from megatron_moe.mpu.mesh import build_mesh
from megatron_moe.training import distributed
from megatron_moe.utils.logging import logger, setup_logging

__all__ = ["DeepSpeedEngine", "add_config_arguments", "init_distributed", "initialize", "moe", "utils"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
    training_data: Dataset | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    config: str | Path | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | dict[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Optimizer | None, ShareLoader | None, Any]:
    """(engine, optimizer, loader of training_data, schedule). Collective.

    An optimizer or a schedule of the caller wins over the section of the config, as in DeepSpeed; a warning says so. The caller's
    optimizer goes on as the same object, over the sharded parameters.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"initialize(model=...) wants a torch.nn.Module, not {type(model).__name__}")
    if mesh_param is not None:
        raise ValueError(f"initialize(mesh_param={mesh_param!r}): sequence parallelism of a module of one's own is not built; leave it out")
    _check_no_model_parallelism(mpu)
    source = _config_source(args, config if config is not None else config_params)
    check_module(model)
    device = _start(distributed_port, dist_init_required)
    settings = read_config(source, dist.get_world_size())
    spelled = {name: settings.json.origin(name).key for name in settings.moe}
    check_layers(model, settings.moe, spelled)
    degrees = expert_degrees(model, settings.moe, dist.get_world_size())
    storage = Storage(getattr(torch, settings.half) if settings.half else None, settings.is_stored_in_half, _is_offloaded(settings, device))
    names = names_of(model)
    groups = _checked_groups(optimizer, model_parameters, model, names, settings)
    _check_schedule(lr_scheduler, optimizer)

    mesh = build_mesh(device.type, 1, degrees.values(), settings.zero_stage)
    process_groups.set_default_mesh(mesh)
    place(model, device, storage)
    parallelise(model, mesh, degrees, storage)
    optimizer = _optimizer(optimizer, groups, names, model, settings, device)
    lr_scheduler = _schedule(lr_scheduler, optimizer, settings)
    engine = DeepSpeedEngine(model, settings, mesh, device, _cpu_group(device), optimizer, lr_scheduler)
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    _say(engine, degrees)
    return engine, optimizer, engine.training_dataloader, lr_scheduler


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta = timedelta(minutes=30),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """The process group: torchrun's ranks, or a world of one. Nothing where there is one already.

    Ranks come from the environment alone: `auto_mpi_discovery` finds none here, and `init_method`, `rank` and `world_size` are taken
    when they are given together.
    Where nobody has set up Python's logging, rank 0 writes what it has to say to stderr from now on.
    """
    if not logger.hasHandlers():
        setup_logging()
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise ValueError(
            "dist_init_required is False and torch.distributed is not initialised; initialise it first, or leave the argument out"
        )
    if dist_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"dist_backend must be nccl or gloo, not {dist_backend!r}; leave it out for what the device has")
    if "OMPI_COMM_WORLD_RANK" in os.environ and "RANK" not in os.environ and auto_mpi_discovery:
        raise ValueError("started by mpirun, which is not read here; start with torchrun")
    if init_method is not None or rank >= 0 or world_size >= 0:
        if init_method is None or rank < 0 or world_size < 1:
            raise ValueError(
                f"init_method ({init_method}), rank ({rank}) and world_size ({world_size}) must be given together, or none of them"
            )
        dist.init_process_group(dist_backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
    else:
        if "RANK" in os.environ:
            os.environ.setdefault("MASTER_PORT", str(distributed_port))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        minutes = timeout.total_seconds() / 60
        distributed.init_distributed(ParallelConfig(distributed_backend=dist_backend or "auto", distributed_timeout_minutes=minutes))
    if verbose:
        logger.info("%d ranks, backend %s", dist.get_world_size(), dist.get_backend())


def add_config_arguments(parser: Any) -> Any:
    """--deepspeed and --deepspeed_config, under the old names too. Returns the parser."""
    group = parser.add_argument_group("DeepSpeed", "where the engine's settings come from")
    group.add_argument("--deepspeed", "--deepscale", default=False, action="store_true", help="scripts ask for this; the engine does not")
    group.add_argument(
        "--deepspeed_config", "--deepscale_config", default=None, type=str, metavar="FILE.json", help="settings of the engine"
    )
    return parser


# ---------------------------------------------------------------- before anything starts


def _config_source(args: Any, config: str | Path | dict[str, Any] | None) -> str | dict[str, Any]:
    """The one place that settings come from."""
    from_args = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    if config is not None and from_args is not None:
        shown = "a dict" if isinstance(config, dict) else config
        raise ValueError(f"both config ({shown}) and args.deepspeed_config ({from_args}) are given; drop one")
    source = from_args if config is None else config
    if source is None:
        raise ValueError("there is no config; give initialize(config=...) a dict or the path of a JSON file, or args a deepspeed_config")
    if not isinstance(source, str | Path | dict):
        raise ValueError(f"config must be a dict or a path, not a {type(source).__name__}")
    return source if isinstance(source, dict) else str(source)


def _check_no_model_parallelism(mpu: Any) -> None:
    if mpu is None:
        return
    names = ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size", "get_pipeline_model_parallel_world_size")
    sizes = {name: getattr(mpu, name)() for name in names if hasattr(mpu, name)}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            f"initialize(mpu=...) says {sizes}: a module of one's own is not split over tensor- or pipeline-parallel ranks here; use 1, or train "
            f"GPT with pretrain_gpt_moe.py"
        )


def _checked_groups(
    optimizer: Any, parameters: Any, model: nn.Module, names: dict[int, str], settings: EngineConfig
) -> list[dict[str, Any]] | None:
    """What an optimizer is to be made over, in groups of the parameters before sharding; None where there is one, or none is wanted."""
    if optimizer is not None and settings.is_stored_in_half:
        raise ValueError(
            "fp16_master_weights_and_grads has an AdamW of its own, whose arithmetic is float32; give initialize() no optimizer, and let the "
            "optimizer section of the config say its rate"
        )
    if isinstance(optimizer, Optimizer):
        optimizers.check_groups(optimizer.param_groups, names, "the optimizer")
        return None
    if optimizer is not None and not callable(optimizer):
        raise ValueError(f"optimizer must be a torch optimizer, or a function from parameters to one, not a {type(optimizer).__name__}")
    if optimizer is None and not settings.optimizer:
        return None
    groups = optimizers.groups_of(parameters, model)
    optimizers.check_groups(groups, names, "model_parameters")
    return groups


def _check_schedule(lr_scheduler: Any, optimizer: Any) -> None:
    if lr_scheduler is None or (callable(lr_scheduler) and not hasattr(lr_scheduler, "step")):
        return
    if not hasattr(lr_scheduler, "step"):
        raise ValueError(
            f"lr_scheduler must have a step(), or be a function from the optimizer to one that has, not a {type(lr_scheduler).__name__}"
        )
    if getattr(lr_scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("the lr_scheduler belongs to another optimizer than the one that initialize() is given; make it from that one, or pass a "
                         "function from the optimizer to a scheduler")  # fmt: skip


# ---------------------------------------------------------------- steps of the start


def _start(port: int, is_required: bool | None) -> torch.device:
    """Ranks, and the device of this one."""
    init_distributed(distributed_port=port, dist_init_required=is_required, verbose=False)
    has_nccl = torch.cuda.is_available() and "nccl" in str(dist.get_backend_config())
    return torch.device("cuda", torch.cuda.current_device()) if has_nccl else torch.device("cpu")


def _cpu_group(device: torch.device) -> dist.ProcessGroup:
    """gloo on every device: checkpoints stay off the compute stream."""
    return dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD


def _is_offloaded(settings: EngineConfig, device: torch.device) -> bool:
    if settings.is_offloaded and device.type == "cpu":
        logger.warning("offload to the host has no effect on a CPU: what it moves is there already")
    return settings.is_offloaded and device.type != "cpu"


def _optimizer(
    optimizer: Any,
    groups: list[dict[str, Any]] | None,
    names: dict[int, str],
    model: nn.Module,
    settings: EngineConfig,
    device: torch.device,
) -> Optimizer | None:
    """Over the sharded parameters."""
    if optimizer is not None and settings.optimizer:
        logger.warning("the optimizer section of the config gives way to the optimizer that initialize() was given")
    if isinstance(optimizer, Optimizer):
        optimizers.move_optimizer(optimizer, names, model, device)
        return optimizer
    if groups is None:
        return None
    now = optimizers.rebuilt(groups, names, model)
    if optimizer is not None:
        return optimizer(now)
    return optimizers.build_optimizer(settings.optimizer, now, settings.is_stored_in_half)


def _schedule(lr_scheduler: Any, optimizer: Optimizer | None, settings: EngineConfig) -> Any:
    if lr_scheduler is None:
        if settings.scheduler and optimizer is None:
            raise ValueError("the config has a scheduler and there is no optimizer; give an optimizer section, or an optimizer")
        return build_scheduler(settings.scheduler, optimizer) if settings.scheduler else None
    if settings.scheduler:
        logger.warning("the scheduler section of the config gives way to the lr_scheduler that initialize() was given")
    return lr_scheduler if hasattr(lr_scheduler, "step") else lr_scheduler(optimizer)


def _say(engine: DeepSpeedEngine, degrees: dict[str, int]) -> None:
    layers = ", ".join(f"{name or 'the model'}: {degree}" for name, degree in degrees.items())
    logger.info(
        "ranks %d, ZeRO %d, %s; batch %d = micro-batch %d x steps %d x ranks %d; clipping at %g; %s",
        engine.world_size, engine.zero_optimization_stage(), engine.compute_dtype or "computed in the model's own type",
        engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps(), engine.dp_world_size,
        engine.gradient_clipping(), f"expert-parallel degree of {layers}" if layers else "no MoE layer",
    )  # fmt: skip
