"""How the work is split over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag
from megatron_moe.config.model import divisors


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
    context_parallel_size: int = flag(1, "context-parallel degree (CP): ranks that share each sequence", minimum=1)
    cp_comm_type: Literal["all_gather", "p2p"] = flag(
        "all_gather", "how queries meet the keys of other context-parallel ranks. all_gather: keys and values of whole sequences come to every "
        "rank, in one collective; p2p: they travel around a ring of the ranks, no rank holds all of them, and attention has neither dropout nor "
        "document masks"
    )  # fmt: skip
    expert_tensor_parallel_size: int = flag(
        1, "expert-tensor-parallel degree (ETP): ranks that share each expert, cut along its inner width; need not be TP. At 1, "
        "tensor-parallel ranks are further data ranks for the experts", minimum=1)  # fmt: skip
    enable_expert_tensor_parallelism: bool = flag(False, "share each expert among the tensor-parallel ranks: ETP is TP")
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
        tp, etp = self.tensor_model_parallel_size, self.expert_tensor_parallel_size
        if self.enable_expert_tensor_parallelism and etp not in (1, tp):
            yield (f"--enable-expert-tensor-parallelism makes the expert-tensor-parallel degree that of --tensor-model-parallel-size ({tp}), "
                   f"and --expert-tensor-parallel-size is {etp}; drop one of them")  # fmt: skip
        if self.zero_stage == 0 and self.num_distributed_optimizer_instances > 1:
            yield (f"--num-distributed-optimizer-instances ({self.num_distributed_optimizer_instances}) replicates what ZeRO shards, and "
                   f"--zero-stage 0 shards nothing; use --zero-stage 1, 2 or 3, or leave it out")  # fmt: skip

    @property
    def etp(self) -> int:
        """Ranks that share each expert."""
        return self.tensor_model_parallel_size if self.enable_expert_tensor_parallelism else self.expert_tensor_parallel_size

    @property
    def has_ring(self) -> bool:
        """Whether keys travel from rank to rank."""
        return self.cp_comm_type == "p2p" and self.context_parallel_size > 1

    @property
    def sequence_unit(self) -> int:
        """What the length of a sequence must be a multiple of: two chunks for each context-parallel rank, and equal runs of what a rank
        has for each tensor-parallel rank under sequence parallelism."""
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size if self.sequence_parallel else 1
        return math.lcm(2 * cp if cp > 1 else 1, cp * tp)

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


def divides_over_nodes(ep: int, etp: int, node_size: int) -> bool:
    """Whether `split_over_nodes` can."""
    block = ep * etp
    return (node_size % etp == 0 and block % node_size == 0) or node_size % block == 0


def split_over_nodes(ep: int, etp: int, node_size: int) -> tuple[int, int]:
    """(nodes, ranks on each) of an expert-parallel group of `ep` ranks, each of which has `etp` - 1 neighbours that share its experts.

    Raises ValueError where nodes would have different numbers of them. Worked example, 4 ranks per node: EP 8 is (2, 4); with ETP 2
    it is (4, 2), as each node has two whole sets of slices; EP 4 is (1, 4).
    """
    block = ep * etp
    if divides_over_nodes(ep, etp, node_size):
        return (1, ep) if node_size % block == 0 else (block // node_size, node_size // etp)
    cut = f" and a multiple of the expert-tensor-parallel degree ({etp})" if etp > 1 else ""
    legal = [n for n in divisors(block) if n % etp == 0]
    raise ValueError(
        f"--moe-token-dispatcher hierarchical wants the ranks of a node ({node_size}) to divide the {block} ranks that hold the experts of a layer "
        f"once, or to be a multiple of them{cut}; set --moe-node-size to one of {', '.join(map(str, legal))}, or another "
        f"--moe-expert-parallel-size"
    )
