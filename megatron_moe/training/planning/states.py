"""What a rank holds whatever its tokens are: parameters, the copies that FSDP gathers, gradients, optimizer state.

The same numbers as parallel/footprint.py counts on a model that was built, from shapes alone: thousands of layouts in a second. A
test compares the two (tests/training/test_planning_states.py).
"""
# D hidden, F inner width, V padded vocabulary, E experts

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.training.planning.layout import Layout


@dataclass(frozen=True)
class Weight:
    """One parameter on a rank before FSDP: `shape` is what tensor, expert and expert-tensor parallelism leave of it."""

    shape: tuple[int, ...]
    dims: str = ""  # of an expert stack, as in moe/experts.py; '' for a dense parameter
    keeps_type: bool = False  # the router, which is gathered in its own type

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def shard(self, ranks: int, cut: int = 0) -> int:
        """Elements of the fullest of `ranks` shards along dim `cut`: torch gives the first ranks more."""
        return self.elements // self.shape[cut] * -(-self.shape[cut] // ranks) if self.elements else 0


@dataclass(frozen=True)
class States:
    """Bytes on a rank. The components of parallel/footprint.py."""

    parameters: int
    gathered: int
    gathered_outside: int  # of these, what is outside of the blocks, or all where blocks are not freed
    gradients: int
    whole_gradients: int
    optimizer: int
    elements: int  # of the shards
    dense_whole: int  # elements before FSDP cuts them, which collectives move
    expert_whole: int


def states(run: RunConfig, layout: Layout, vocab_size: int, rank: int = 0) -> States:
    """Of the fullest rank of pipeline rank `rank`."""
    t = run.training
    is_16_bit = t.bf16 or t.fp16
    stored = 8 if t.params_dtype == "float64" else 4
    computed = 2 if is_16_bit else stored
    shards = 0
    whole: Counter[str] = Counter()
    gathered: Counter[int] = Counter()  # by layer; 0: outside of the layers
    for layer, weight, ranks in weights_of_rank(run, layout, vocab_size, rank):
        shards += weight.shard(ranks, _cut(weight, ranks))
        whole["expert" if weight.dims else "dense"] += weight.elements
        gathered[layer] += weight.elements * (stored if weight.keeps_type else computed)
    is_wrapped = layout.stage_ranks > 1 or is_16_bit
    outside = gathered.pop(0, 0)
    frees = layout.zero == 3 and layout.pp == 1  # torch's stages keep them from a backward to the next forward
    blocks = max(gathered.values(), default=0) if frees else sum(gathered.values())
    return States(
        parameters=shards * stored,
        gathered=(outside + blocks) if is_wrapped else 0,
        gathered_outside=(outside if frees else outside + blocks) if is_wrapped else 0,
        gradients=shards * stored,
        whole_gradients=whole.total() * stored if is_wrapped else 0,
        optimizer=shards * stored * moments(run),
        elements=shards,
        dense_whole=whole["dense"],
        expert_whole=whole["expert"],
    )


def moments(run: RunConfig) -> int:
    """Numbers that the optimizer keeps for each parameter."""
    return 2 if run.optimizer.optimizer != "sgd" else int(run.optimizer.sgd_momentum > 0)


def _cut(weight: Weight, ranks: int) -> int:
    """The dim along which FSDP cuts (parallel/zero.py): the first; of experts that are fewer than `ranks`, another that divides."""
    if not weight.dims or weight.shape[0] % ranks == 0:
        return 0
    return next((i for i, dim in enumerate(weight.dims) if dim not in "EF" and weight.shape[i] % ranks == 0), 0)


def weights_of_rank(run: RunConfig, layout: Layout, vocab_size: int, rank: int = 0) -> Iterator[tuple[int, Weight, int]]:
    """(layer or 0, weight, ranks that share it) of every parameter of a pipeline rank."""
    m, data = run.model, layout.shards(layout.data_ranks)
    vocabulary = Weight((m.padded_vocab_size(vocab_size) // layout.tp, m.hidden_size))
    is_last = rank == layout.pp - 1
    if rank == 0:
        yield 0, vocabulary, data
        if m.position_embedding_type == "learned_absolute":
            yield 0, Weight((m.max_position_embeddings, m.hidden_size)), data
    if is_last:
        yield from ((0, weight, data) for weight in _norm(m))
        if not m.is_tied or layout.pp > 1:  # tied: the last stage has a copy
            yield 0, vocabulary, data
        if m.mtp_num_layers and not m.is_tied and layout.pp > 1:  # the vectors of tokens, beside the matrix of the logits
            yield 0, vocabulary, data
    experts, ahead = run.experts_of_blocks(), [m.num_layers + 1 + n for n in range(m.mtp_num_layers if is_last else 0)]
    for layer in ahead:
        yield from ((layer, weight, data) for weight in [*3 * _norm(m), Weight((m.hidden_size, 2 * m.hidden_size))])
    for layer in [*layout.layers_of_rank(m.num_layers, rank), *ahead]:
        n = experts[layer - 1]
        yield from ((layer, weight, data) for weight in dense_weights(m, run.moe, n > 1, layout.tp))
        if n > 1:
            yield layer, Weight((n, m.hidden_size), keeps_type=True), data  # the router
            ep = degree(run, layout, n)
            ranks = layout.shards(layout.stage_ranks // (ep * layout.etp))
            yield from ((layer, weight, ranks) for weight in expert_weights(m, run.moe, n // ep, layout.etp))


def degree(run: RunConfig, layout: Layout, num_experts: int) -> int:
    """Expert-parallel degree of a layer (MoEConfig.expert_parallel_degree, for the EP of the layout)."""
    return math.gcd(num_experts, layout.ep) if run.moe.moe_pyramid_ep == "auto" else min(num_experts, layout.ep)


def _norm(m: ModelConfig, width: int | None = None) -> list[Weight]:
    return [Weight((width or m.hidden_size,))] * (2 if m.normalization == "LayerNorm" else 1)


@functools.lru_cache(maxsize=1024)
def dense_weights(m: ModelConfig, moe: MoEConfig, is_moe: bool, tp: int) -> list[Weight]:
    """Of a block, experts left out. Columns of q, k, v, fc1 are cut, rows of the projections behind them (parallel/tensor.py)."""
    out = [*_norm(m), *_norm(m), *(_latent_attention(m, tp) if m.multi_latent_attention else _attention(m, tp))]
    if m.softmax_type == "learnable":
        out.append(Weight((m.num_attention_heads // tp,)))
    if not is_moe or moe.residual:
        out += _mlp(m, m.ffn_size // tp)
    if is_moe:
        out += _beside_experts(m, moe, tp)
    return out


def _attention(m: ModelConfig, tp: int) -> list[Weight]:
    D, h = m.hidden_size, m.head_dim
    q, kv = m.num_attention_heads * h // tp, m.key_value_heads * h
    kv = kv // tp if m.key_value_heads % tp == 0 else kv  # fewer heads than ranks: whole on all of them
    out = [Weight((q, D)), Weight((kv, D)), Weight((kv, D)), Weight((D, q))]
    if m.add_bias_linear or m.add_qkv_bias:
        out += [Weight((q,)), Weight((kv,)), Weight((kv,))]
    if m.add_bias_linear:
        out.append(Weight((D,)))
    if m.qk_layernorm:
        out += [*_norm(m, h), *_norm(m, h)] if m.qk_layernorm_scope == "head" else [*_norm(m, q), *_norm(m, kv)]
    return out


def _latent_attention(m: ModelConfig, tp: int) -> list[Weight]:
    """The projections to narrow vectors, and their norms, are whole on all ranks (parallel/heads.py)."""
    D, heads, narrow = m.hidden_size, m.num_attention_heads // tp, m.q_lora_rank
    whole = [(m.kv_lora_rank + m.qk_pos_emb_head_dim, D), *([(narrow, D)] if narrow else [])]
    cut = [(heads * m.qk_width, narrow or D), (heads * (m.qk_head_dim + m.v_head_dim), m.kv_lora_rank)]
    out = [Weight(shape) for shape in (*whole, *cut, (D, heads * m.v_head_dim))]
    if m.add_bias_linear:
        out += [Weight((rows,)) for rows, _ in (*whole, *cut)] + [Weight((D,))]
    return out + _norm(m, m.kv_lora_rank) + (_norm(m, narrow) if narrow else [])


def _mlp(m: ModelConfig, width: int) -> list[Weight]:
    inner = 2 if m.activation == "swiglu" else 1
    matrices = [Weight((width, m.hidden_size))] * inner + [Weight((m.hidden_size, width))]
    return matrices + ([Weight((width,))] * inner + [Weight((m.hidden_size,))] if m.add_bias_linear else [])


def _beside_experts(m: ModelConfig, moe: MoEConfig, tp: int) -> list[Weight]:
    D, out = m.hidden_size, []
    if moe.residual == "coefficient":
        out += [Weight((2, D)), Weight((2,))]
    if width := moe.moe_shared_expert_intermediate_size:
        out += _mlp(m, width // tp)
    if moe.moe_shared_expert_gate:
        out.append(Weight((1, D)))
    if latent := moe.moe_latent_size:
        out += [Weight((latent, D)), Weight((D, latent))]
    return out


@functools.lru_cache(maxsize=1024)
def expert_weights(m: ModelConfig, moe: MoEConfig, experts_here: int, etp: int) -> list[Weight]:
    E, D, F = experts_here, moe.moe_latent_size or m.hidden_size, moe.expert_ffn_size(m.ffn_size) // etp
    inner = 2 if m.activation == "swiglu" else 1
    out = [Weight((E, D, F), "EDF")] * inner + [Weight((E, F, D), "EFD")]
    return out + ([Weight((E, F), "EF")] * inner + [Weight((E, D), "ED")] if m.add_bias_linear else [])
