"""How the work is split over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism."""

    tensor_model_parallel_size: int = flag(
        1, "tensor-parallel degree (TP): ranks that share each layer's matrices", names=("model-parallel-size",), minimum=1
    )
    pipeline_model_parallel_size: int = flag(1, "pipeline-parallel degree (PP)", minimum=1, not_yet="pipeline parallelism")
    context_parallel_size: int = flag(
        1, "context-parallel degree (CP): ranks that share each sequence; every one gathers the keys and values of all of it", minimum=1
    )
    expert_tensor_parallel_size: int = flag(
        1, "tensor-parallel degree inside an expert (ETP)", minimum=1, not_yet="expert tensor parallelism"
    )
    enable_expert_tensor_parallelism: bool = flag(
        False, "shard each expert over the tensor-parallel ranks", not_yet="expert tensor parallelism"
    )
    sequence_parallel: bool = flag(
        False, "keep a part of each sequence on every tensor-parallel rank between attention and MLP: smaller activations, as much traffic"
    )
    zero_stage: int = flag(
        1, "ZeRO stage through FSDP2: 0 replicas; 1 shard optimizer state and keep whole gradients until the last microbatch; "
        "2 reduce-scatter each microbatch; 3 gather parameters again in the backward", minimum=0, maximum=3)  # fmt: skip
    num_distributed_optimizer_instances: int = flag(
        1, "hybrid sharding (HSDP): ZeRO shards parameters, gradients and optimizer state over each of so many equal parts of the "
        "data ranks - say, nodes - and the parts are replicas; ZeRO 0 is all replicas without it", minimum=1,
        names=("data-parallel-replicate-degree",),
    )  # fmt: skip
    distributed_backend: Literal["auto", "nccl", "gloo"] = flag("auto", "collectives: nccl on CUDA, gloo elsewhere")
    distributed_timeout_minutes: float = flag(10.0, "a collective that takes longer ends the run", above=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.zero_stage == 0 and self.num_distributed_optimizer_instances > 1:
            yield (f"--num-distributed-optimizer-instances ({self.num_distributed_optimizer_instances}) replicates what ZeRO shards, and "
                   f"--zero-stage 0 shards nothing; use --zero-stage 1, 2 or 3, or leave it out")  # fmt: skip

    @property
    def sequence_unit(self) -> int:
        """What the length of a sequence must be a multiple of: two chunks for each context-parallel rank, and equal runs of what a rank
        has for each tensor-parallel rank under sequence parallelism."""
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size if self.sequence_parallel else 1
        return math.lcm(2 * cp if cp > 1 else 1, cp * tp)

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
