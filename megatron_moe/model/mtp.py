"""Multi-token prediction: from every place of a sequence, the tokens behind the next one too (DeepSeek-V3, arXiv 2412.19437, 2.2).

Module n = 1 ... N sits behind the model and the modules before it, and shares the token vectors and the output matrix with the model:

    h (n = 1: the model's, behind its last norm) --hidden_norm----+
                                                                  +-- concatenated --proj--> block --norm--> h --> logits
    vector of the n-th token further on ---------embedding_norm---+

    tokens              a b c d e     a sequence, and f, which follows it
    model predicts      b c d e f
    module 1 reads      b c d e f     and predicts   c d e f .
    module 2 reads      c d e f .     and predicts   d e f . .      at the dots nothing is known, and no loss is counted

The paper does not say where the norms of the model and the modules stand. As in Megatron-Core, and as DeepSeek-V3's weights are run
for speculative decoding, a module reads what comes out of the last norm before it, and the token's vector is the first half of
what is projected.
"""
# B batch, S sequence, D hidden

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.kernels.linear import Linear
from megatron_moe.model.attention import Context
from megatron_moe.model.block import Block
from megatron_moe.model.norm import build_norm
from megatron_moe.moe.module_experts import ExpertFactory


class MultiTokenModule(nn.Module):
    """(vectors of tokens further on, hidden states), both [B, S, D] -> hidden states, behind a norm. `layer`: of its block, counted on
    from the model's last one: what it draws, and its line in tables of experts, are its own. A router by hashes goes by the token at
    the place, as in the model."""

    def __init__(self, layer: int, num_experts: int, config: ModelConfig, moe: MoEConfig, expert_factory: ExpertFactory | None = None):
        super().__init__()
        D = config.hidden_size
        self.embedding_norm, self.hidden_norm = build_norm(config), build_norm(config)
        self.proj = Linear(2 * D, D, bias=False)
        self.block = Block(layer, num_experts, config, moe, expert_factory)
        self.norm = build_norm(config)

    def forward(self, e_BSD: Tensor, h_BSD: Tensor, context: Context) -> Tensor:
        return self.norm(self.block(self.merge(e_BSD, h_BSD), context))

    def merge(self, e_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        return self.proj(torch.cat([self.embedding_norm(e_BSD), self.hidden_norm(h_BSD)], dim=-1))
