"""tokens/s of a whole training step on one process, against transformers' Mixtral of the same size and the matmul peak

A step is forward, backward, clipping to norm 1 and AdamW, on one batch of 4 x 512 tokens: a Mixtral of 4 layers, 256 wide, 8
experts, top-2, 30 million parameters. Ours goes through the product's own train_step (FSDP2 on one rank, statistics of the
router, forced sums and all). Theirs is written as one would write it, in every configuration that runs on a CPU.

Each system is a process of its own. All start from the same weights and have no auxiliary loss in their gradient. Before anything is timed, each system takes
three steps, and all losses have to agree: that shows that the work is the same. bf16 is --bf16 here and torch.autocast there; float32
weights, moments and router are common to both.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.harness import Apart, Build, Options, Report, interleave, missing, paired_ratio, say, spread, timing_table
from benchmarks.product import Training, one_rank, prepared
from megatron_moe.config.run import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.optimizer.groups import weight_decay_groups
from megatron_moe.parallel.compile import compiler_problems

PEERS = {"transformers": "MixtralForCausalLM; attention sdpa or eager, experts eager or grouped_mm, compiled or not"}

FULL = "--num-layers 4 --hidden-size 256 --ffn-hidden-size 1024 --num-experts 8 --vocab-size 8192 --seq-length 512 --micro-batch-size 4"
QUICK = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-experts 4 --vocab-size 128 --seq-length 32 --micro-batch-size 2"
COMMON = (
    "--num-attention-heads 8 --num-key-value-heads 4 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --expert-interval 1 --topk 2 "
    "--disable-moe-token-dropping --disable-moe-top2-2nd-expert-sampling --moe-loss-coeff 0 --mock-data --num-workers 0 "
    "--train-iters 1000000 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0"
)
OURS, COMPILED, PEAK = "megatron_moe", "megatron_moe compiled", "matmul peak"
PEAK_WIDTH = 3072
CHECKED_STEPS = 3
# (attention, experts, compiled)
CONFIGURATIONS = list(itertools.product(("sdpa", "eager"), ("grouped_mm", "eager"), (False, True)))


def run(options: Options) -> Report:
    size = QUICK if options.quick else FULL
    report = Report("step", {"flags": f"{size} {COMMON}", "threads": torch.get_num_threads()}, missing(PEERS))
    builds = {OURS: partial(our_system, ""), COMPILED: partial(our_system, "--compile")}
    if options.quick:
        del builds[COMPILED]
    elif cannot := compiler_problems("cpu"):
        report.skipped[COMPILED] = cannot[0]
        del builds[COMPILED]
    if not report.skipped.keys() & PEERS.keys():
        for attention, experts, compiled in CONFIGURATIONS[: 1 if options.quick else None]:
            builds[f"transformers {attention} {experts}{' compiled' if compiled else ''}"] = partial(
                their_system, attention, experts, compiled
            )
    for dtype, flag in (("fp32", ""), ("bf16", "--bf16")):
        measure(report, dtype, {name: partial(build, f"{size} {COMMON} {flag}") for name, build in builds.items()}, options)
    return report


def measure(report: Report, dtype: str, builds: dict[str, Build], options: Options) -> None:
    """One precision: build the systems, show that they agree, time them, add what came out to the report."""
    c = prepared(report.parameters["flags"])
    systems = {name: Apart(name, build) for name, build in builds.items()}
    try:
        losses = {name: take_steps(system) for name, system in systems.items()}
        check_equal(losses, tolerance=1e-4 if dtype == "fp32" else 2e-2)
        peak = Apart(PEAK, partial(matmul_of, PEAK_WIDTH if not options.quick else 64, dtype))
        try:
            samples = interleave([peak, *systems.values()], options.rounds_or(9), warmups=0)
        finally:
            peak.close()
    finally:
        for system in systems.values():
            system.close()
    report.samples[dtype] = samples

    m, tokens = c.run.model, c.run.training.micro_batch_size * c.run.training.seq_length
    flops = flops_per_token(m, c.run.moe, c.run.training.seq_length, c.vocab_size) * tokens
    size = parameter_counts(m, c.run.moe, c.vocab_size).total
    peak_flops = 2.0 * (PEAK_WIDTH if not options.quick else 64) ** 3
    share = {n: spread(flops / a.cpu / (peak_flops / b.cpu) for a, b in zip(samples[n], samples[PEAK])).median for n in systems}
    ours = [name for name in (OURS, COMPILED) if name in systems]
    theirs = [name for name in systems if name not in ours]
    figures: dict[str, Any] = {
        "parameters": size, "losses_of_the_first_steps": losses, "flops_per_step": flops, "tokens_per_step": tokens,
        "share_of_peak_by_cpu": share,
        "tokens_per_cpu_second": {n: tokens / spread(t.cpu for t in samples[n]).median for n in systems},
    }  # fmt: skip
    if theirs:
        best = min(theirs, key=lambda n: spread(t.cpu for t in samples[n]).median)
        figures |= {"fastest_peer": best, "speed_over_fastest_peer": {n: paired_ratio(samples, best, n)._asdict() for n in ours}}
    report.figures[dtype] = figures
    columns = {
        "tokens per cpu s": lambda n: f"{tokens / spread(t.cpu for t in samples[n]).median:.0f}" if n in systems else "",
        "of peak": lambda n: f"{share[n]:.0%}" if n in systems else "",
    }
    text = f"{dtype}: {size:,} parameters, {tokens} tokens, {flops / 1e9:.1f} GFLOP per step\n"
    report.tables.append(text + timing_table(samples, OURS, columns) + "\n" + conclusion(figures))


def conclusion(figures: dict[str, Any]) -> str:
    if "fastest_peer" not in figures:
        return "no peer was measured"
    return "\n".join(
        f"{name} makes {ratio['median']:.2f}x the tokens per CPU second of the fastest peer, {figures['fastest_peer']} "
        f"(quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"
        for name, ratio in figures["speed_over_fastest_peer"].items()
    )


def take_steps(system: Apart) -> list[float]:
    """The losses of the first steps, which also are the warm-up (and the compilation)."""
    say(f"first steps: {system.name}")
    return [system.run() for _ in range(CHECKED_STEPS)]


def check_equal(losses: dict[str, list[float]], tolerance: float) -> None:
    """Equal losses over a few updates from the same weights: the same model, the same batch, the same optimizer."""
    for name in losses:
        for a, b in zip(losses[name], losses[OURS]):
            assert abs(a - b) < tolerance * abs(b), f"{name} and {OURS} do not do the same: losses {losses[name]} and {losses[OURS]}"


@contextlib.contextmanager
def matmul_of(width: int, dtype: str) -> Iterator[Callable[[], float]]:
    """The product of two square matrices."""
    a, b = torch.randn(2, width, width, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    yield lambda: float((a @ b)[0, 0])


@contextlib.contextmanager
def our_system(more: str, flags: str) -> Iterator[Callable[[], float]]:
    with one_rank(flags) as (world, mesh):
        training = Training(f"{flags} {more}", world, mesh)
        batches = training.next_batches()
        yield lambda: float(training.step(batches).lm_loss)


# ---------------------------------------------------------------- transformers


@contextlib.contextmanager
def their_system(attention: str, experts: str, compiled: bool, flags: str) -> Iterator[Callable[[], float]]:
    """With the weights, the batch and the settings of ours, of which nothing is kept."""
    with one_rank(flags) as (world, mesh):
        ours = Training(flags, world, mesh)
        model, config, (batch,) = their_model(ours, attention, experts), ours.config, ours.next_batches()
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, ours.model)]
        assert sizes[0] == sizes[1], f"transformers has {sizes[0]} parameters, {OURS} {sizes[1]}"
        del ours
        yield their_step(model, config, batch, compiled)


def their_model(ours: Training, attention: str, experts: str) -> nn.Module:
    """Mixtral with our weights."""
    import transformers

    m = ours.config.model
    config = transformers.MixtralConfig(
        vocab_size=ours.prepared.vocab_size, hidden_size=m.hidden_size, intermediate_size=m.ffn_size, num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads, num_key_value_heads=m.key_value_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_position_embeddings, rms_norm_eps=m.layernorm_epsilon, attention_dropout=0.0,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": m.rotary_base}, bos_token_id=None,
        eos_token_id=None, num_local_experts=ours.config.moe.num_experts[0], num_experts_per_tok=ours.config.moe.topk, use_cache=False,
        attn_implementation=attention, experts_implementation=experts,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in ours.model.named_parameters()}
    model.load_state_dict(dict(renamed(whole, m.num_layers)))
    return model.train()


def renamed(p: dict[str, Tensor], num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by name -> theirs; their expert stacks are transposed, with gate and value in one."""
    yield "model.embed_tokens.weight", p["embedding.weight"].clone()
    yield "model.norm.weight", p["norm.weight"].clone()
    yield "lm_head.weight", p["head.weight"].clone()
    for i in range(num_layers):
        a, b = f"layers.{i + 1}.", f"model.layers.{i}."
        yield b + "input_layernorm.weight", p[a + "attn_norm.weight"].clone()
        yield b + "post_attention_layernorm.weight", p[a + "mlp_norm.weight"].clone()
        for x, y in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            yield f"{b}self_attn.{y}.weight", p[f"{a}attn.{x}.weight"].clone()
        yield b + "mlp.gate.weight", p[a + "moe.gate.weight"].clone()
        e = a + "moe.experts."
        yield b + "mlp.experts.gate_up_proj", torch.cat([p[e + "w_gate"], p[e + "w1"]], dim=2).transpose(1, 2).contiguous()
        yield b + "mlp.experts.down_proj", p[e + "w2"].transpose(1, 2).contiguous()


def their_step(model: nn.Module, config: RunConfig, batch: Batch, compiled: bool) -> Callable[[], float]:
    """Forward, backward, clip and AdamW; torch's fused AdamW, with the groups and settings of ours."""
    o = config.optimizer
    groups = weight_decay_groups(model, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=True)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.training.bf16):
            loss = forward(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, o.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
