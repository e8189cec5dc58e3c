"""Sequence parallelism (Korthikanti et al., arXiv 2205.05198): between attention and MLP each tensor-parallel rank keeps a run of the
tokens instead of all of them.

What the column-parallel layers need is gathered in front of them, and what the row-parallel ones sum is scattered behind them: as many
bytes as the all-reduce without it, and activations TP times smaller. Norms, mixing coefficients and positions then see other
tokens on every rank, so their gradients are parts of a sum: they are declared Partial, and FSDP adds them up.
"""
# B batch, S tokens of a sequence here, s of them between the blocks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from megatron_moe.model.core import Context
from megatron_moe.model.gpt import GPT
from megatron_moe.parallel.replicated import of_own_tokens


def apply_sequence_parallel(model: GPT, mesh: DeviceMesh) -> None:
    """What the plan of tensor parallelism leaves to do, on the same 1-D mesh. After context parallelism, which says where tokens stand."""
    modules = [model.position_embedding, model.norm]
    for block in model.blocks:
        modules += [block.attn_norm, block.mlp_norm, block.coefficient, block.shared_expert_gate]
    for module in model.mtp.values():
        modules += [module.embedding_norm, module.hidden_norm, module.proj, module.norm]
    for module in modules:
        if module is not None:
            of_own_tokens(module, mesh)
    model.locate = RunOfTokens(model.locate, mesh)


class RunOfTokens:
    """Context -> the same, and within it that of this rank's run: rank r of T has tokens r S/T to (r+1) S/T of each sequence here."""

    def __init__(self, locate: Callable[[Context], Context], mesh: DeviceMesh):
        self.locate, self.rank, self.ranks = locate, mesh.get_local_rank(), mesh.size()

    def __call__(self, context: Context) -> Context:
        context = self.locate(context)
        batch, length = context.positions_BS.shape
        if length % self.ranks:
            raise ValueError(
                f"{length} tokens of a sequence cannot be cut into the {self.ranks} equal runs of --sequence-parallel with "
                f"--tensor-model-parallel-size {self.ranks}; use a multiple of {self.ranks}, or leave --sequence-parallel out"
            )
        places_BS = context.places_BS
        if places_BS is None:
            places_BS = torch.arange(batch * length, device=context.positions_BS.device).view(batch, length)
        run = slice(self.rank * length // self.ranks, (self.rank + 1) * length // self.ranks)
        split = {"positions_BS": context.positions_BS, "keys_BS": context.keys_BS, "tokens_BS": context.tokens_BS, "places_BS": places_BS}
        here = {name: None if t is None else t[:, run] for name, t in split.items()}
        return replace(context, stream=replace(context, length=context.length or length, **here))
