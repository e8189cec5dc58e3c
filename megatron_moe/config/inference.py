"""Which model is used, and on how many ranks: the flags that every tool shares which lets a model answer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class InferenceConfig:
    """Model and layout.

    The layout need not be the one of training: under torchrun, the ranks are as many as the two degrees need together.
    """

    load: str | None = flag(None, "run directory (its newest checkpoint), or one iter_ directory", metavar="DIR")
    ckpt_step: int | None = flag(None, "the checkpoint of this iteration and no other", names=("load-iteration",), minimum=0)
    ckpt_verify: Literal["crc", "size", "off"] = flag("crc", "how the checkpoint is checked before it is loaded")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto takes a GPU if there is one")
    tensor_model_parallel_size: int = flag(
        1, "tensor-parallel degree (TP): ranks that share each layer's matrices", names=("model-parallel-size",), minimum=1
    )
    moe_expert_parallel_size: int = flag(
        1,
        "expert-parallel degree (EP): ranks that share the experts; a layer with fewer experts uses fewer",
        names=("expert-model-parallel-size",),
        minimum=1,
    )
    expert_cache_gb: float | None = flag(
        None, "leave the experts on the disk, and keep so many GB (10^9 bytes) of them in the memory of each process, those used last: for a "
        "model that is larger than memory", above=0
    )  # fmt: skip

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.load:
            yield "--load DIR is missing: the directory given to --save in training"

    @property
    def ranks(self) -> int:
        """TP and EP are folded over the same ranks: TP 2 with EP 2 needs two, TP 2 with EP 3 six."""
        return math.lcm(self.tensor_model_parallel_size, self.moe_expert_parallel_size)

    @property
    def expert_cache_bytes(self) -> int | None:
        return None if self.expert_cache_gb is None else int(self.expert_cache_gb * 1e9)

    def rank_problems(self, world_size: int) -> Iterator[str]:
        """What is wrong with so many processes."""
        if world_size != self.ranks:
            degrees = (f"--tensor-model-parallel-size {self.tensor_model_parallel_size} and --moe-expert-parallel-size "
                       f"{self.moe_expert_parallel_size}")  # fmt: skip
            yield (f"{degrees} are for {self.ranks} processes, and {world_size} {'is' if world_size == 1 else 'are'} running; start "
                   f"torchrun --nproc-per-node {self.ranks}, or change the degrees")  # fmt: skip


def is_first_rank() -> bool:
    """Whether this process is the one that speaks; also before, or without, a process group."""
    return os.environ.get("RANK", "0") == "0"
