"""What a rank needs at its fullest moment, by component."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import asdict, dataclass

from megatron_moe.config.run import RunConfig
from megatron_moe.training.planning import activations as act
from megatron_moe.training.planning.layout import Layout
from megatron_moe.training.planning.states import States, states, weights_of_rank


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors at the fullest moment of a step. activations: kept per token; dispatch: kept per row that was routed here.
    loss: logits and what cross-entropy has beside them. backward: gradients of activations, and what is recomputed."""

    parameters: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    dispatch: float
    loss: float
    backward: float
    pipeline_rank: int = 0

    @property
    def total(self) -> float:
        return sum(value for name, value in asdict(self).items() if name != "pipeline_rank")


def memory(run: RunConfig, layout: Layout, vocab_size: int, global_batch: int, skew: float = 1.0, is_cpu: bool = False,
           threads: int = 1) -> Memory:  # fmt: skip
    """Of the fullest rank: the first, second and last pipeline rank are looked at, with `skew` times the mean load at its experts."""
    ranks = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    found = (memory_of_rank(run, layout, vocab_size, global_batch, skew, is_cpu, threads, r) for r in ranks)
    return max(found, key=lambda m: m.total)


def memory_of_rank(run: RunConfig, layout: Layout, vocab_size: int, global_batch: int, skew: float, is_cpu: bool, threads: int,
                   rank: int) -> Memory:  # fmt: skip
    n = layout.microbatches(global_batch)
    held, unit, exchanged = _states(run, layout.at_rest, vocab_size, rank)
    kept, last, loss = _activations(run, layout.of_tokens, vocab_size, skew, is_cpu, threads, rank)
    flying = in_flight(layout, n, run.model.num_layers, rank)
    dense, routed = kept.dense * flying, kept.routed * flying
    fsdp = held.whole_gradients > 0
    keeps_whole = fsdp and (layout.zero <= 1 or layout.pp > 1)
    carried = 0 if n == 1 else held.whole_gradients if keeps_whole else held.gradients  # of earlier micro-batches
    exchanged = 2 * exchanged if is_cpu else 0  # sent and received, in memory that parallel/zero.py keeps on gloo
    # at the loss; in the backward of the last layer; at the end of the backward, when all gradients are there
    at_loss = (held.gathered_outside, carried + exchanged, dense, routed, loss.total + loss.work, 0.0)
    in_block = (held.gathered, max(carried, unit) + exchanged, dense, routed, 0.0, last)
    whole_at_end = held.whole_gradients if keeps_whole and n > 1 else held.gradients + (unit if fsdp and not exchanged else 0)
    at_end = (held.gathered, whole_at_end + exchanged, 0.0, 0.0, 0.0, 0.0)
    gathered, gradients, dense, routed, logits, backward = max((at_loss, in_block, at_end), key=sum)
    return Memory(held.parameters, gathered, gradients, held.optimizer, dense, routed, logits, backward, rank)


def in_flight(layout: Layout, microbatches: int, num_layers: int, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank holds, in units of all of its layers: 1F1B has as many as there are ranks from
    here to the end; interleaved as its warm-up (Narayanan et al., arXiv 2104.04473, section 2.2), in parts of a rank."""
    chunks = layout.chunks(num_layers)
    if layout.pp == 1:
        return 1
    if chunks == 1:
        return min(microbatches, layout.pp - rank)
    warm_up = 2 * (layout.pp - rank - 1) + (chunks - 1) * layout.pp + 1
    return min(warm_up, microbatches * chunks) / chunks


@functools.lru_cache(maxsize=1 << 16)
def _states(run: RunConfig, layout: Layout, vocab_size: int, rank: int) -> tuple[States, int, int]:
    """And bytes of gradients: of the largest block with its experts, or of what is outside; and of the largest unit that FSDP cuts and
    reduces at once, where experts are one of their own."""
    held = states(run, layout, vocab_size, rank)
    blocks: Counter[int] = Counter()
    units: Counter[tuple[int, bool]] = Counter()
    for layer, weight, ranks in weights_of_rank(run, layout, vocab_size, rank):
        blocks[layer] += weight.elements
        units[layer, bool(weight.dims)] += weight.elements if ranks > 1 else 0
    stored = 8 if run.training.params_dtype == "float64" else 4
    return held, max(blocks.values()) * stored, max(units.values()) * stored


@functools.lru_cache(maxsize=1 << 16)
def _activations(
    run: RunConfig, layout: Layout, vocab_size: int, skew: float, is_cpu: bool, threads: int, rank: int
) -> tuple[act.Kept, float, act.Kept]:
    """(kept by all layers of the rank, what the backward of its heaviest has beside that, the loss) of one micro-batch."""
    x = act.Shapes(run, layout, skew, is_cpu)
    experts, ahead = run.experts_of_blocks(), run.model.mtp_num_layers if rank == layout.pp - 1 else 0
    here = [experts[i - 1] for i in layout.layers_of_rank(run.model.num_layers, rank)] + ahead * [experts[-1]]
    kept = act.embedding(x) if rank == 0 else act.stream(x)
    by_kind = {n: act.layer(x, n) for n in set(here)}
    for n in here:
        kept += by_kind[n]
    kept += act.merge(x) * ahead
    loss = act.loss(x, vocab_size, threads) * (1 + ahead) if rank == layout.pp - 1 else act.Kept()
    return kept, max(act.backward(x, n) for n in set(here)), loss
