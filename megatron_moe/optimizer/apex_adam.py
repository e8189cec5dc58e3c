"""AdamW by NVIDIA apex's fused kernel, for who has apex. torch's own fused AdamW is the default, and makes the same step.

apex is built from https://github.com/NVIDIA/apex with its CUDA extensions. The project called apex on the package index is another
one, without `apex.optimizers`; so apex is in no list of requirements here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megatron_moe.config.training import OptimizerConfig


def find_fused_adam() -> type | None:
    """apex's FusedAdam; None without apex, or with the other project of that name."""
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, SyntaxError, AttributeError):
        return None
    return FusedAdam


def apex_problems(config: OptimizerConfig) -> Iterator[str]:
    if config.optimizer == "adam" and config.adam_kernel == "apex" and find_fused_adam() is None:
        yield ("--adam-kernel apex needs NVIDIA's apex, built from https://github.com/NVIDIA/apex with its CUDA extensions (the apex of the "
               "package index is another project); install it, or leave the flag out: torch's kernel makes the same step")  # fmt: skip


class ApexAdamW(Optimizer):
    """apex knows no sharded tensors: it is handed the shards. State and rates are kept here, as those of torch's AdamW are."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, fused_adam: type):
        super().__init__(groups, {"lr": config.lr})
        self.shards = {p: nn.Parameter(_local(p).detach(), p.requires_grad) for group in self.param_groups for p in group["params"]}
        of_shards = [{"params": [self.shards[p] for p in group["params"]]} for group in self.param_groups]
        betas = (config.adam_beta1, config.adam_beta2)
        self.kernel = fused_adam(of_shards, lr=config.lr, betas=betas, eps=config.adam_eps, adam_w_mode=True)
        self.steps: list[int | None] = [None] * len(self.param_groups)  # so far, by group: apex counts on the host

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for i, (group, of_shards) in enumerate(zip(self.param_groups, self.kernel.param_groups)):
            for p in group["params"]:
                self._hand_over(p)
            if self.steps[i] is None:
                self.steps[i] = int(self.state[group["params"][0]]["step"])  # of a checkpoint, maybe
            of_shards |= {"lr": group["lr"], "weight_decay": group["weight_decay"], "step": self.steps[i]}
        self.kernel.step()
        for i, group in enumerate(self.param_groups):
            self.steps[i] += 1
            for p in group["params"]:
                self.state[p]["step"] += 1

    def _hand_over(self, p: nn.Parameter) -> None:
        shard, state = self.shards[p], self.state[p]
        if not state:
            state.update(zero_state(p))
        shard.data = _local(p)  # FSDP lays uneven shards anew before the first forward
        shard.grad = None if p.grad is None else _local(p.grad)
        self.kernel.state[shard] = {name: _local(state[name]) for name in ("exp_avg", "exp_avg_sq")}


def zero_state(p: nn.Parameter) -> dict[str, Tensor]:
    """Of a parameter before its first step."""
    moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32)} | moments


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t
