"""tokens/s of a whole training step on one process, against transformers' Mixtral of the same size and the matmul peak

A step is forward, backward, clipping to norm 1 and AdamW, on one batch of 4 x 512 tokens: a Mixtral of 4 layers, 256 wide, 8
experts, top-2, 30 million parameters. Ours goes through the product's own train_step (FSDP2 on one rank, statistics of the
router, forced sums and all). Theirs is written as one would write it, in every configuration that runs on a CPU.

Both start from the same weights and have no auxiliary loss in their gradient. Before anything is timed, each system takes three
steps, and all losses have to agree: that shows that the work is the same. bf16 is --bf16 here and torch.autocast there; float32
weights, moments and router are common to both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, System, interleave, missing, paired_ratio, say, spread, timing_table
from benchmarks.product import Training, one_rank
from megatron_moe.data.batch import Batch
from megatron_moe.model.flops import flops_per_token
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
    configurations = CONFIGURATIONS[: 1 if options.quick else None]
    if report.skipped:
        configurations = []
    variants = {OURS: ""}
    if cannot := compiler_problems("cpu"):
        report.skipped[COMPILED] = cannot[0]
    elif not options.quick:
        variants[COMPILED] = "--compile"
    with one_rank(f"{size} {COMMON}") as (world, mesh):
        for dtype, flag in (("fp32", ""), ("bf16", "--bf16")):
            ours = {name: Training(f"{size} {COMMON} {flag} {more}", world, mesh) for name, more in variants.items()}
            measure(report, dtype, ours, configurations, options)
    return report


def measure(
    report: Report, dtype: str, variants: dict[str, Training], configurations: list[tuple[str, str, bool]], options: Options
) -> None:
    """One precision: build the systems, show that they agree, time them, add what came out to the report."""
    ours = variants[OURS]
    c, batch = ours.config, ours.next_batches()[0]
    steps: dict[str, Callable[[], Tensor]] = {n: lambda t=t: t.step([batch]).lm_loss for n, t in variants.items()}
    parameters = {n: sum(p.numel() for p in t.model.parameters()) for n, t in variants.items()}
    for attention, experts, compiled in configurations:
        name = f"transformers {attention} {experts}{' compiled' if compiled else ''}"
        model = their_model(ours, attention, experts)
        parameters[name] = sum(p.numel() for p in model.parameters())
        steps[name] = their_step(model, ours, batch, compiled, dtype)
    losses = {name: take_steps(name, step) for name, step in steps.items()}
    check_equal(losses, parameters, tolerance=1e-4 if dtype == "fp32" else 2e-2)

    peak = matmul_of(PEAK_WIDTH if not options.quick else 64, dtype)
    systems = [System(PEAK, peak), *(System(name, step) for name, step in steps.items())]
    samples = interleave(systems, options.rounds_or(7), warmups=0)
    report.samples[dtype] = samples

    tokens = batch.tokens.numel()
    flops = flops_per_token(c.model, c.moe, c.training.seq_length, ours.prepared.vocab_size) * tokens
    peak_flops = 2.0 * peak.width**3
    share = {n: spread(flops / a.cpu / (peak_flops / b.cpu) for a, b in zip(samples[n], samples[PEAK])).median for n in steps}
    theirs = [name for name in steps if name not in variants]
    figures: dict[str, Any] = {
        "parameters": parameters, "losses_of_the_first_steps": losses, "flops_per_step": flops, "tokens_per_step": tokens,
        "share_of_peak_by_cpu": share,
        "tokens_per_cpu_second": {n: tokens / spread(t.cpu for t in samples[n]).median for n in steps},
    }  # fmt: skip
    if theirs:
        best = min(theirs, key=lambda n: spread(t.cpu for t in samples[n]).median)
        figures |= {"fastest_peer": best, "speed_over_fastest_peer": {n: paired_ratio(samples, best, n)._asdict() for n in variants}}
    report.figures[dtype] = figures
    columns = {
        "tokens per cpu s": lambda n: f"{tokens / spread(t.cpu for t in samples[n]).median:.0f}" if n in steps else "",
        "of peak": lambda n: f"{share[n]:.0%}" if n in steps else "",
    }
    text = f"{dtype}: {parameters[OURS]:,} parameters, {tokens} tokens, {flops / 1e9:.1f} GFLOP per step\n"
    report.tables.append(text + timing_table(samples, OURS, columns) + "\n" + conclusion(figures))


def conclusion(figures: dict[str, Any]) -> str:
    if "fastest_peer" not in figures:
        return "no peer was measured"
    return "\n".join(
        f"{name} makes {ratio['median']:.2f}x the tokens per CPU second of the fastest peer, {figures['fastest_peer']} "
        f"(quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"
        for name, ratio in figures["speed_over_fastest_peer"].items()
    )


def take_steps(name: str, step: Callable[[], Tensor]) -> list[float]:
    """The losses of the first steps, which also are the warm-up (and the compilation)."""
    say(f"first steps: {name}")
    return [float(step()) for _ in range(CHECKED_STEPS)]


def check_equal(losses: dict[str, list[float]], parameters: dict[str, int], tolerance: float) -> None:
    """Equal sizes and equal losses over a few updates: the same model, the same batch, the same optimizer."""
    for name in losses:
        assert parameters[name] == parameters[OURS], f"{name} has {parameters[name]} parameters, {OURS} {parameters[OURS]}"
        for a, b in zip(losses[name], losses[OURS]):
            assert abs(a - b) < tolerance * abs(b), f"{name} and {OURS} do not do the same: losses {losses[name]} and {losses[OURS]}"


class matmul_of:  # noqa: N801 - used as a function that knows its size
    """The product of two square matrices."""

    def __init__(self, width: int, dtype: str):
        self.width = width
        self.a, self.b = torch.randn(2, width, width, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)

    def __call__(self) -> Tensor:
        return self.a @ self.b


# ---------------------------------------------------------------- transformers


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
    model.load_state_dict(dict(renamed({n: p.full_tensor().detach() for n, p in ours.model.named_parameters()}, m.num_layers)))
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


def their_step(model: nn.Module, ours: Training, batch: Batch, compiled: bool, dtype: str) -> Callable[[], Tensor]:
    """Forward, backward, clip and AdamW; torch's fused AdamW, with the groups and settings of ours."""
    o = ours.config.optimizer
    groups = weight_decay_groups(model, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_eps, fused=True)
    parameters = list(model.parameters())
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, o.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
