"""How long a step takes: one term for each thing that takes time, added up where nothing overlaps.

step = microbatches x (compute + elementwise + TP + EP + CP)     or what the host needs to launch it, if that is more
     + bubble, pipeline sends, exposed DP/ZeRO, optimizer

`exchanges` has the bytes behind tp, ep, cp, dp and p2p. tools/plan.py and benchmarks/scale_model.py both ask here.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import attention_matrices, flops_per_token, score_flops
from megatron_moe.moe.dispatch.choose import Crossing
from megatron_moe.training.planning import activations as act
from megatron_moe.training.planning.exchange import HOST_WAITS, NOTHING, Routed, Sent, around, copied, on_a_node, ring, routed
from megatron_moe.training.planning.layout import Layout
from megatron_moe.training.planning.machines import Assumptions, Machine
from megatron_moe.training.planning.memory import _activations, _states
from megatron_moe.training.planning.states import degree

# A kept tensor is written by its operation and read by the next one; in the backward it is read once more, and a gradient of its
# size is written and read.
MOVES_OF_KEPT = 5
# Operators that eager PyTorch launches for the forward of a part, views left out: counted with a dispatch mode on blocks with RMSNorm,
# SwiGLU and rotary positions. The backward had 0.8 times as many.
OPERATORS = {"attention": 43, "mlp": 12, "moe": 124}
# An update of AdamW per float32 parameter: reads weight, gradient and both moments, writes weight and moments (28 bytes); before it
# the norm reads the gradient and the clip reads and writes it (12).
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by term. `hidden` is not in the total: what of DP/ZeRO goes on while the device computes."""

    compute: float  # matrix products and attention, recomputation too
    elementwise: float  # memory traffic of everything between them
    host: float  # what launching takes beyond what the device is busy; where the host waits for the device, and it for the host
    tp: float
    ep: float
    cp: float
    dp: float
    bubble: float
    p2p: float
    optimizer: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return sum(value for name, value in asdict(self).items() if name != "hidden")

    @property
    def bound(self) -> str:
        """The term that takes most."""
        terms = {name: value for name, value in asdict(self).items() if name != "hidden"}
        return max(terms, key=terms.__getitem__)


@dataclass(frozen=True)
class Microbatch:
    """Forward and backward of one on the mean pipeline rank, in seconds, and what is sent."""

    compute: float
    elementwise: float
    launch: float  # of all operators, whether the device is busy meanwhile or not
    waits: float  # of the device for the host, after the host has waited for it
    tp: Sent
    ep: Sent
    cp: Sent

    @property
    def device(self) -> float:
        return self.compute + self.elementwise + self.tp.seconds + self.ep.seconds + self.cp.seconds


def step_time(
    run: RunConfig, layout: Layout, vocab_size: int, global_batch: int, machine: Machine, assumed: Assumptions, path: str | None = None
) -> StepTime:  # fmt: skip
    """path: how rows travel between experts, in place of what `run` says (`path_of`)."""
    n, layers = layout.microbatches(global_batch), run.model.num_layers
    one = _microbatch(run, layout.of_tokens, vocab_size, machine, assumed, path)
    host = max(one.launch - one.device, 0.0) + one.waits
    bubble = (
        (layout.pp - 1) / layout.chunks(layers) * (one.device + host)
    )  # 1F1B; v parts of a rank make it v times shorter (arXiv 2104.04473, 2.2)
    dp, hideable = _data_parallel(run, layout, vocab_size, n, machine, assumed, one.compute)
    hidden = min(dp.seconds, hideable)
    return StepTime(
        compute=n * one.compute, elementwise=n * one.elementwise, host=n * host, tp=n * one.tp.seconds, ep=n * one.ep.seconds,
        cp=n * one.cp.seconds, dp=dp.seconds - hidden, bubble=bubble, p2p=_sends(run, layout, n, machine, assumed).seconds,
        optimizer=_states(run, layout.at_rest, vocab_size, 0)[0].elements * OPTIMIZER_BYTES / _memory_rate(machine, assumed), hidden=hidden,
    )  # fmt: skip


def exchanges(
    run: RunConfig, layout: Layout, vocab_size: int, global_batch: int, machine: Machine, assumed: Assumptions, path: str | None = None
) -> dict[str, Sent]:  # fmt: skip
    """What a rank sends in a step, by term of StepTime. dp: all of it, also what is hidden."""
    n = layout.microbatches(global_batch)
    one = _microbatch(run, layout.of_tokens, vocab_size, machine, assumed, path)
    dp, _ = _data_parallel(run, layout, vocab_size, n, machine, assumed, one.compute)
    return {"tp": n * one.tp, "ep": n * one.ep, "cp": n * one.cp, "dp": dp, "p2p": _sends(run, layout, n, machine, assumed)}


@functools.lru_cache(maxsize=1 << 16)
def _microbatch(run: RunConfig, layout: Layout, vocab_size: int, machine: Machine, assumed: Assumptions, path: str | None) -> Microbatch:
    """The layers are spread evenly here, and logits over all ranks of the pipeline: the mean rank, not the last."""
    x = act.Shapes(run, layout, assumed.load_skew, machine.is_cpu)
    compute = x.T / layout.tp / layout.pp * _seconds_per_token(run, layout, vocab_size, machine, assumed)
    launch = waits = moved = 0.0
    tp, ep, cp = NOTHING, NOTHING, NOTHING
    for n in run.experts_of_blocks():
        tp += _tensor_parallel(x, n, machine, assumed)
        sent, copies, asks = _expert_parallel(x, n, machine, assumed, path)
        ep, moved, waits = ep + sent, moved + copies, waits + asks * assumed.host_wait_us * 1e-6
        cp += _context_parallel(x, machine, assumed)
        again = {"full": 3 / 2, "selective": 6 / 5}.get(layout.recompute, 1.0)
        launch += 2 * again * (OPERATORS["attention"] + OPERATORS["moe" if n > 1 else "mlp"]) * assumed.launch_us * 1e-6
    kept, _, loss = _activations(
        run, replace(layout, recompute=None, pp=1, virtual=None), vocab_size, assumed.load_skew, machine.is_cpu, 1, 0
    )
    moved += (kept.total + loss.total) * MOVES_OF_KEPT * {"full": 7 / 5}.get(layout.recompute, 1.0)
    stage = 1 / layout.pp
    return Microbatch(
        compute, stage * moved / _memory_rate(machine, assumed), stage * launch, stage * waits, stage * tp, stage * ep, stage * cp
    )


def _seconds_per_token(run: RunConfig, layout: Layout, vocab_size: int, machine: Machine, assumed: Assumptions) -> float:
    """Of forward and backward over the whole model. FLOPs are those of model/flops.py; experts wait for the busiest rank."""
    m, moe, S = run.model, run.moe, run.training.seq_length
    total = flops_per_token(m, moe, S, vocab_size)
    attention = 3 * sum(score_flops(m, S, m.window_of(layer)) for layer in range(1, m.num_layers + m.mtp_num_layers + 1))
    experts = 0.0
    for n in run.experts_of_blocks():
        if n > 1:
            matrices = (3 if m.activation == "swiglu" else 2) * (moe.moe_latent_size or m.hidden_size) * moe.expert_ffn_size(m.ffn_size)
            experts += 3 * 2 * matrices * moe.topk * (min(assumed.load_skew, degree(run, layout, n)) - 1)
    logits = 3 * 2 * m.hidden_size * m.padded_vocab_size(vocab_size) * (1 + m.mtp_num_layers)
    dense = total - attention + experts
    projections = 3 * 2 * attention_matrices(m) * (m.num_layers + m.mtp_num_layers)
    if layout.recompute == "full":  # another forward of all but the logits
        dense, attention = dense + (dense - logits) / 3, attention * 4 / 3
    elif layout.recompute == "selective":
        dense, attention = dense + projections / 3, attention * 4 / 3
    peak = machine.peak_tflops * 1e12
    return dense / (peak * assumed.matmul_efficiency) + attention / (peak * assumed.attention_efficiency)


# ---------------------------------------------------------------- collectives


def _memory_rate(machine: Machine, assumed: Assumptions) -> float:
    return machine.memory_bandwidth * 1e9 * assumed.memory_efficiency


def _tensor_parallel(x: act.Shapes, num_experts: int, machine: Machine, assumed: Assumptions) -> Sent:
    """Of a layer. An all-reduce behind attention and MLP in the forward, in front of them in the backward; sequence parallelism sends
    as much as gathers and scatters. An MoE layer gathers what its slices gave, and their gradients."""
    run, tp = x.run, x.layout.tp
    if tp == 1:
        return NOTHING
    size = x.T * run.model.hidden_size * x.a
    one = ring(size, tp, 1, machine, assumed)
    again = 1 if x.layout.recompute else 0  # the forward of attention once more
    attention = (4 + 2 * again) * one
    dense = (4 + 2 * (x.layout.recompute == "full")) * one
    if num_experts == 1:
        return attention + dense
    branch = dense if act.has_branch(run) else NOTHING
    return attention + branch + (NOTHING if x.layout.sp else 2 * one)


def path_of(run: RunConfig, ranks: int, here: int, num_experts: int) -> str:
    """How rows of a layer travel among `ranks`, `here` of them on each node. `auto` is counted as what it takes between nodes, as alltoall
    within one; so is what has no use for its two legs or cannot reach all ranks (moe/dispatch/choose.py)."""
    kind = run.moe.moe_token_dispatcher
    spans = ranks > here
    if spans and here > 1 and ranks % here == 0:
        crossing = Crossing(num_experts, run.moe.topk, ranks // here, here)
        if kind == "hierarchical" or (kind == "auto" and not run.moe.moe_fp8_dispatch and crossing.pays_in_two_legs):
            return "hierarchical"
    return kind if kind == "allgather" or (kind == "fused" and not spans) else "alltoall"


def _expert_parallel(
    x: act.Shapes, num_experts: int, machine: Machine, assumed: Assumptions, path: str | None
) -> tuple[Sent, float, int]:  # fmt: skip
    """Of a layer: (rows out and back in the forward and in the backward, and in a forward that is recomputed; bytes copied to order
    them; times that the host waits for the device, which is not done again when a layer is recomputed)."""
    run, etp, ep = x.run, x.layout.etp, degree(x.run, x.layout, num_experts)
    if num_experts == 1 or ep * etp == 1:
        return NOTHING, 0.0, 0
    passes, row = 3 if x.layout.recompute == "full" else 2, (run.moe.moe_latent_size or run.model.hidden_size) * x.a
    rows = x.rows(num_experts) / etp  # at the busiest rank
    sent, copies, waits = NOTHING, 0.0, 0
    if ep > 1:
        r = routed_of(x, num_experts, machine)
        path = path or path_of(run, r.ranks, r.here, num_experts)
        sent = passes * routed(path, r, rows / (r.tokens * r.k), machine, assumed)
        copies, waits = passes * copied(path, r), HOST_WAITS[path]
    if etp > 1:  # rows of all that share an expert are gathered, and its answers scattered
        sent += 2 * passes * ring(rows * etp * row, etp, 1, machine, assumed)
    return sent, copies, waits


def routed_of(x: act.Shapes, num_experts: int, machine: Machine) -> Routed:
    """What is not dropped counts as tokens."""
    moe, ep = x.run.moe, degree(x.run, x.layout, num_experts)
    row = (moe.moe_latent_size or x.run.model.hidden_size) * x.a
    return Routed(
        x.t * min(1.0, act.self_rows(x, num_experts)), moe.topk, num_experts, ep, on_a_node(ep, x.layout.etp, machine), row, x.w,
        moe.moe_router_num_groups, moe.moe_router_group_topk,
    )  # fmt: skip


def _context_parallel(x: act.Shapes, machine: Machine, assumed: Assumptions) -> Sent:
    """Of a layer: keys and values gathered, their gradients scattered, gathered again where attention is recomputed."""
    m, layout = x.run.model, x.layout
    size = x.T * layout.cp * max(m.key_value_heads // layout.tp, 1) * (m.qk_width + m.v_width) * x.a
    return (2 + bool(layout.recompute)) * ring(size, layout.cp, layout.tp, machine, assumed)


def _data_parallel(
    run: RunConfig, layout: Layout, vocab_size: int, microbatches: int, machine: Machine, assumed: Assumptions, compute: float
) -> tuple[Sent, float]:
    """(all of it, seconds of compute that it can go on during). What each stage sends: the table of docs/parallelism.md. FSDP gathers the next unit
    while this one computes, and reduces in the background; stages 0 and 1 have the first forward and the last backward for that, 2
    every backward, 3 everything."""
    held, n = _states(run, layout.at_rest, vocab_size, 0)[0], microbatches
    t = run.training
    a = 2 if t.bf16 or t.fp16 else 4
    zero, every = layout.zero, n if layout.zero >= 2 and layout.pp == 1 else 1
    gathers = 0 if zero == 0 else 2 * n if zero == 3 and layout.pp == 1 else 1
    experts = [k for k in run.moe.experts_per_layer(run.model.num_layers) if k > 1]
    ep = degree(run, layout, max(experts)) if experts else 1
    units = run.model.num_layers / layout.pp
    sent = NOTHING
    for elements, ranks, stride in (
        (held.dense_whole, layout.data_ranks, layout.tp),
        (held.expert_whole, layout.stage_ranks // (ep * layout.etp), ep * layout.etp),
    ):
        if ranks == 1 or not elements:
            continue
        shards = layout.shards(ranks)
        go = functools.partial(around, stride=stride, machine=machine, assumed=assumed, messages=units)
        if zero == 0:
            sent += go(2 * (ranks - 1) / ranks * elements * 4, ranks)
            continue
        share = (shards - 1) / shards * elements
        sent += gathers * go(share * a, shards) + every * go(share * 4, shards)
        copies = ranks // shards
        if copies > 1:  # the replicas of hybrid sharding add up their shards once
            sent += go(2 * (copies - 1) / copies * elements / shards * 4, copies, stride=stride * shards)
    passes = {0: 2 / 3, 1: 1.0, 2: 1 / 3 + 2 / 3 * n, 3: 1.0 * n}[zero]  # a forward is a third of forward and backward
    return sent, passes * compute


def _sends(run: RunConfig, layout: Layout, microbatches: int, machine: Machine, assumed: Assumptions) -> Sent:
    """Hidden states to the next stage and their gradients back, of every micro-batch and part."""
    if layout.pp == 1:
        return NOTHING
    x = act.Shapes(run, layout.of_tokens, 1.0)
    far = layout.stage_ranks >= machine.devices_per_node
    rate = (machine.inter_node_bandwidth if far else machine.intra_node_bandwidth) * 1e9 * assumed.network_efficiency
    size = x.s * run.model.hidden_size * x.a
    one = Sent(0.0 if far else size, size if far else 0.0, size / rate + assumed.collective_latency_us * 1e-6)
    return 2 * microbatches * layout.chunks(run.model.num_layers) * one
