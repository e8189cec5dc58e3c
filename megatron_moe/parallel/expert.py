"""Expert parallelism: whole experts on their owners, tokens brought to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import split_over_nodes
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.dispatch import build_dispatcher, choose
from megatron_moe.moe.dispatch.choose import Choice
from megatron_moe.moe.layer import MoELayer, moe_layers
from megatron_moe.moe.module_experts import set_parameter
from megatron_moe.moe.policies import build_policy
from megatron_moe.moe.tokens import Reducer
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.utils.compat import sum_over_ranks


def apply_expert_parallel(model: GPT, mesh: ParallelMesh, dispatcher: str) -> None:
    """Shard the stacks of each MoE layer by expert, and each expert by its inner width, and swap its dispatcher.

    Always, also at degree 1: the experts' own mesh spans the tensor-parallel ranks too, which see other tokens, and the sum of
    their gradients comes from there.
    """
    for moe in moe_layers(model):
        # fused: what it replaces, once it has shown that it runs here (parallel/fused.py)
        split_experts(moe, mesh, expert_degree(model, moe), "alltoall" if dispatcher == "fused" else dispatcher)


def split_experts(moe: MoELayer, mesh: ParallelMesh, ep: int, dispatcher: str) -> None:
    """The same for one layer, over `ep` ranks. Nothing is sent: every rank keeps its share of what it has."""
    moe.experts.cut_into(mesh.expert_tensor_size(ep))
    for name, p in list(moe.experts.named_parameters()):
        placements = expert_placements(moe.experts.dims(name))
        whole = distribute_tensor(p.data, mesh.experts[ep]["ep", "etp"], placements, src_data_rank=None)
        set_parameter(moe.experts, name, nn.Parameter(whole, p.requires_grad))
    c = moe.config
    moe.dispatcher = build_dispatcher(
        dispatcher, moe.num_experts, c.topk, mesh.expert_group(ep), capacity_factor_of(c), c.moe_pad_expert_input_to_capacity,
        slices=mesh.expert_tensor_group(ep), nodes=mesh.expert_node_groups(ep), chunks=c.moe_overlap_chunks, fp8=c.moe_fp8_dispatch,
    )  # fmt: skip


def choice_of(moe: MoEConfig, num_experts: int, etp: int, node_size: int | None, kind: str | None = None) -> Choice:
    """What `split_experts` builds for a layer with so many experts, before there are ranks. node_size: `RunConfig.node_size`; kind: in
    place of the configuration's."""
    ep = moe.expert_parallel_degree(num_experts)
    across, within = (1, ep) if node_size is None else split_over_nodes(ep, etp, node_size)
    return choose(
        kind or moe.moe_token_dispatcher, num_experts, moe.topk, ep, etp, capacity_factor_of(moe), moe.moe_pad_expert_input_to_capacity,
        moe.moe_overlap_chunks, across if within > 1 else 1, moe.moe_fp8_dispatch,
    )  # fmt: skip


def capacity_factor_of(moe: MoEConfig) -> float:
    """How many times the rows of equally busy experts an expert takes at most; inf when nothing is dropped."""
    if build_policy(moe).keeps_capacity:
        return 1.0  # whatever the capacity is, all of it is used: no room is spare
    return moe.moe_train_capacity_factor if moe.moe_token_dropping else math.inf


def expert_placements(dims: str) -> list[Placement]:
    """(ep, etp): experts by number; the inner width over etp, where the stack has one. `dims` as in moe.experts.STACKS."""
    return [Shard(0), Shard(dims.index("F")) if "F" in dims else Replicate()]


def expert_degree(model: GPT, moe: MoELayer) -> int:
    return model.moe_config.expert_parallel_degree(moe.num_experts)


class GroupReducer(Reducer):
    """Sums over process groups; none is asked that has one rank. Each argument: groups whose product is the ranks meant."""

    def __init__(
        self,
        microbatch: Sequence[dist.ProcessGroup],
        batch: Sequence[dist.ProcessGroup],
        experts: Sequence[dist.ProcessGroup],
        device: str,
    ):
        self.microbatch, self.batch, self.device = microbatch, batch, device
        self.experts = [group for group in experts if dist.get_world_size(group) > 1]

    def over_microbatch(self, counts: Tensor) -> Tensor:
        return _sum(counts, self.microbatch)

    def over_batch(self, counts: Tensor) -> Tensor:
        return _sum(_sum(counts, self.microbatch), self.batch)

    def most_tokens(self, tokens: int) -> int:
        if not self.experts:
            return tokens
        most = torch.full((), tokens, device=self.device)
        for group in self.experts:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return int(most)


def _sum(counts: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    for group in groups:
        if dist.get_world_size(group) > 1:
            counts = sum_over_ranks(counts, group)
    return counts


def share_counts(model: GPT, mesh: ParallelMesh) -> None:
    """A micro-batch is spread over the tensor- and context-parallel ranks, the step over these and the data ranks: routing counts
    are summed."""
    for moe in moe_layers(model):
        moe.reducer = reducer_over(mesh, expert_degree(model, moe))


def reducer_over(mesh: ParallelMesh, ep: int) -> GroupReducer:
    """For a layer whose experts are over `ep` ranks."""
    experts = [mesh.expert_group(ep), mesh.expert_tensor_group(ep)]
    return GroupReducer([mesh.group("tp"), mesh.group("cp")], [mesh.group("dp")], experts, mesh.dense.device_type)
