"""What is not kept on the device, or not all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class MemoryConfig:
    """Memory."""

    cross_entropy_loss_chunk_size: int | None = flag(
        None, "columns of the vocabulary whose logits are there at a time, to be computed once more in the backward; 0: all of them. "
        "When not given, all where a micro-batch has up to 2^25 logits on a rank, else so many that there are 2^23", minimum=0)  # fmt: skip
    cpu_offloading: bool = flag(
        False, "keep what the blocks save for the backward in pinned memory of the host; without effect where the host computes",
        names=("offload-activations",),
    )  # fmt: skip
    cpu_optimizer: bool = flag(
        False, "ZeRO-Offload: shards of parameters, gradients and optimizer state live on the host, which makes the update; without "
        "effect where the host computes")  # fmt: skip

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        return iter(())
