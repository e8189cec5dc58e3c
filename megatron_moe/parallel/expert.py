"""Expert parallelism: whole experts on their owners, tokens brought to them."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from megatron_moe.model.gpt import GPT
from megatron_moe.moe.dispatch import build_dispatcher
from megatron_moe.moe.experts import STACKS
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.utils.compat import sum_over_ranks


def apply_expert_parallel(model: GPT, mesh: ParallelMesh, dispatcher: str) -> None:
    """Shard the stacks of each MoE layer by expert and swap its dispatcher.

    Always, also at degree 1: the experts' own mesh spans the tensor-parallel ranks too, which see other tokens, and the sum of
    their gradients comes from there.
    """
    for moe in moe_layers(model):
        ep = expert_degree(model, moe)
        for name, p in list(moe.experts.named_parameters()):
            whole = distribute_tensor(p.data, mesh.experts[ep]["ep", "etp"], expert_placements(name), src_data_rank=None)
            moe.experts.register_parameter(name, nn.Parameter(whole))
        factor = moe.config.moe_train_capacity_factor if moe.config.moe_token_dropping else math.inf
        moe.dispatcher = build_dispatcher(dispatcher, moe.num_experts, moe.config.topk, mesh.expert_group(ep), factor)


def expert_placements(name: str) -> list[Placement]:
    """(ep, etp): experts by number; the inner width over etp, where the stack has one."""
    dims = STACKS[name]
    return [Shard(0), Shard(dims.index("F")) if "F" in dims else Replicate()]


def expert_degree(model: GPT, moe: MoELayer) -> int:
    return model.moe_config.expert_parallel_degree(moe.num_experts)


def share_microbatch_counts(model: GPT, group: dist.ProcessGroup) -> None:
    """A microbatch is spread over the ranks of `group` (cp x tp): routing counts of the balance loss are summed over it."""

    def sum_counts(counts_E: Tensor) -> Tensor:
        return sum_over_ranks(counts_E, group)

    if dist.get_world_size(group) > 1:
        for moe in moe_layers(model):
            moe.sum_counts = sum_counts
