"""How a model that answers lies on its ranks: its own degrees, whatever those of training were.

Dense matrices over the tensor-parallel ranks, experts over the expert-parallel ones, both folded over the same ranks. Nothing is
trained, so that neither FSDP nor an optimizer is there: what is not split is whole on every rank. All ranks see the same tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.distributed as dist

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.parallel.apply import build_parallel_mesh
from megatron_moe.parallel.expert import apply_expert_parallel, share_counts
from megatron_moe.parallel.tensor import apply_tensor_parallel


@dataclass(frozen=True)
class Layout:
    """`group`: gloo, of all ranks; None for the default one, or where this process is alone."""

    tensor_parallel: int = 1
    expert_parallel: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_split(self) -> bool:
        return self.tensor_parallel > 1 or self.expert_parallel > 1

    @property
    def is_leader(self) -> bool:
        """The rank that reads what is asked for, and shows the answers."""
        return not self.is_split or dist.get_rank() == 0


ONE_PROCESS = Layout()


def build_in_layout(model: GPT, run: RunConfig, layout: Layout, device_type: str) -> None:
    """Split a plain model without memory. Raises ConfigError for degrees that do not divide it. Collective."""
    if not layout.is_split:
        return
    split = layout_of(run, layout)
    if problems := list(split.world_problems(dist.get_world_size())):
        raise ConfigError(problems)
    mesh = build_parallel_mesh(split, device_type)
    model.moe_config = split.moe  # it knows the degree of each layer
    if layout.expert_parallel > 1:
        apply_expert_parallel(model, mesh, split.moe.moe_token_dispatcher)
    if layout.tensor_parallel > 1:
        apply_tensor_parallel(model, mesh.dense["tp"])
    share_counts(model, mesh)


def layout_of(run: RunConfig, layout: Layout) -> RunConfig:
    """The run with this layout in place of its own, and without what only training does. Raises ConfigError."""
    moe = dataclasses.replace(
        run.moe, moe_expert_parallel_size=layout.expert_parallel, moe_token_dispatcher="auto", moe_overlap_chunks=1,
        moe_token_dropping=False, moe_pad_expert_input_to_capacity=False, moe_node_size=None,
    )  # fmt: skip
    training = dataclasses.replace(
        run.training, micro_batch_size=1, global_batch_size=None, gradient_accumulation_steps=None, rampup_batch_size=None
    )
    parallel = ParallelConfig(tensor_model_parallel_size=layout.tensor_parallel)
    return RunConfig(model=run.model, moe=moe, parallel=parallel, training=training, scale=run.scale)
