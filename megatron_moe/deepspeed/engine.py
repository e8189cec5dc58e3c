"""The engine: a module that any loop of the caller trains, with DeepSpeed's method names.

    loss = engine(batch)      any forward of the module
    engine.backward(loss)     gradients of loss / (ranks x accumulation), times the loss scale; summed over ranks, never averaged
    engine.step()             behind the last micro-batch of a step: norm, clip, update or skip, schedule. Else nothing

The caller's loss is a mean over what his rank has; the loss of a step is the mean of those, over ranks and micro-batches. That divisor is
an argument of `training.step.backward`, and what follows is `training.step.update`: those of pretraining, which divides by tokens.

The host waits for the device in `step` under fp16 alone: a schedule on the host must know whether the step was skipped.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler

from megatron_moe.deepspeed import checkpoint
from megatron_moe.deepspeed.config import EngineConfig
from megatron_moe.deepspeed.data import ShareLoader
from megatron_moe.deepspeed.monitor import Monitor
from megatron_moe.deepspeed.optimizers import Watch
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.parallel.zero import reshard, sync_gradients
from megatron_moe.training.step import backward, update
from megatron_moe.utils.logging import logger


class DeepSpeedEngine(nn.Module):
    """Made by `initialize`. Attributes of the module are reached through it."""

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        mesh: ParallelMesh,
        device: torch.device,
        cpu_group: dist.ProcessGroup,
        optimizer: Optimizer | None,
        lr_scheduler: Any,
    ):
        super().__init__()
        self.module, self.mesh, self.device, self.cpu_group = module, mesh, device, cpu_group
        self._config, self.optimizer, self.lr_scheduler = config, optimizer, lr_scheduler
        self.training_dataloader: ShareLoader | None = None
        self.compute_dtype = getattr(torch, config.half) if config.half else None
        self.scaler = None if config.loss_scale is None else LossScale(config.loss_scale, device)
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self.accumulated = 0  # micro-batches since the last update
        self._sizes = [config.train_batch_size, config.micro_batch_size, config.accumulation]
        self._boundary: bool | None = None  # the caller's word for it, once he has given it
        self._backwards, self._is_synced, self._is_held = 0, False, False
        self._norm: Tensor | None = None
        self._applied = False
        self._watch = None if optimizer is None else Watch(optimizer, module)
        self.monitor = Monitor(config.monitor)
        self._losses: list[Tensor] = []  # of this step, for the monitor
        if config.curriculum.curriculum_learning:
            _check_takes_length(module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    # ------------------------------------------------------------ the loop

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._config.curriculum.curriculum_learning and self.module.training:
            kwargs["curriculum_seqlen"] = self.curriculum_seqlen
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Returns the loss over the accumulation steps, as it was differentiated but for the ranks and the scale."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"backward() wants the loss, one number, and was given {what}; take the mean over the batch first")
        if not loss.requires_grad:
            raise ValueError("backward() was given a loss without a graph; compute it from the engine's output, outside of torch.no_grad()")
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        self._is_synced = self.is_gradient_accumulation_boundary() and not self._is_held
        sync_gradients(self.module, self.mesh.zero_stage, self._is_synced)
        loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
        scale = None if self.scaler is None else self.scaler.scale
        backward(loss, scale, divisor=self.dp_world_size * steps, retain_graph=retain_graph)
        self._backwards += 1
        if self.monitor.enabled:
            self._losses.append(loss.detach() / steps)
        return loss / steps

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Once behind each micro-batch; updates behind the last of a step."""
        if self._is_held:
            raise ValueError(
                "step() inside of no_sync(): the gradients are not summed yet; leave the block, or run the last micro-batch outside"
            )
        if not self._backwards:
            raise ValueError("step() without backward(): there are no gradients; call engine.backward(loss) for each micro-batch first")
        is_boundary = self.is_gradient_accumulation_boundary()
        if is_boundary:
            if not self._is_synced:
                raise ValueError(
                    "step() would update, and at backward() this was no gradient accumulation boundary, so ranks have not exchanged their "
                    "gradients; call set_gradient_accumulation_boundary(True) before backward()"
                )
            self._update(lr_kwargs or {})
        self.micro_steps += 1
        self.accumulated = 0 if is_boundary else self.accumulated + 1
        self._backwards = 0
        self._applied = self._applied and is_boundary

    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        if self.optimizer is None:
            raise ValueError("step() and there is no optimizer; give initialize() one, or an optimizer section in the config")
        reshard(self.module)  # an evaluation since the backward has gathered the weights, which are about to change
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in parameters):
            raise ValueError(
                "no parameter of the optimizer has a gradient; compute the loss from the engine's output, with these parameters"
            )
        if self._watch is not None:
            self._watch.before()
        for p in parameters:  # as every rank of several has it: what was not used has a gradient of zero
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        self._norm, found_inf = update(self.optimizer, parameters, parameters, self.mesh.stage_ranks, self._config.clip_grad, self.scaler)
        self.module.zero_grad(set_to_none=True)  # also what no group has
        self._applied = found_inf is None or not found_inf  # the host waits: fp16 alone has a scale
        if self._applied:
            self._look_once()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self._report()

    def _look_once(self) -> None:
        if self._watch is not None:
            self._watch.after()
            self._watch = None

    def _report(self) -> None:
        every = self._config.steps_per_print
        if every and self.global_steps % every == 0:
            scale = "" if self.scaler is None else f", loss scale {self.loss_scale:g}"
            logger.info("step %d, skipped %d, lr %s%s", self.global_steps, self.skipped_steps, self.get_lr(), scale)
        if self.monitor.enabled:  # the host waits for the loss
            events = {"train_loss": sum(self._losses).item(), "lr": self.get_lr()[0], "loss_scale": self.loss_scale}
            self.monitor.write_events([(f"Train/Samples/{name}", value, self.global_samples) for name, value in events.items()])
        self._losses.clear()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside do not exchange gradients; those of the next one outside do, with what is here."""
        if self.mesh.zero_stage >= 2:
            raise ValueError(
                f"no_sync() needs whole gradients on every rank, and ZeRO {self.mesh.zero_stage} keeps shards of them; use stage 0 or 1"
            )
        before, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = before

    # ------------------------------------------------------------ accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand is the last one of its step."""
        return self.accumulated + 1 >= self.gradient_accumulation_steps() if self._boundary is None else self._boundary

    @property
    def is_within_a_step(self) -> bool:
        """Whether there are gradients that no update has used."""
        return bool(self.accumulated or self._backwards)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on, whatever has been counted; before backward()."""
        self._boundary = bool(is_boundary)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """By more or fewer micro-batches in a step. Between steps."""
        share = self.train_micro_batch_size_per_gpu() * self.dp_world_size
        if train_batch_size < 1 or train_batch_size % share:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}): must be a multiple of micro batch x ranks "
                f"({self.train_micro_batch_size_per_gpu()} x {self.dp_world_size} = {share})"
            )
        if self.is_within_a_step:
            raise ValueError(
                f"set_train_batch_size({train_batch_size}) in the middle of a step: its gradients are divided by the old one; call it behind the update"
            )
        self._sizes[0], self._sizes[2] = train_batch_size, train_batch_size // share

    def train_batch_size(self) -> int:
        return self._sizes[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._sizes[1]

    def gradient_accumulation_steps(self) -> int:
        return self._sizes[2]

    # ------------------------------------------------------------ what has happened

    def was_step_applied(self) -> bool:
        """Whether the last `step` updated the weights: not between steps, and not where an overflow skipped it."""
        return self._applied

    def get_global_grad_norm(self) -> float | None:
        """Of the last step, before clipping; None before the first. Not finite where the step was skipped."""
        return None if self._norm is None else self._norm.item()

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.scale.item()

    @property
    def curriculum_seqlen(self) -> int:
        """Tokens per sequence of the step at hand, with curriculum_learning."""
        return self._config.curriculum.length(self.global_steps + 1, self._config.curriculum.longest(0))

    def get_lr(self) -> list[float]:
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get("betas", group.get("momentum")) for group in groups]

    # ------------------------------------------------------------ what it is

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def local_rank(self) -> int:
        return self.device.index or 0 if self.device.type == "cuda" else _environment_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def dp_world_size(self) -> int:
        return self.mesh.size("dp")

    @property
    def mp_world_size(self) -> int:
        return self.mesh.size("tp")

    def zero_optimization_stage(self) -> int:
        return self.mesh.zero_stage

    def zero_optimization(self) -> bool:
        return self.mesh.zero_stage > 0

    def fp16_enabled(self) -> bool:
        return self.compute_dtype == torch.float16

    def bfloat16_enabled(self) -> bool:
        return self.compute_dtype == torch.bfloat16

    def gradient_clipping(self) -> float:
        return self._config.clip_grad

    def dynamic_loss_scale(self) -> bool:
        return self.scaler is not None and not self.scaler.is_fixed

    def steps_per_print(self) -> int | None:
        return self._config.steps_per_print

    def module_state_dict(self) -> dict[str, Any]:
        """Of the module, under DeepSpeed's names."""
        reshard(self.module)
        return self.module.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none)

    # ------------------------------------------------------------ data, checkpoints

    def deepspeed_io(
        self,
        dataset: Dataset,
        batch_size: int | None = None,
        pin_memory: bool = True,
        data_sampler: Sampler | None = None,
        collate_fn: Callable[[list], Any] | None = None,
        num_local_io_workers: int = 0,
    ) -> ShareLoader:
        """A loader of this rank's share of a data set."""
        size = self.train_micro_batch_size_per_gpu() if batch_size is None else batch_size
        return ShareLoader(dataset, size, self.mesh.rank("dp"), self.dp_world_size, collate_fn, self._config.drop_last, pin_memory,
                           data_sampler, num_local_io_workers)  # fmt: skip

    def save_checkpoint(self, save_dir: str | Path, tag: str | None = None, client_state: dict[str, Any] | None = None, save_latest: bool = True,
                        exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        """By all ranks. See checkpoint.py."""
        return checkpoint.save(self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(
        self, load_dir: str | Path, tag: str | None = None, load_module_strict: bool = True, load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
        """By all ranks: (path, client_state), or (None, None) where nothing was saved."""
        if custom_load_fn is not None:
            raise ValueError("custom_load_fn gets a whole state_dict on every rank, which no rank has here; load, then change the module")
        return checkpoint.load(self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only)

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """By all ranks: whole weights in one file."""
        return checkpoint.save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)

    def after_load(self) -> None:
        """A step begins: gradients of before are not those of what was loaded."""
        self.zero_grad()
        self.accumulated = self._backwards = 0


def _environment_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _check_takes_length(module: nn.Module) -> None:
    """ValueError where nobody would shorten the sequences."""
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(p.name == "curriculum_seqlen" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"curriculum_learning gives the length to the model as curriculum_seqlen, and {type(module).__name__}.forward does not take it; add the "
            f"argument and cut the sequences to it, or leave the section out"
        )
