"""Tensor parallelism: a plan over plain modules, and the three places that need more than a plan.

Attention and MLP are torch's column/row styles. The MoE layer sees a slice of the tokens, so that tensor-parallel ranks
are further data ranks for router and experts. The vocabulary is split in embedding, projection and cross-entropy: logits of
the full vocabulary exist on no rank.
"""
# B batch, S sequence, D hidden, V padded vocabulary, v columns here, T tokens, t tokens of this rank's slice

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel, parallelize_module

from megatron_moe.config.model import ModelConfig
from megatron_moe.kernels.kl_divergence import Ranks, kl_divergence
from megatron_moe.kernels.linear_cross_entropy import log_sum_and_picked
from megatron_moe.model.gpt import GPT
from megatron_moe.model.loss import mask_padding
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.parallel.heads import head_plan
from megatron_moe.parallel.replicated import replicate_parameter
from megatron_moe.utils.compat import all_gather_into_tensor


def block_plan(stream: Placement, config: ModelConfig, ranks: int) -> dict[str, ParallelStyle]:
    """`stream`: how vectors lie between the modules, `Shard(1)` under sequence parallelism."""
    plan: dict[str, ParallelStyle] = {
        # DTensor in: the gradients of q, k and v are summed locally before the one reduction
        "attn": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)),
        "attn.q_proj": ColwiseParallel(),
        "attn.out_proj": RowwiseParallel(output_layouts=stream),
        **{f"attn.{name}": style for name, style in head_plan(config, ranks).items()},
    }
    for mlp in ("mlp", "shared_expert"):
        plan[mlp] = PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
        plan |= {f"{mlp}.{name}": ColwiseParallel() for name in ("fc1", "fc_gate")}
        plan[f"{mlp}.fc2"] = RowwiseParallel(output_layouts=stream)
    return plan


def apply_tensor_parallel(model: GPT, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Shard the dense parameters over the 1-D mesh `mesh`; norms, coefficients and positions stay whole on every rank.

    With `sequence_parallel` every rank has tokens of its own between the modules: see parallel/sequence.py for the rest of it."""
    stream = Shard(1) if sequence_parallel else Replicate()
    full_plan = block_plan(stream, model.config, mesh.size())
    for block in model.blocks:
        plan = {name: style for name, style in full_plan.items() if _has(block, name)}
        parallelize_module(block, mesh, plan)
        block.attn.core.first_head = mesh.get_local_rank() * (model.config.num_attention_heads // mesh.size())
        if block.attn.sinks is not None:
            block.attn.sinks = nn.Parameter(distribute_tensor(block.attn.sinks.data, mesh, [Shard(0)], src_data_rank=None))
        if block.moe is not None:
            for module in (block.moe.gate, block.moe.latent_down, block.moe.latent_up):
                if module is not None:
                    replicate_parameter(module, "weight", mesh)
            if not sequence_parallel:
                slice_tokens(block.moe, mesh.get_group())
    if model.embedding is not None:
        parallelize_module(model, mesh, {"embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)})
    if model.head is not None:
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.data, mesh, [Shard(0)], src_data_rank=None))
    model.project = VocabParallelProjection(mesh, stream)
    model.token_losses = VocabParallelLosses(mesh.get_group())
    model.chunked_losses, model.vocab_ranks = VocabParallelChunkedLosses(mesh, stream), mesh.size()
    model.token_divergences = VocabParallelDivergences(mesh.get_group())


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


# ---------------------------------------------------------------- tokens of the MoE layer


def slice_tokens(moe: MoELayer, group: dist.ProcessGroup) -> None:
    """Hooks: the layer computes on this rank's slice of the (equal) tokens of the group, its output is whole again."""

    count: list[int] = []  # of the forward under way: the hook after needs what the hook before saw

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, info = (*args, TokenInfo())[:2]
        count[:] = [x_TD.shape[0]]
        most_tokens = None if info.most_tokens is None else _longest(info.most_tokens, group)
        return _Slice.apply(x_TD, group), info.of(_bounds(x_TD.shape[0], group), most_tokens, x_TD), *args[2:]

    def after(_: nn.Module, args: tuple[Any, ...], y_tD: Tensor) -> Tensor:
        return _Gather.apply(y_tD, count[0], group)

    moe.register_forward_pre_hook(before)
    moe.register_forward_hook(after)


def _bounds(tokens: int, group: dist.ProcessGroup) -> slice:
    """This rank's tokens: equal slices, the last ones shorter or empty when they do not divide."""
    each = _longest(tokens, group)
    first = min(dist.get_rank(group) * each, tokens)
    return slice(first, min(first + each, tokens))


def _longest(tokens: int, group: dist.ProcessGroup) -> int:
    return -(-tokens // dist.get_world_size(group))


def _all_gather_tokens(x_tD: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
    each = _longest(tokens, group)
    padded = torch.nn.functional.pad(x_tD, (0, 0, 0, each - x_tD.shape[0])).contiguous()
    out = padded.new_empty(each * dist.get_world_size(group), x_tD.shape[1])
    all_gather_into_tensor(out, padded, group=group)
    return out[:tokens]


class _Slice(torch.autograd.Function):
    """Whole -> own slice; backward gathers the slices. No sum: every rank held the same tokens, and each gradient comes once."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.tokens = group, x_TD.shape[0]
        return x_TD[_bounds(x_TD.shape[0], group)].clone()

    @staticmethod
    def backward(ctx, grad_tD: Tensor):
        return _all_gather_tokens(grad_tD, ctx.tokens, ctx.group), None


class _Gather(torch.autograd.Function):
    """Own slice -> whole; backward takes the own slice of the gradient, which is the same on every rank."""

    @staticmethod
    def forward(ctx, y_tD: Tensor, tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.tokens = group, tokens
        return _all_gather_tokens(y_tD, tokens, group)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        return grad_TD[_bounds(ctx.tokens, ctx.group)].clone(), None, None


# ---------------------------------------------------------------- vocabulary


class VocabParallelProjection:
    """hidden [B, S, D] (the same on every rank, or a run of each sequence), weight [V, D] sharded by rows -> this rank's logits [B, S, v]."""

    def __init__(self, mesh: DeviceMesh, stream: Placement):
        self.mesh, self.stream = mesh, stream

    def __call__(self, hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        return torch.nn.functional.linear(on_all_columns(hidden_BSD, self.mesh, self.stream), weight_VD).to_local()

    def gather(self, logits_Tv: Tensor) -> Tensor:
        """The columns of all ranks, [T, V]. No gradient: for those who write."""
        columns = [torch.empty_like(logits_Tv) for _ in range(self.mesh.size())]
        dist.all_gather(columns, logits_Tv.contiguous(), group=self.mesh.get_group())
        return torch.cat(columns, dim=1)


def on_all_columns(hidden_BSD: Tensor, mesh: DeviceMesh, stream: Placement) -> DTensor:
    """Hidden states, of all tokens, for a product with columns that are spread over the mesh: their gradient is summed over ranks."""
    return DTensor.from_local(hidden_BSD, mesh, [stream], run_check=False).redistribute(placements=[Replicate()])


class VocabParallelLosses:
    """Cross-entropy from logits whose columns are spread over the group (Megatron-LM, arXiv 1909.08053, section 3)."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, logits_BSv: Tensor, labels_BS: Tensor, vocab_size: int) -> Tensor:
        first = dist.get_rank(self.group) * logits_BSv.shape[-1]
        wide = torch.promote_types(logits_BSv.dtype, torch.float32)
        logits = mask_padding(logits_BSv.to(wide), vocab_size, first)
        return _VocabParallelCrossEntropy.apply(logits, labels_BS - first, self.group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Three small reductions over the vocabulary ranks: maximum, sum of exponentials, the label's logit."""

    @staticmethod
    def forward(ctx, logits_BSv: Tensor, label_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
        # a rank whose columns are all padding has -inf everywhere: the maximum over ranks is finite
        largest_BS = logits_BSv.amax(-1)
        dist.all_reduce(largest_BS, dist.ReduceOp.MAX, group=group)
        shifted = logits_BSv - largest_BS[..., None]
        here_BS = (label_BS >= 0) & (label_BS < logits_BSv.shape[-1])
        index_BS1 = label_BS.clamp(0, logits_BSv.shape[-1] - 1)[..., None]
        exp = shifted.exp()
        both = torch.stack([exp.sum(-1), torch.where(here_BS, shifted.gather(-1, index_BS1).squeeze(-1), 0.0)])
        dist.all_reduce(both, group=group)
        ctx.save_for_backward(exp / both[0][..., None], here_BS, index_BS1)
        return both[0].log() - both[1]

    @staticmethod
    def backward(ctx, grad_BS: Tensor):
        probs, here_BS, index_BS1 = ctx.saved_tensors
        grad = probs.scatter_add(-1, index_BS1, -here_BS[..., None].to(probs.dtype))
        return grad * grad_BS[..., None], None, None


class VocabParallelChunkedLosses:
    """The same from hidden states and the rows of the matrix that are here, `chunk` columns of logits at a time."""

    def __init__(self, mesh: DeviceMesh, stream: Placement):
        self.mesh, self.group, self.stream = mesh, mesh.get_group(), stream

    def __call__(self, hidden_BSD: Tensor, weight_VD: DTensor, labels_BS: Tensor, vocab_size: int, chunk: int) -> Tensor:
        hidden_TD = on_all_columns(hidden_BSD, self.mesh, self.stream).to_local(grad_placements=[Partial()]).flatten(0, 1)
        weight_vD = weight_VD.to_local()
        first = dist.get_rank(self.group) * weight_vD.shape[0]
        columns = max(min(vocab_size - first, weight_vD.shape[0]), 0)
        log_sum_T, picked_T = log_sum_and_picked(hidden_TD, weight_vD, labels_BS.flatten() - first, columns, chunk)
        return _LossOfColumns.apply(log_sum_T, picked_T, self.group).view(labels_BS.shape).clone()


class _LossOfColumns(torch.autograd.Function):
    """From what each rank has found in its columns: log(sum of exp of the log_sums), less what is picked on one of them."""

    @staticmethod
    def forward(ctx, log_sum_T: Tensor, picked_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest_T = log_sum_T.clone()  # -inf on a rank whose columns are all padding
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group=group)
        exp_T = (log_sum_T - largest_T).exp()
        both = torch.stack([exp_T, picked_T])
        dist.all_reduce(both, group=group)
        ctx.save_for_backward(exp_T / both[0])
        return both[0].log() + largest_T - both[1]

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        (share_T,) = ctx.saved_tensors
        return grad_T * share_T, -grad_T, None


class VocabularyRanks(Ranks):
    """The ranks over which the columns of the logits are spread."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def maximum(self, x: Tensor) -> None:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)

    def sum(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)


class VocabParallelDivergences:
    """KL(teacher || student) over the whole vocabulary, from the columns here of both."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.ranks = group, VocabularyRanks(group)

    def __call__(self, student_BSv: Tensor, teacher_BSv: Tensor, vocab_size: int, temperature: float) -> Tensor:
        width = student_BSv.shape[-1]
        real = max(min(vocab_size - dist.get_rank(self.group) * width, width), 0)
        student_Tv, teacher_Tv = student_BSv.flatten(0, 1), teacher_BSv.flatten(0, 1)
        return kl_divergence(student_Tv, teacher_Tv, real, temperature, self.ranks).view(student_BSv.shape[:2])
