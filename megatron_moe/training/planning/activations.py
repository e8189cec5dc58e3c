"""What autograd keeps of a micro-batch for its backward, and what the backward needs beside it. In bytes, from shapes.

One line per operation of model/block.py, moe/layer.py, moe/dispatch.py, moe/experts.py and the loss, saying which tensor that operation
saves (torch's derivatives.yaml, and `save_for_backward` of our own functions). Where the kernels of a CPU and of a GPU save
different things it says so. Held to measured bytes by tests/training/test_planning_memory.py.
"""
# T tokens of a rank, t those of its MoE layer, s those of the stream between modules, R rows at its experts, D hidden, F inner width

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_moe.config.run import RunConfig
from megatron_moe.kernels.expert_mlp_cpu import keeps_activation
from megatron_moe.training.planning.layout import Layout
from megatron_moe.training.planning.states import degree

BLOCKS_OF_LOSS = 2  # kernels/cross_entropy.py: one being computed while the last one has not gone
CPU_BLOCK, BLOCK = 1 << 18, 1 << 26  # kernels/blocks.py: elements


@dataclass(frozen=True)
class Kept:
    """Bytes. dense: per token; routed: per row at the experts, which the load decides. work: what the backward has beside them at once."""

    dense: float = 0.0
    routed: float = 0.0
    work: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.dense + other.dense, self.routed + other.routed, max(self.work, other.work))

    def __mul__(self, times: float) -> Kept:
        return Kept(self.dense * times, self.routed * times, self.work)

    @property
    def total(self) -> float:
        return self.dense + self.routed


@dataclass(frozen=True)
class Shapes:
    """A micro-batch on a rank of a layout, and the bytes of a number."""

    run: RunConfig
    layout: Layout
    skew: float  # rows of the busiest rank of an expert-parallel group over the mean
    is_cpu: bool = False
    T: int = field(init=False)
    s: int = field(init=False)
    t: int = field(init=False)
    a: int = field(init=False)  # bytes of a number of the compute type
    w: int = field(init=False)  # of float32, or of what is wider

    def __post_init__(self) -> None:
        t, layout = self.run.training, self.layout
        stored = 8 if t.params_dtype == "float64" else 4
        tokens = layout.micro_batch * t.seq_length // layout.cp
        part = -(-tokens // layout.tp)
        self.__dict__.update(T=tokens, t=part, s=part if layout.sp else tokens, w=stored, a=2 if t.bf16 or t.fp16 else stored)

    def rows(self, num_experts: int) -> float:
        """R. Experts in one place take all that is routed, whatever the load; a capacity bounds what they take from every rank."""
        k, ep, etp = self.run.moe.topk, degree(self.run, self.layout, num_experts), self.layout.etp
        sent = self.t * k
        busiest = sent * min(self.skew, ep)
        if self.has_capacity:
            busiest = min(busiest, num_experts * self.capacity(num_experts))
        return busiest * etp  # the ranks that share an expert all see its rows

    @property
    def has_capacity(self) -> bool:
        return self.run.moe.moe_token_dropping or self.run.moe.moe_router_policy == "expert_choice"

    def capacity(self, num_experts: int) -> int:
        moe = self.run.moe
        exact = Fraction(self.t * moe.topk, num_experts) * Fraction(str(moe.moe_train_capacity_factor))
        return max(math.ceil(exact), moe.moe_min_capacity)


def embedding(x: Shapes) -> Kept:
    D, m = x.run.model.hidden_size, x.run.model
    return Kept(x.s * D * x.a * (1 + (m.hidden_dropout > 0)) + 8 * x.T)  # the stream, dropout's mask in the stream's type; tokens


def merge(x: Shapes) -> Kept:
    """What a module of multi-token prediction makes of a token's vector and what the one before says: its block's input."""
    D = x.run.model.hidden_size
    return embedding(x) + norm(x) * 2 + Kept(x.s * D * x.a * (1 + 2))  # the hidden state, both normed side by side (the sum is embedding's)


def norm(x: Shapes) -> Kept:
    """Its input is the stream, which is counted where it is made."""
    D = x.run.model.hidden_size
    if x.run.model.normalization == "LayerNorm":
        return Kept(x.s * 2 * x.a)  # mean and inverse deviation
    if not x.is_cpu:
        return Kept(x.s * x.w)  # fused: inverse root
    wide = 0 if x.a == x.w else D * x.w - D * x.a  # widened input, in place of the stream
    return Kept(x.s * (D * x.w + x.w + wide))  # normalised input, before the weight


def attend(x: Shapes) -> Kept:
    """Norm, attention, residual addition; the stream that comes out of it."""
    m, tp = x.run.model, x.layout.tp
    D, heads = m.hidden_size, m.num_attention_heads // tp
    q_width, v_width = m.qk_width + 8 * (m.softmax_type == "learnable"), m.v_width  # columns that carry the sinks (model/core.py)
    keys = x.T * x.layout.cp  # keys and values of whole sequences
    kept = norm(x).dense + x.T * D * x.a  # what q, k and v are made from (gathered, under sequence parallelism)
    kept += x.T * heads * q_width * x.a  # q
    if x.run.parallel.cp_comm_type == "p2p" and x.layout.cp > 1:
        # k and v of this rank, filled up to one width: those of others are let go
        kept += x.T * max(m.key_value_heads // tp, 1) * 2 * max(q_width, v_width) * x.a
    else:
        kept += keys * heads * (q_width + v_width) * x.a  # k and v, a copy for every query head
    if m.position_embedding_type == "rope":
        rotated = m.qk_pos_emb_head_dim if m.multi_latent_attention else m.rotary_width(m.head_dim)
        kept += 2 * 2 * x.T * (rotated // 2) * x.w  # cosines and sines, of q and of k
    kept += _between_projections(x)
    if m.attention_dropout:  # the explicit product: probabilities, the same with zeros, and the mask of bytes
        kept += keys * x.run.training.seq_length // x.layout.cp * heads * (x.w + x.a + 1)
    elif x.is_cpu and q_width != v_width:  # no fused kernel of a CPU takes two widths: probabilities
        kept += keys * x.run.training.seq_length // x.layout.cp * heads * x.w
    else:
        kept += x.T * heads * x.w  # fused: log of the sum of exponentials
    kept += x.T * heads * v_width * x.a  # what comes out, and goes into the projection
    out = x.s * D * x.a * (1 + (m.hidden_dropout > 0))  # the new stream, dropout's mask
    return Kept(kept + out, work=x.T * (D + 2 * heads * (m.qk_width + m.v_width)) * x.a)  # gradients of what came out, of q, k and v


def _between_projections(x: Shapes) -> float:
    """Of the norms of q and k: what goes in, and what a norm keeps. Of latent attention: the same of the narrow vectors, which go on into
    a projection; the keys that lie beside the values."""
    m, tp = x.run.model, x.layout.tp
    if m.multi_latent_attention:
        narrow = [width for width in (m.q_lora_rank, m.kv_lora_rank) if width]
        beside = m.num_attention_heads // tp * m.qk_head_dim * x.a
        return x.T * (sum(2 * width * x.a + _norm_keeps(x, width) for width in narrow) + beside)
    if not m.qk_layernorm:
        return 0.0
    q_heads, k_heads = m.num_attention_heads // tp, max(m.key_value_heads // tp, 1)
    if m.qk_layernorm_scope == "head":
        norms = (q_heads + k_heads) * _norm_keeps(x, m.head_dim)
    else:
        norms = _norm_keeps(x, q_heads * m.head_dim) + _norm_keeps(x, k_heads * m.head_dim)
    return x.T * ((q_heads + k_heads) * m.head_dim * x.a + norms)


def _norm_keeps(x: Shapes, width: int) -> float:
    """Of one vector, beside what goes in: see `norm`."""
    if x.run.model.normalization == "LayerNorm":
        return 2 * x.a
    return width * x.w + x.w if x.is_cpu else x.w


def stream(x: Shapes) -> Kept:
    """All that a recomputed part keeps: what goes into it."""
    return Kept(x.s * x.run.model.hidden_size * x.a)


def _activation_copies(name: str) -> tuple[int, int]:
    """(tensors of the inner width that the activation keeps; of these, what is handed on)."""
    return {"gelu": (2, 1), "gelu_tanh": (2, 1), "relu": (1, 1), "squared_relu": (2, 1), "swiglu": (4, 1)}[name]


def mlp(x: Shapes, width: int) -> Kept:
    """Between the stream's norm and the addition."""
    copies, _ = _activation_copies(x.run.model.activation)
    kept = x.T * copies * (width // x.layout.tp) * x.a  # gelu: before and after; swiglu: gate, silu, value, product
    return Kept(kept, work=x.T * (x.run.model.hidden_size + width // x.layout.tp) * x.a)


def feed_forward(x: Shapes) -> Kept:
    """A dense layer's."""
    m = x.run.model
    out = x.s * m.hidden_size * x.a * (1 + (m.hidden_dropout > 0))
    return norm(x) + Kept(x.T * m.hidden_size * x.a + out) + mlp(x, m.ffn_size)


def route(x: Shapes, num_experts: int) -> Kept:
    """Norm, router, losses, weights: never recomputed."""
    D, k, c = x.run.model.hidden_size, x.run.moe.topk, x.run.moe
    kept = norm(x).dense + x.s * D * x.a  # normed tokens
    if x.layout.tp > 1 and not x.layout.sp:
        kept += x.t * D * x.a  # the slice of this rank
    if x.a != x.w and not x.is_cpu:
        kept += x.t * D * x.w  # the router's input in float32
    kept += x.t * num_experts * x.w * (2 if c.moe_router_score_function == "softmax" else 4)  # logits, scores (and shares of a sum)
    kept += x.t * (k * (8 + 8 + 2 * x.w + 2) + 3 * x.w)  # ids, weights and masks; z loss
    return Kept(kept)


def compute(x: Shapes, num_experts: int) -> Kept:
    """Dispatch, experts, combine."""
    m, moe, rows, k = x.run.model, x.run.moe, x.rows(num_experts), x.run.moe.topk
    width, inner = moe.moe_latent_size or m.hidden_size, moe.expert_ffn_size(m.ffn_size) // x.layout.etp
    copies, _ = _activation_copies(m.activation)
    kept = rows * width * x.a  # rows at the experts
    on_cpu = x.is_cpu and x.run.training.moe_kernels != "reference" and x.a < 8
    if on_cpu:  # kernels/expert_mlp_cpu.py: what comes before the activation, or that too, the output before its gate weight, and that
        inner_rows = 1 + (m.activation == "swiglu") + keeps_activation(m.activation)
        kept += rows * (width + inner_rows * inner) * x.a + rows * x.w
    else:
        kept += rows * (copies + 1) * inner * x.a  # as in an MLP, and the product with the gate weight
        kept += rows * x.a  # gate weights in the compute type
        if m.add_bias_linear:
            kept += rows * (width * x.a + 8)  # the last bias of every row, whose weight has a gradient; its expert's number
    kept += x.t * k * 8 * 3 + (rows * 8 * 2 if degree(x.run, x.layout, num_experts) > 1 else 0)  # order, places; of what arrived
    dense = x.t * width * x.a * 2 * bool(moe.moe_latent_size)  # narrow tokens, before and after
    work = x.t * m.hidden_size * x.a + rows * (width * (x.a + (x.w if x.a != x.w else 0)) + inner * x.a)  # of y, rows, weighted inner rows
    if on_cpu:  # of y; of rows twice (within an operator nothing is counted, here as elsewhere)
        work = x.t * m.hidden_size * x.a + rows * width * 2 * x.a
    return Kept(dense, kept, work)


def self_rows(x: Shapes, num_experts: int) -> float:
    """Share of a rank's own assignments that are not dropped, at equally busy experts."""
    return num_experts * x.capacity(num_experts) / (x.t * x.run.moe.topk) if x.has_capacity else 1.0


def finish(x: Shapes) -> Kept:
    """Mixing with the dense branches and the residual addition; the new stream."""
    m, moe = x.run.model, x.run.moe
    D, out = m.hidden_size, Kept(x.s * m.hidden_size * x.a * (1 + (m.hidden_dropout > 0)))
    if x.layout.sp and (moe.residual or moe.moe_shared_expert_intermediate_size):
        out += Kept(x.T * D * x.a)  # gathered tokens
    if moe.residual:
        out += mlp(x, m.ffn_size)
    if moe.residual == "coefficient":
        out += Kept(x.s * (2 * D + 2) * x.a)  # both answers, and their weights
    if width := moe.moe_shared_expert_intermediate_size:
        out += mlp(x, width) + Kept(x.s * (D + 2) * x.a * moe.moe_shared_expert_gate)
    return out


def layer(x: Shapes, num_experts: int) -> Kept:
    """What a whole layer keeps, with the recomputation of the layout."""
    how = x.layout.recompute
    kept = stream(x) if how else attend(x)
    if num_experts == 1:
        return kept + (stream(x) if how == "full" else feed_forward(x))
    kept += route(x, num_experts)
    kept += Kept(routed=x.t * x.run.moe.topk * 8.0)  # the order of the plan
    kept += answer(x) if how == "full" and has_branch(x.run) else Kept()
    kept += Kept() if how == "full" else compute(x, num_experts)
    return kept + (stream(x) if how == "full" else finish(x))


def has_branch(run: RunConfig) -> bool:
    return bool(run.moe.residual or run.moe.moe_shared_expert_intermediate_size)


def answer(x: Shapes) -> Kept:
    """The experts' answer, kept for a branch that is recomputed."""
    return Kept(x.s * x.run.model.hidden_size * x.a)


def backward(x: Shapes, num_experts: int) -> float:
    """What the backward of a layer has at its fullest moment beyond what the layer kept: a part at a time, from the last, is computed
    again where it was not kept, has gradients of its own, and is gone when the next one begins."""
    how = x.layout.recompute
    parts = (
        [(finish(x), how == "full"), (compute(x, num_experts), how == "full")] if num_experts > 1 else [(feed_forward(x), how == "full")]
    )
    freed, most = 0.0, 0.0
    for part, is_recomputed in (*parts, (attend(x), how is not None)):
        again = part.total if is_recomputed else 0.0
        most = max(most, again + part.work - freed)
        freed += 0.0 if is_recomputed else part.total
    return most


def loss(x: Shapes, vocab_size: int, threads: int = 1) -> Kept:
    """Last norm, logits, cross-entropy: kept, and beside it what the largest moment of forward or backward has."""
    m, V = x.run.model, x.run.model.padded_vocab_size(vocab_size)
    v, kept = V // x.layout.tp, norm(x).dense + x.T * m.hidden_size * x.a + x.T * (2 * x.w + 2 * x.w + 8)
    if x.layout.tp > 1:  # parallel/tensor.py: probabilities are kept; made from wide logits, what is left of them, exponentials
        masked = v * x.w if vocab_size < V else 0
        return Kept(kept + x.T * v * x.w, work=x.T * (v * (2 * x.w + x.a + (x.w if x.a != x.w else 0)) + masked))
    block = max((CPU_BLOCK * threads if x.is_cpu else BLOCK) // V, 1)
    rows = min(x.T, BLOCKS_OF_LOSS * block)
    return Kept(kept + x.T * V * x.a, work=x.T * V * x.a + rows * V * x.w)  # logits; their gradient, blocks
