"""GPT with Mixture-of-Experts layers: embedding -> blocks -> norm -> logits.

Plain modules that know nothing of ranks. Layers live in a ModuleDict keyed by global layer number (from 1, as in
--expert-interval), and embedding and head may be absent: a pipeline stage is the model minus the other layers, and
parameter names never change.
"""
# B batch, S sequence, D hidden, V padded vocabulary (the columns here, under tensor parallelism), N modules of multi-token prediction,
# M = 1 + N tokens that are predicted from a place

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.kernels.linear import Linear, linear
from megatron_moe.model.block import Block
from megatron_moe.model.core import Context, all_are_here
from megatron_moe.model.loss import chunked_token_losses, columns_at_a_time, token_divergences, token_losses
from megatron_moe.model.mtp import MultiTokenModule
from megatron_moe.model.norm import build_norm
from megatron_moe.moe.module_experts import ExpertFactory
from megatron_moe.utils.random import Purpose, dropout


class GPT(nn.Module):
    """tokens [B, S] int64 -> losses or logits. `vocab_size` is the tokenizer's; rows beyond it are padding.

    `locate` (context -> context) says where the tokens stand; context and sequence parallelism, under which a rank has a part, swap it.
    `project` (hidden, weight -> logits), `token_losses` (logits, labels, vocab_size -> losses), `chunked_losses` (hidden, weight,
    labels, vocab_size, chunk -> losses) and `token_divergences` (logits, those of a teacher, vocab_size, temperature -> losses) are
    swapped by tensor parallelism, under which the logits are this rank's columns only. `loss_chunk_size`: of how many columns of the
    vocabulary there are logits at a time; 0: of all, None: it depends on their number. `expert_factory` makes the experts, see
    moe/module_experts.py.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, vocab_size: int, expert_factory: ExpertFactory | None = None):
        super().__init__()
        D, rows = config.hidden_size, config.padded_vocab_size(vocab_size)
        self.config, self.moe_config, self.vocab_size = config, moe, vocab_size
        self.embedding: nn.Embedding | None = nn.Embedding(rows, D)
        self.embeds = True  # what comes in are tokens; a last stage may have the matrix for its logits alone
        learned = config.position_embedding_type == "learned_absolute"
        self.position_embedding = nn.Embedding(config.max_position_embeddings, D) if learned else None
        experts = moe.experts_per_layer(config.num_layers)
        self.layers = nn.ModuleDict({str(i): Block(i, n, config, moe, expert_factory) for i, n in enumerate(experts, start=1)})
        self.norm: nn.Module | None = build_norm(config)
        self.head = None if config.is_tied else Linear(D, rows, bias=False)
        self.mtp = nn.ModuleDict({
            str(n): MultiTokenModule(config.num_layers + n, experts[-1], config, moe, expert_factory)
            for n in range(1, config.mtp_num_layers + 1)
        })  # fmt: skip
        self.locate: Callable[[Context], Context] = all_are_here
        self.project: Callable[[Tensor, Tensor], Tensor] = linear
        self.token_losses: Callable[[Tensor, Tensor, int], Tensor] = token_losses
        self.chunked_losses: Callable[[Tensor, Tensor, Tensor, int, int], Tensor] = chunked_token_losses
        self.loss_chunk_size: int | None = None
        self.vocab_ranks = 1  # that share the columns
        self.token_divergences: Callable[[Tensor, Tensor, int, float], Tensor] = token_divergences

    def forward(
        self,
        x: Tensor,
        positions_BS: Tensor,
        labels_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        keys_BS: Tensor | None = None,
        tokens_BS: Tensor | None = None,
        with_logits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: tokens, or the hidden states of the stage before, which routers may want `tokens_BS` with. Returns losses [B, S] with
        labels, else logits [B, S, V]; a stage that is not the last one its hidden states.

        Labels [B, M, S], those of data/batch.py `look_ahead`, ask for multi-token prediction: losses [B, M, S]; `with_logits`: the losses
        of the N further tokens [B, N, S], and the logits of the next one, for whoever compares them with a teacher's."""
        context = self.locate(Context(positions_BS, segments_BS, keys_BS, x if self.embeds else tokens_BS))
        h_BSD = self.embed(x, context) if self.embeds else x
        for block in self.layers.values():
            h_BSD = block(h_BSD, context)
        if self.norm is None:
            return h_BSD
        if labels_BS is None:
            return self.logits(h_BSD)
        return self.losses(h_BSD, labels_BS) if labels_BS.ndim == 2 else self.losses_ahead(h_BSD, labels_BS, context, with_logits)

    def losses_ahead(self, h_BSD: Tensor, labels_BMS: Tensor, context: Context, with_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Module n reads what the one before has made of a token - the first one: the model, behind its last norm - and the vector of
        the n-th token after it, and predicts the one that follows that: see model/mtp.py."""
        tokens = [labels_BS.contiguous() for labels_BS in labels_BMS.unbind(1)]  # the first, second ... token after each
        h_BSD = self.norm(h_BSD)
        logits_BSV = self.project(h_BSD, self.output_weight) if with_logits else None
        losses = [] if with_logits else [self.losses_of(h_BSD, tokens[0])]
        for module, read_BS, label_BS in zip(self.mtp.values(), tokens[:-1], tokens[1:], strict=True):
            h_BSD = module(self.embed_ahead(read_BS, context.of_layer(module.block.layer)), h_BSD, context)
            losses.append(self.losses_of(h_BSD, label_BS))
        losses_BMS = torch.stack(losses, dim=1)
        return losses_BMS if logits_BSV is None else (losses_BMS, logits_BSV)

    def logits(self, h_BSD: Tensor) -> Tensor:
        return self.project(self.norm(h_BSD), self.output_weight)

    def losses(self, h_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        return self._losses(self.norm(h_BSD), labels_BS)

    def losses_of(self, normed_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        return self._losses(normed_BSD, labels_BS)

    def _losses(self, normed_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        columns = self.output_weight.shape[0] // self.vocab_ranks
        if chunk := columns_at_a_time(self.loss_chunk_size, labels_BS.numel(), columns):
            return self.chunked_losses(normed_BSD, self.output_weight, labels_BS, self.vocab_size, chunk)
        return self.token_losses(self.project(normed_BSD, self.output_weight), labels_BS, self.vocab_size)

    def keep_stage(self, layers: Collection[int], is_first: bool, is_last: bool) -> None:
        """Become a pipeline stage: what other stages hold is gone, names stay. Tied logits, and multi-token prediction,
        need the embedding on the last one too."""
        for name in [name for name in self.layers if int(name) not in layers]:
            del self.layers[name]
        self.embeds = is_first
        if not is_first:
            self.position_embedding = None
            if not (is_last and self.config.embeds_at_end):
                self.embedding = None
        if not is_last:
            self.norm = self.head = None
            self.mtp = nn.ModuleDict()

    def embed(self, tokens_BS: Tensor, context: Context) -> Tensor:
        h_BSD, here = self.embedding(tokens_BS), context.of_stream
        if self.position_embedding is not None:
            h_BSD = h_BSD + self.position_embedding(here.positions_BS)
        return dropout(h_BSD, self.config.hidden_dropout, here.keys_BS, Purpose.EMBEDDING_DROPOUT)

    def embed_ahead(self, tokens_BS: Tensor, context: Context) -> Tensor:
        """Of tokens further on, without the vectors of learned positions: how far on they are is always the same."""
        return dropout(self.embedding(tokens_BS), self.config.hidden_dropout, context.of_stream.keys_BS, Purpose.EMBEDDING_DROPOUT)

    @property
    def blocks(self) -> list[Block]:
        """All that are here, those of multi-token prediction behind the layers."""
        return [*self.layers.values(), *(module.block for module in self.mtp.values())]

    @property
    def output_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight
