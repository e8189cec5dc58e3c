"""forward and backward of one MoE layer against its floor: its products, activation, one gather and one weighted scatter

4096 tokens, hidden size 512, inner width 2048. Everything that a layer does counts: router, choice, order of rows, statistics, balance loss, autograd.
The floor is the same arithmetic written by hand without any of that: rows are gathered once, each expert's products go where they belong, the
activation is computed on them, the results are added up with their weights in one operator; and the same backwards, without autograd. Its
products are of the library that ours takes (kernels/matmul_cpu.py).
The routing is prescribed, to all systems alike: a token is made such that its logits are those that are wanted. It is balanced, Zipf-skewed,
or what a trained model did (benchmarks/recorded_routing.py). Systems share a process, for 256 experts have 2 GB of weights.
"""
# T tokens, D hidden, F inner width, E experts, K experts per token, R = T*K rows

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Report, System, interleave, missing, paired_ratio, spread, timing_table
from benchmarks.recorded_routing import RECORDED
from megatron_moe.config.flags import flag
from megatron_moe.config.moe import MoEConfig
from megatron_moe.kernels.matmul_cpu import matmul
from megatron_moe.moe.layer import MoELayer
from megatron_moe.utils.host_memory import keep_freed_memory

PEERS = {
    "transformers": "the block of Mixtral, experts eager or grouped_mm (swiglu)",
    "torchtitan": "its MoE (swiglu, bf16)",
    "deepspeed": "its MoE without dropping, k = 1 and 2 (a list of MLPs; gelu)",
    "tutel": "its MoE layer",
    "megatron.core": "its MoELayer: all-gather dispatcher, sequential experts; with two parts replaced, without which it needs a GPU",
}
NOT_DRIVEN = {"tutel": "not in the package index; NO_CUDA=1 and its sources would be needed"}
OURS, REFERENCE, FLOOR, ONE_GEMM = "megatron_moe", "megatron_moe reference", "floor", "one product"
T, D, INNER = 4096, 512, 2048
BARS = {8: 1.06, 64: 1.12}
ABOVE_8 = 0.05  # at 256 experts
MOST_EAGER = 8  # experts of peers that make a full-size gradient for each: 18 times the floor at 64
WARM_GRADIENT = 1 / 64


@dataclass(frozen=True)
class Options(harness.Options):
    num_experts: tuple[int, ...] = flag((8, 64, 256), "cases: experts", minimum=2)
    topk: tuple[int, ...] = flag((1, 2), "cases: experts per token", minimum=1)
    activation: tuple[Literal["gelu", "swiglu"], ...] = flag(("gelu", "swiglu"), "cases: activation")
    dtype: tuple[Literal["fp32", "bf16"], ...] = flag(("fp32", "bf16"), "cases: type of tokens and experts; the router's is fp32")
    routing: tuple[Literal["balanced", "zipf", "recorded"], ...] = flag(("balanced", "zipf", "recorded"), "cases: what the router decides")
    peers: bool = flag(True, "measure other libraries too, where they are installed")


class Case(NamedTuple):
    experts: int
    k: int
    activation: str
    dtype: str
    routing: str
    tokens: int = T
    hidden: int = D
    inner: int = INNER

    @property
    def name(self) -> str:
        return f"E{self.experts} k{self.k} {self.activation} {self.dtype} {self.routing}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def run(options: Options) -> Report:
    keep_freed_memory()  # as a run on a CPU does
    size = (64, 32, 48) if options.quick else (T, D, INNER)
    cases = [
        Case(*c, *size) for c in itertools.product(options.num_experts, options.topk, options.activation, options.dtype, options.routing)
    ]
    if options.quick:
        cases = [c for c in cases if c.experts == min(options.num_experts)]
    report = Report("moe_layer", {"tokens": size[0], "hidden": size[1], "inner": size[2], "threads": torch.get_num_threads()})
    report.skipped = (missing(PEERS) | NOT_DRIVEN) if options.peers else dict.fromkeys(PEERS, "not asked for")
    for case in cases:
        measure(report, case, options)
    return report


def measure(report: Report, case: Case, options: Options) -> None:
    torch.manual_seed(0)
    made = Made(case)
    systems = ours_and_limits(made)
    if options.peers:
        systems |= peers(made, report)
    differences = {name: difference(made, name, turn) for name, turn in systems.items() if name != ONE_GEMM}
    samples = interleave([System(name, turn) for name, turn in systems.items()], options.rounds_or(9))
    report.samples[case.name] = samples
    ratio = paired_ratio(samples, OURS, FLOOR)
    peer = [n for n in systems if n not in (OURS, REFERENCE, FLOOR, ONE_GEMM)]
    figures: dict[str, Any] = {
        "over_floor": {n: paired_ratio(samples, n, FLOOR)._asdict() for n in systems},
        "least_over_least": {n: min(t.cpu for t in s) / min(t.cpu for t in samples[FLOOR]) for n, s in samples.items()},
        "largest_difference_to_ours": differences, "rows_of_busiest_expert_over_mean": made.skew,
    }  # fmt: skip
    said = f"{ratio.median:.3f} of the floor (quartiles {ratio.low:.3f}-{ratio.high:.3f})"
    if case.experts in BARS:
        said += f"; the bar is {BARS[case.experts]}"
    if peer:
        best = min(peer, key=lambda n: spread(t.cpu for t in samples[n]).median)
        figures["fastest_peer"] = best
        figures["over_fastest_peer"] = paired_ratio(samples, OURS, best)._asdict()
        said += f"; {figures['over_fastest_peer']['median']:.3f} of {best}"
    report.figures[case.name] = figures
    report.tables.append(f"{case.name} (busiest expert {made.skew:.2f} times the mean)\n{timing_table(samples, FLOOR)}\n{said}")


# ---------------------------------------------------------------- one case


class Made:
    """A layer, and tokens that its router sends where the case wants them."""

    def __init__(self, case: Case):
        E, K, dtype = case.experts, case.k, case.torch_dtype
        self.case = case
        self.layer = MoELayer(
            0, E, case.hidden, case.inner, MoEConfig(num_experts=(E,), topk=K, moe_token_dropping=False), case.activation, bias=False
        )
        self.layer.experts.to(dtype)
        wanted_TK = prescribed(case)
        with torch.no_grad():
            rows = min(E, case.hidden)
            gate_ED = torch.zeros(E, case.hidden)
            gate_ED[:rows] = torch.linalg.qr(torch.randn(case.hidden, rows)).Q.t()
            self.layer.gate.weight.copy_(gate_ED)
            wanted_TE = torch.randn(case.tokens, E).mul_(0.3).clamp_(-1, 1)
            wanted_TE.scatter_(1, wanted_TK, 4.0 - torch.arange(K).expand(case.tokens, K).float())
            noise_TD = torch.randn(case.tokens, case.hidden)
            x_TD = noise_TD - (noise_TD @ gate_ED.t()) @ gate_ED + wanted_TE @ gate_ED
        self.x_TD = x_TD.to(dtype).requires_grad_()
        self.upstream_TD = torch.randn(case.tokens, case.hidden).mul_(WARM_GRADIENT).to(dtype)
        self.layer.begin_step(1.0 / case.tokens)
        routing = self.layer.routed(self.x_TD)[1]
        assert torch.equal(routing.ids_TK, wanted_TK), "the router does not do what the tokens were made for"
        self.weights_TK = routing.weights_TK.detach()
        self.order_R = wanted_TK.reshape(-1).argsort(stable=True)
        self.ends = routing.counts_E.cumsum(0).tolist()
        self.skew = float(routing.counts_E.max() * E / (case.tokens * K))
        with torch.no_grad():
            self.y_TD = self.layer(self.x_TD)

    def turn(self, module: torch.nn.Module) -> Tensor:
        """Forward and backward. Gradients are new memory each time, and are given back within the turn, as those of the floor: a system
        that held on to them would find its own pages again, and the others would have to look for some."""
        y = module(self.x_TD)
        y.backward(self.upstream_TD.view(y.shape))
        self.x_TD.grad = None
        for p in module.parameters():
            p.grad = None
        return y.detach()


def prescribed(case: Case) -> Tensor:
    """ids_TK, best first."""
    E, K, tokens = case.experts, case.k, case.tokens
    if case.routing == "recorded":
        ids = np.load(RECORDED)[str(E)][:tokens, :K].astype(np.int64)
        return torch.from_numpy(ids)
    if case.routing == "zipf":
        logits = -torch.arange(1, E + 1).float().log() + -torch.empty(tokens, E).exponential_().log()
        return logits.topk(K).indices
    slot_R = torch.arange(tokens * K) % E  # K neighbours: different experts, as many for each
    return slot_R.view(tokens, K)[torch.randperm(tokens)]


def difference(made: Made, name: str, turn: Callable[[], Tensor]) -> float:
    """Largest difference to our output, over its largest value; more than rounding is another computation, and an error."""
    y_TD, ours_TD = turn().detach().view(made.y_TD.shape).float(), made.y_TD.float()
    if made.case.k == 1 and name.startswith(("transformers", "torchtitan")):
        y_TD = y_TD * made.weights_TK  # they normalise the only weight to 1
    found = float((y_TD - ours_TD).abs().max() / ours_TD.abs().max())
    assert found < (0.03 if made.case.dtype == "bf16" or "torchtitan" in name else 1e-4), f"{made.case.name}: {name} differs by {found:.2g}"
    return found


# ---------------------------------------------------------------- ours, and the limits


def ours_and_limits(made: Made) -> dict[str, Callable[[], Tensor]]:
    def ours(use_reference: bool) -> Tensor:
        made.layer.experts.use_reference = use_reference
        made.layer.begin_step(1.0 / made.case.tokens)
        return made.turn(made.layer)

    return {
        OURS: lambda: ours(False), REFERENCE: lambda: ours(True), FLOOR: lambda: floor(made)[0], ONE_GEMM: lambda: one_product(made),
    }  # fmt: skip


@torch.no_grad()
def floor(made: Made) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Nothing but the arithmetic: the output, and the gradients. Gradients of weights, as those of any system, are new memory."""
    aten, case, x_TD, experts = torch.ops.aten, made.case, made.x_TD, made.layer.experts
    R, dtype = case.tokens * case.k, x_TD.dtype
    token_R = made.order_R // case.k
    row_TK = torch.empty_like(made.order_R).scatter_(0, made.order_R, torch.arange(R)).view(case.tokens, case.k)
    w1, w2 = experts.w1.unbind(), experts.w2.unbind()
    w_gate = experts.w_gate.unbind() if case.activation == "swiglu" else None
    x_RD = x_TD.index_select(0, token_R)
    a_RF, z_RD, before = torch.empty(R, case.inner, dtype=dtype), torch.empty_like(x_RD), {}
    rows = [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *made.ends], made.ends)) if start < end]
    for e, own in rows:
        a, (h, g) = a_RF[own], before.setdefault(e, (matmul(x_RD[own], w1[e]), matmul(x_RD[own], w_gate[e]) if w_gate else None))
        if w_gate:
            aten.silu.out(g, out=a).mul_(h)
        else:
            aten.gelu.out(h, out=a)
        matmul(a, w2[e], out=z_RD[own])
    weights_TK = made.weights_TK.to(dtype)
    y_TD = F.embedding_bag(row_TK, z_RD, per_sample_weights=weights_TK, mode="sum")

    dz_RD = made.upstream_TD.index_select(0, token_R)
    dweights_R = (dz_RD * z_RD).sum(-1)
    dz_RD.mul_(weights_TK.reshape(-1)[made.order_R, None])
    dw1_EDF, dw2_EFD, dx_RD = torch.empty_like(experts.w1), torch.empty_like(experts.w2), torch.empty_like(x_RD)
    dw_gate_EDF = torch.empty_like(experts.w_gate) if w_gate else None
    dw1, dw2, dw_gate = dw1_EDF.unbind(), dw2_EFD.unbind(), dw_gate_EDF.unbind() if w_gate else None
    for e, own in rows:
        x, (h, g), a, dz = x_RD[own], before[e], a_RF[own], dz_RD[own]
        matmul(a.t(), dz, out=dw2[e])
        dh = matmul(dz, w2[e].t())
        if w_gate:
            dg = dh * h
            aten.silu_backward.grad_input(dg, g, grad_input=dg)
            dh.mul_(F.silu(g))
            matmul(x.t(), dg, out=dw_gate[e])
        else:
            aten.gelu_backward.grad_input(dh, h, grad_input=dh)
        matmul(x.t(), dh, out=dw1[e])
        matmul(dh, w1[e].t(), out=dx_RD[own])
        if w_gate:
            matmul(dg, w_gate[e].t(), out=dx_RD[own], adds=True)
    for e in set(range(case.experts)) - {e for e, _ in rows}:
        for d in (dw1, dw2, *((dw_gate,) if w_gate else ())):
            d[e].zero_()
    return y_TD, (F.embedding_bag(row_TK, dx_RD, mode="sum"), dweights_R, dw1_EDF, dw2_EFD, dw_gate_EDF)


@torch.no_grad()
def one_product(made: Made) -> None:
    """As many multiplications, of all rows with one expert's matrices: what no grouping could beat."""
    R, experts, dtype = made.case.tokens * made.case.k, made.layer.experts, made.x_TD.dtype
    x_RD, h_RF = torch.ones(R, made.case.hidden, dtype=dtype), torch.ones(R, made.case.inner, dtype=dtype)
    inwards = [experts.w1[0], *([experts.w_gate[0]] if experts.w_gate is not None else [])]
    for w in inwards:
        matmul(x_RD, w)
        matmul(x_RD.t(), h_RF)
        matmul(h_RF, w.t())
    matmul(h_RF, experts.w2[0])
    matmul(h_RF.t(), x_RD)
    matmul(x_RD, experts.w2[0].t())


# ---------------------------------------------------------------- peers


def peers(made: Made, report: Report) -> dict[str, Callable[[], Tensor]]:
    """Those that are installed and do what the case is about, with our weights."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, build in (
        ("transformers", transformers),
        ("torchtitan", torchtitan),
        ("deepspeed", deepspeed),
        ("megatron.core", megatron_core),
    ):
        if name not in report.skipped:
            try:
                found |= build(made)
            except Exception as error:
                report.skipped[name] = f"{made.case.name}: {type(error).__name__}: {error}"
    return found


def _joined(made: Made) -> tuple[Tensor, Tensor, Tensor]:
    """Ours in the layout of torch.nn.Linear: gate and value, each [E, F, D], and the way back [E, D, F]."""
    experts = made.layer.experts
    return tuple(w.detach().transpose(1, 2).contiguous() for w in (experts.w_gate, experts.w1, experts.w2))


def transformers(made: Made) -> dict[str, Callable[[], Tensor]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    c = made.case
    if c.activation != "swiglu":
        return {}
    config = MixtralConfig(hidden_size=c.hidden, intermediate_size=c.inner, num_local_experts=c.experts, num_experts_per_tok=c.k)
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    gate, value, back = _joined(made)
    block.gate.weight = torch.nn.Parameter(made.layer.gate.weight.detach().to(c.torch_dtype))
    block.experts.gate_up_proj = torch.nn.Parameter(torch.cat([gate, value], dim=1))
    block.experts.down_proj = torch.nn.Parameter(back)
    # batched_mm copies the weights once per routed token: 50 GB here
    implementations = ("grouped_mm", "eager") if c.experts <= MOST_EAGER else ("grouped_mm",)

    def turn(implementation: str) -> Tensor:
        config._experts_implementation = implementation
        return made.turn(_Batched(block))

    return {f"transformers {i}": (lambda i=i: turn(i)) for i in implementations}


def torchtitan(made: Made) -> dict[str, Callable[[], Tensor]]:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    c = made.case
    if c.activation != "swiglu" or c.dtype != "bf16":  # it computes in bf16 whatever the weights are
        return {}
    experts = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=c.hidden, hidden_dim=c.inner, num_experts=c.experts),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=c.experts, top_k=c.k),
    )
    router = TokenChoiceTopKRouter.Config(
        num_experts=c.experts,
        gate=Linear.Config(in_features=c.hidden, out_features=c.experts),
        top_k=c.k,
        score_func="softmax",
        route_norm=True,
    )
    moe = MoE.Config(num_experts=c.experts, routed_experts=experts, router=router, load_balance_coeff=None).build().to(c.torch_dtype)
    moe.tokens_per_expert_E = torch.zeros(c.experts)
    inner, (gate, value, back) = moe.routed_experts.inner_experts, _joined(made)
    with torch.no_grad():
        for theirs, ours in (
            (inner.w1_EFD, gate),
            (inner.w3_EFD, value),
            (inner.w2_EDF, back),
            (moe.router.gate.weight, made.layer.gate.weight),
        ):
            theirs.copy_(ours)
    return {"torchtitan": lambda: made.turn(_Batched(moe))}


def deepspeed(made: Made) -> dict[str, Callable[[], Tensor]]:
    c = made.case
    if c.activation != "gelu" or c.experts > MOST_EAGER:
        return {}
    from deepspeed.moe.layer import MoE

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = torch.nn.Linear(c.hidden, c.inner, bias=False), torch.nn.Linear(c.inner, c.hidden, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.gelu(self.w1(x)))

    _one_rank_of_deepspeed()
    moe = MoE(c.hidden, MLP().to(c.torch_dtype), c.experts, k=c.k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False)
    moe.set_deepspeed_parallelism()
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(made.layer.gate.weight)
        for e, mlp in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            mlp.w1.weight.copy_(made.layer.experts.w1[e].t())
            mlp.w2.weight.copy_(made.layer.experts.w2[e].t())
    return {"deepspeed": lambda: made.turn(_First(moe))}


def megatron_core(made: Made) -> dict[str, Callable[[], Tensor]]:
    """It asks torch.cuda for the device to which its router's weight goes, and for Transformer Engine's product, whether that is there or not."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer as TheirMoELayer
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    c = made.case
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, num_attention_heads=1, hidden_size=c.hidden, ffn_hidden_size=c.inner, moe_ffn_hidden_size=c.inner,
        num_moe_experts=c.experts, moe_router_topk=c.k, moe_router_pre_softmax=c.k == 1, moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", add_bias_linear=False,
        gated_linear_unit=c.activation == "swiglu", activation_func=F.silu if c.activation == "swiglu" else F.gelu,
        bias_activation_fusion=False, params_dtype=c.torch_dtype, bf16=c.dtype == "bf16", use_cpu_initialization=True,
        perform_initialization=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = TheirMoELayer(config, MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=linears)), layer_number=1)
    ours = made.layer.experts
    with torch.no_grad():
        layer.router.weight.copy_(made.layer.gate.weight)
        for e, mlp in enumerate(layer.experts.local_experts):
            inwards = [ours.w1[e]] if c.activation == "gelu" else [ours.w_gate[e], ours.w1[e]]
            mlp.linear_fc1.weight.copy_(torch.cat(inwards, dim=1).t())
            mlp.linear_fc2.weight.copy_(ours.w2[e].t())

    def turn() -> Tensor:
        no_gpu = mock.patch("torch.cuda.current_device", return_value=torch.device("cpu"))
        with no_gpu, mock.patch.object(moe_utils, "te_general_gemm", None, create=True):
            return made.turn(_First(_Sequence(layer)))

    return {"megatron-core": turn}


def _one_rank_of_deepspeed() -> None:
    import os

    import deepspeed

    if not deepspeed.comm.is_initialized():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


class _Batched(torch.nn.Module):
    """Peers want [batch, sequence, hidden]."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD[None])[0]


class _Sequence(torch.nn.Module):
    """megatron-core wants [sequence, batch, hidden]."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD[:, None])


class _First(torch.nn.Module):
    """deepspeed gives its balance loss and counts too, megatron-core a bias."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD)[0]
