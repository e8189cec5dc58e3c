"""Context parallelism: every sequence is cut over the ranks of a group, and queries meet the keys of all of them.

A sequence of L tokens is cut into 2P chunks; rank r of P has chunks r and 2P-1-r, which together look at as many tokens as those of
any other rank (a query sees only what came before it). Example, P = 2, L = 8: rank 0 has the tokens 0 1 6 7, rank 1 has 2 3 4 5.

All ranks of the group read the same samples, and `part_of` takes each one's part. Everything but attention works on tokens one by
one. Attention gathers keys and values, puts them into the order of the sequence, and masks by place; in the backward their
gradients are summed and scattered. Or keys travel around the ranks: ring.py.
"""
# B batch, L tokens of a whole sequence, S here, c of a chunk (S = 2c), P ranks, H query heads, G key/value heads, h head width

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.data.batch import Batch
from megatron_moe.model.core import CausalCore, Context, repeat_heads, visible
from megatron_moe.model.gpt import GPT
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.ring import RingCore
from megatron_moe.utils.compat import all_gather_rows


def apply_context_parallel(model: GPT, group: dist.ProcessGroup, has_ring: bool = False) -> None:
    """No parameter is touched: ranks of `group` are further data ranks to FSDP. `has_ring`: keys travel (ring.py) instead of being gathered."""
    for block in model.blocks:
        plain = block.attn.core
        block.attn.core = RingCore(group, plain.scale) if has_ring else GatheredKeysCore(plain, group)
    model.locate = ZigzagPlaces(group)


def part_of(batch: Batch, keys_BL: Tensor | None, mesh: ParallelMesh) -> tuple[Batch, Tensor | None]:
    """The tokens of this context-parallel rank, and their keys. Document numbers stay whole: attention looks at all of them."""
    if mesh.size("cp") == 1:
        return batch, keys_BL
    group = mesh.group("cp")
    cut = {name: zigzag(getattr(batch, name), group) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    return batch._replace(**cut), None if keys_BL is None else zigzag(keys_BL, group)


def chunks_of(group: dist.ProcessGroup) -> tuple[int, int]:
    """Which chunks of a sequence are here."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return rank, 2 * ranks - 1 - rank


def zigzag(x_BL: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., L] -> [..., S]"""
    chunks = 2 * dist.get_world_size(group)
    if x_BL.shape[-1] % chunks:
        raise ValueError(
            f"a sequence of {x_BL.shape[-1]} tokens cannot be cut into the {chunks} equal chunks of --context-parallel-size {chunks // 2}; "
            f"use a multiple of {chunks}"
        )
    whole = x_BL.chunk(chunks, dim=-1)
    return torch.cat([whole[i] for i in chunks_of(group)], dim=-1)


class ZigzagPlaces:
    """Context -> the same with the places of its tokens in the micro-batch."""

    def __init__(self, group: dist.ProcessGroup):
        self.chunks, self.ranks = chunks_of(group), dist.get_world_size(group)

    def __call__(self, context: Context) -> Context:
        batch, here = context.positions_BS.shape
        chunk, length, device = here // 2, here * self.ranks, context.positions_BS.device
        place_S = torch.cat([torch.arange(i * chunk, (i + 1) * chunk, device=device) for i in self.chunks])
        places_BS = place_S + length * torch.arange(batch, device=device)[:, None]
        return replace(context, places_BS=places_BS, length=length)


class GatheredKeysCore(CausalCore):
    """The queries here meet the keys of the whole sequence, up to their own places: chunk i looks at chunks 0 to i."""

    def __init__(self, plain: CausalCore, group: dist.ProcessGroup):
        super().__init__(plain.dropout, plain.scale, plain.window)
        self.group, self.chunks = group, chunks_of(group)

    def __call__(self, q_BHSh: Tensor, k_BGSh: Tensor, v_BGSw: Tensor, context: Context, sinks_H: Tensor | None = None) -> Tensor:
        kv_BGL = gather_in_order(torch.cat([k_BGSh, v_BGSw], -1), self.group)  # side by side: their widths may differ
        k_BHLh, v_BHLw = (repeat_heads(t, q_BHSh.shape[1]) for t in kv_BGL.split([k_BGSh.shape[-1], v_BGSw.shape[-1]], -1))
        chunk, length, out = q_BHSh.shape[2] // 2, k_BHLh.shape[2], []
        for half, number in enumerate(self.chunks):
            here, end = slice(half * chunk, (half + 1) * chunk), (number + 1) * chunk
            keys_Bc = None if context.keys_BS is None else context.keys_BS[:, here]
            mask = visible(context, number * chunk, chunk, self.window)
            out.append(self.masked(q_BHSh[:, :, here], k_BHLh[:, :, :end], v_BHLw[:, :, :end], mask, keys_Bc, length, sinks_H))
        return torch.cat(out, dim=2)


def gather_in_order(kv_BGSh: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Keys and values of the whole sequence, [B, G, L, h], in one collective; the backward sums their gradients and scatters them."""
    halves = all_gather_rows(kv_BGSh[None], group).unflatten(3, (2, -1))  # [P, B, G, 2, c, h]
    first, second = halves.unbind(3)  # chunks 0 to P-1, and 2P-1 to P
    in_order = torch.cat([first, second.flip(0)])  # [2P, B, G, c, h]
    return in_order.permute(1, 2, 0, 3, 4).flatten(2, 3)
