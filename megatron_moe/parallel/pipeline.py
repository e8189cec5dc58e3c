"""Pipeline parallelism: the stages of a rank seen as one model, and torch's schedules, which walk micro-batches through them.

    micro-batches --cat--> tokens [n B, S] for stage 0; positions, segments, keys, tokens, labels [n B, S] beside them for all
    torch cuts them into micro-batches again, sends hidden states down and their gradients up, and lets FSDP reduce the
    gradients of a stage once, after its last micro-batch.

A schedule is made for one number of micro-batches of one shape, and made anew where a ramp-up or a curriculum changes that:
torch would otherwise find the shapes out by running the model, which routes, and counts, a micro-batch that is none.
The last stage returns losses, not logits: those of one micro-batch are gone before the next one comes.

Tied embeddings, and multi-token prediction: first and last stage hold the matrix, which is drawn by its name and so starts alike. The gradients of both are
added up on both, so it stays alike; norm and parameter count know the one of the first stage.
"""
# n micro-batches, B sequences each, S tokens each, D hidden

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_moe.config.pipeline import fits_rounds, schedule_of, stages_of_rank
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.model.gpt import GPT
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.zero import reshard

SCHEDULES = {  # names in torch.distributed.pipelining, which is imported with the first schedule: it takes seconds, for torch's compiler
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero-bubble": "ScheduleInterleavedZeroBubble",
}
ShareOfStep = Callable[[Tensor, Tensor], Tensor]  # (losses, loss mask) of a micro-batch -> its share of the step's loss, or losses
Objective = Callable[[Tensor], Tensor]  # shares -> what is differentiated


class PipelinedGPT(nn.Module):
    """The stages of one rank. Its modules are theirs, under the names that they have in the whole model, so that an optimizer, a
    checkpoint or a list of MoE layers is made of it as of a GPT; it is run by `forward_backward` and `losses`."""

    def __init__(self, stages: dict[int, GPT], num_stages: int, mesh: ParallelMesh, config: RunConfig):
        """`stages`: those of this rank by number, each made parallel already."""
        super().__init__()
        first, last = (list(stages.values())[i] for i in (0, -1))
        self.stages = stages  # a dict, which torch does not look into: no parameter has two names
        self.config, self.moe_config, self.vocab_size = first.config, first.moe_config, first.vocab_size
        self.embedding = first.embedding if first.embedding is not None else last.embedding
        self.position_embedding = first.position_embedding
        self.layers = nn.ModuleDict({name: block for stage in stages.values() for name, block in stage.layers.items()})
        self.norm, self.head, self.mtp = last.norm, last.head, last.mtp
        self.num_stages, self.mesh = num_stages, mesh
        self.has_first, self.has_last = 0 in stages, num_stages - 1 in stages
        self.kind = schedule_of(config.parallel, config.model.num_layers)
        self.dtype = stream_dtype(config)
        self.runs = mesh.size("tp") if config.parallel.sequence_parallel else 1  # of a sequence, between the stages
        self._differentiated: ShareOfStep | None = None  # of the step under way: from losses and mask of a micro-batch
        self._schedules: dict[tuple[bool, int, torch.Size], Any] = {}  # by what they were made for, see `_schedule`

    # ------------------------------------------------------------ a model like any other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PipelinedGPT:
        for stage in self.stages.values():  # the root of an FSDP model wants to be asked itself
            stage._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> PipelinedGPT:
        for stage in self.stages.values():
            stage.train(mode)
        return super().train(mode)

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """The embedding that is here for the logits or for multi-token prediction, where the first stage is elsewhere."""
        return self.embedding.weight if self.has_last and not self.has_first and self.config.embeds_at_end else None

    @property
    def is_tied(self) -> bool:
        """Whether this rank holds one of the two tied matrices."""
        return self.config.embeds_at_end and (self.has_first or self.has_last)

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Those that no other stage counts."""
        copy = self.tied_copy
        return (p for p in self.parameters() if p is not copy)

    # ------------------------------------------------------------ running it

    def forward_backward(self, microbatches: Sequence[Batch], keys: Sequence[Tensor], share: ShareOfStep, objective: Objective) -> Tensor:
        """Gradients of the objective of all shares; returns the sum of the shares on the ranks of the last stage, zero elsewhere."""
        mask = microbatches[0].loss_mask
        total = torch.zeros(mask.shape[1:-1], dtype=torch.float64, device=mask.device)

        def differentiated(losses: Tensor, mask: Tensor) -> Tensor:
            shares = share(losses, mask)
            total.add_(shares.detach())
            return objective(shares)

        self._differentiated = differentiated
        target = {"target": torch.cat([b.loss_mask for b in microbatches])} if self.has_last else {}
        n = len(microbatches)
        # fewer micro-batches than stages never get to alternate: then 1f1b is gpipe, and torch wants it called so
        kind = "gpipe" if self.kind == "1f1b" and n < self.num_stages else self.kind
        self._walk(self._schedule(kind, n, microbatches[0], is_trained=True), microbatches, keys, **target)
        if self.is_tied:
            self._add_tied_gradients()
        return total

    @torch.no_grad()
    def losses(self, microbatches: Sequence[Batch]) -> Tensor | None:
        """[n B, S] on the ranks of the last stage, None elsewhere; forward only, any number of micro-batches."""
        several = len(self.stages) > 1
        parts = []
        while microbatches:
            n = len(microbatches)
            while several and not fits_rounds(n, self.mesh.size("pp")):
                n -= 1
            schedule = self._schedule("interleaved" if several else "gpipe", n, microbatches[0], is_trained=False)
            parts.append(self._walk(schedule, microbatches[:n], ()))
            microbatches = microbatches[n:]
        for stage in self.stages.values():
            reshard(stage)
        return torch.cat(parts) if self.has_last else None

    def _walk(self, schedule: Any, microbatches: Sequence[Batch], keys: Sequence[Tensor], **target: Any) -> Tensor | None:
        tokens = torch.cat([b.tokens for b in microbatches])
        beside = {
            "positions_BS": [b.position_ids for b in microbatches], "labels_BS": [b.labels for b in microbatches],
            "segments_BS": [b.segment_ids for b in microbatches], "keys_BS": keys,
        }  # fmt: skip
        given = {name: torch.cat(list(parts)) for name, parts in beside.items() if len(parts) and parts[0] is not None}
        return schedule.step(*([tokens] if self.has_first else []), tokens_BS=tokens, **given, **target)

    def _schedule(self, kind: str, n: int, like: Batch, is_trained: bool) -> Any:
        """One is kept, with its buffers: for training, or a few of an evaluation, whose last micro-batches are fewer."""
        made_for = (is_trained, n, like.tokens.shape)
        if made_for not in self._schedules:
            if is_trained or any(was_trained for was_trained, *_ in self._schedules):
                self._schedules.clear()
            loss_fn = (lambda losses_BS, mask_BS: self._differentiated(losses_BS, mask_BS)) if is_trained else None
            self._schedules[made_for] = self._build(kind, n, like, loss_fn)
        return self._schedules[made_for]

    def _build(self, kind: str, n: int, like: Batch, loss_fn: ShareOfStep | None) -> Any:
        """Local: torch's stages talk to each other in the first step."""
        from torch.distributed import pipelining

        stages = [
            pipelining.PipelineStage(
                part, number, self.num_stages, like.tokens.device, group=self.mesh.group("pp"),
                **self._examples(number, like, is_trained=loss_fn is not None),
            )
            for number, part in self.stages.items()
        ]  # fmt: skip
        of = stages[0] if kind in ("gpipe", "1f1b") else stages
        # scale_grads would divide all gradients by n; the loss carries the one division
        return getattr(pipelining, SCHEDULES[kind])(of, n, loss_fn=loss_fn, scale_grads=False)

    def _examples(self, number: int, like: Batch, is_trained: bool) -> dict[str, Tensor]:
        """Of what comes into a stage and goes out; requires_grad tells torch which gradients travel."""
        kind = {"device": "meta", "requires_grad": is_trained}
        tokens, stream = torch.empty_like(like.tokens, device="meta"), torch.empty(self.stream_shape(like), dtype=self.dtype, **kind)
        losses = torch.empty(like.labels.shape, dtype=torch.promote_types(self.dtype, torch.float32), **kind)
        return {"input_args": tokens if number == 0 else stream, "output_args": losses if number == self.num_stages - 1 else stream}

    def stream_shape(self, like: Batch) -> tuple[int, int, int]:
        """Of the hidden states that this rank hands on, for a micro-batch of this shape."""
        sequences, length = like.tokens.shape
        return sequences, length // self.runs, self.config.hidden_size

    @torch.no_grad()
    def _add_tied_gradients(self) -> None:
        """First and last stage: each sends its own and adds the other's, so that both have the same sum to the last bit."""
        group = self.mesh.group("pp")
        grad = self.embedding.weight.grad
        mine = grad.to_local() if isinstance(grad, DTensor) else grad
        if mine.numel() == 0:
            return
        peer = dist.get_global_rank(group, self.mesh.size("pp") - 1 if self.has_first else 0)
        theirs = torch.empty_like(mine)
        exchange = [dist.P2POp(dist.isend, mine, peer, group), dist.P2POp(dist.irecv, theirs, peer, group)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        mine += theirs


def stream_dtype(config: RunConfig) -> torch.dtype:
    """Of the hidden states between two stages."""
    t = config.training
    if t.bf16 or t.fp16:
        return torch.bfloat16 if t.bf16 else torch.float16
    return torch.float64 if t.params_dtype == "float64" else torch.float32


def stages_here(config: RunConfig, mesh: ParallelMesh) -> list[int]:
    return stages_of_rank(mesh.rank("pp"), mesh.size("pp"), len(config.layers_of_stages()))
