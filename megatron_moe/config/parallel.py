"""How the work is split over ranks."""

from __future__ import annotations

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
    pipeline_model_parallel_size: int = flag(1, "pipeline-parallel degree (PP): ranks that hold the layers one after the other", minimum=1)
    pipeline_schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zero-bubble"] = flag(
        "auto", "order of the micro-batches on a pipeline stage. 1f1b: one forward, one backward; gpipe: all forwards first; interleaved: "
        "1f1b over several stages per rank; zero-bubble: the backward of the weights fills the gaps (ZB1P, arXiv 2401.10241), not with "
        "ZeRO 3. auto: interleaved with virtual stages, else 1f1b"
    )  # fmt: skip
    enable_zbh1_pipeline: bool = flag(False, "--pipeline-schedule zero-bubble, as Megatron-DeepSpeed spells it")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers of a stage where each rank holds several: stage s is on rank s mod PP (interleaved schedules)", minimum=1
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "layers of the first pipeline stage, which has the embedding too; the rest is spread evenly, and where that does not divide "
        "the stages in the middle take one more, then the first, never the last", minimum=1
    )  # fmt: skip
    decoder_last_pipeline_num_layers: int | None = flag(None, "layers of the last pipeline stage, which has the logits too", minimum=1)
    context_parallel_size: int = flag(1, "context-parallel degree (CP)", minimum=1, not_yet="context parallelism")
    expert_tensor_parallel_size: int = flag(
        1, "tensor-parallel degree inside an expert (ETP)", minimum=1, not_yet="expert tensor parallelism"
    )
    enable_expert_tensor_parallelism: bool = flag(
        False, "shard each expert over the tensor-parallel ranks", not_yet="expert tensor parallelism"
    )
    sequence_parallel: bool = flag(False, "shard activations between the tensor-parallel regions", not_yet="sequence parallelism")
    zero_stage: int = flag(
        1, "ZeRO stage through FSDP2: 0 replicas; 1 shard optimizer state and keep whole gradients until the last microbatch; "
        "2 reduce-scatter each microbatch; 3 gather parameters again in the backward", minimum=0, maximum=3)  # fmt: skip
    num_distributed_optimizer_instances: int = flag(
        1, "hybrid sharding (HSDP): ZeRO shards parameters, gradients and optimizer state over each of so many equal parts of the "
        "data ranks - say, nodes - and the parts are replicas; ZeRO 0 is all replicas without it", minimum=1,
        names=("data-parallel-replicate-degree",), not_yet="hybrid sharding",
    )  # fmt: skip
    distributed_backend: Literal["auto", "nccl", "gloo"] = flag("auto", "collectives: nccl on CUDA, gloo elsewhere")
    distributed_timeout_minutes: float = flag(10.0, "a collective that takes longer ends the run", above=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        return iter(())

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
