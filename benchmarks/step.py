"""tokens/s of a whole training step on one process, against models of the same size in other libraries and the matmul peak

A step is forward, backward, clipping to norm 1 and AdamW, on one batch:

    mixtral  4 x 512 tokens, 4 layers, 256 wide, 8 experts of 1024 with SwiGLU, top-2, 30 million parameters
    nanogpt  12 x 64 tokens, 4 layers, 128 wide, dense: GPT-2's block at the size that nanoGPT suggests for a CPU

Ours goes through the product's own train_step (statistics of the router, forced sums and all). Theirs is written as one would write it
(benchmarks/step_peers.py), in every configuration that runs on a CPU.

Each system is a process of its own. All start from the same weights and have no auxiliary loss in their gradient. Before anything is timed, each system takes
three steps, and all losses have to agree: that shows that the work is the same. bf16 is --bf16 here and torch.autocast there; float32
weights, moments and router are common to both. torchtitan computes experts in bf16 always, and is not there in fp32.
Our runs on a CPU tell the allocator to keep what is freed; peers are measured as they come, and the compiled ones also "kept memory", with that setting.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks import harness
from benchmarks.harness import Apart, Build, Report, interleave, missing, paired_ratio, say, spread, timing_table
from benchmarks.product import Training, one_rank, prepared
from benchmarks.step_peers import their_system
from megatron_moe.config.flags import flag
from megatron_moe.kernels.matmul_cpu import matmul
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.parallel.compile import compiler_problems

PEERS = {
    "transformers": "Mixtral, attention sdpa or eager, experts eager or grouped_mm, compiled or not; GPT-2",
    "torchtitan": "its decoder as a Mixtral, compiled or not (bf16)",
}

COMMON = (
    "--hidden-dropout 0 --attention-dropout 0 --mock-data --num-workers 0 "
    "--train-iters 1000000 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0"
)
MIXTRAL = (
    "--num-attention-heads 8 --num-key-value-heads 4 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --expert-interval 1 --topk 2 --disable-moe-token-dropping "
    f"--disable-moe-top2-2nd-expert-sampling --moe-loss-coeff 0 {COMMON}"
)
DENSE = f"--num-attention-heads 4 --num-experts 1 {COMMON}"
FLAGS = {
    "mixtral": "--num-layers 4 --hidden-size 256 --ffn-hidden-size 1024 --num-experts 8 --vocab-size 8192 --seq-length 512 --micro-batch-size 4 "
    + MIXTRAL,
    "nanogpt": f"--num-layers 4 --hidden-size 128 --vocab-size 128 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 12 {DENSE}",
}
QUICK = {
    "mixtral": "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-experts 4 --vocab-size 128 --seq-length 32 --micro-batch-size 2 "
    + MIXTRAL,
    "nanogpt": f"--num-layers 2 --hidden-size 32 --vocab-size 128 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 {DENSE}",
}
OURS, COMPILED, PEAK = "megatron_moe", "megatron_moe compiled", "matmul peak"
PEAK_WIDTH = 3072
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Options(harness.Options):
    model: tuple[Literal["mixtral", "nanogpt"], ...] = flag(("mixtral", "nanogpt"), "cases: model")
    dtype: tuple[Literal["fp32", "bf16"], ...] = flag(("fp32", "bf16"), "cases: precision")
    peer: tuple[str, ...] = flag(
        (), "only peers whose name contains one of these, as: --peer 'sdpa grouped_mm' torchtitan; all when not given", metavar="TEXT"
    )


class Peer:
    """A configuration of another library: its name, and what benchmarks/step_peers.py needs to build it."""

    def __init__(self, library: str, model: str, *variant: str, compiled: bool, keeps_memory: bool = False):
        self.name = " ".join([library, *variant, *(["compiled"] if compiled else []), *(["kept memory"] if keeps_memory else [])])
        self.library, self.build = library, partial(their_system, f"{library} {model}", variant, compiled, keeps_memory)


# the compiled ones, which were the fastest, also with the allocator set as our runs set it
WAYS = ({"compiled": False}, {"compiled": True}, {"compiled": True, "keeps_memory": True})
MIXTRALS = [
    *(
        Peer("transformers", "mixtral", attention, experts, **way)
        for attention, experts, way in itertools.product(("sdpa", "eager"), ("grouped_mm", "eager"), WAYS)
    ),
    *(Peer("torchtitan", "mixtral", **way) for way in WAYS),
]
GPT2S = [Peer("transformers", "gpt2", attention, **way) for attention, way in itertools.product(("sdpa", "eager"), WAYS)]


def run(options: Options) -> Report:
    sizes = QUICK if options.quick else FLAGS
    report = Report("step", {"flags": {m: sizes[m] for m in options.model}, "threads": torch.get_num_threads()}, missing(PEERS))
    ours: dict[str, Build] = {OURS: partial(our_system, ""), COMPILED: partial(our_system, "--compile")}
    if options.quick:
        del ours[COMPILED]
    elif cannot := compiler_problems("cpu"):
        report.skipped[COMPILED] = cannot[0]
        del ours[COMPILED]
    for model, dtype in itertools.product(options.model, options.dtype):
        builds = ours | {p.name: p.build for p in chosen(model, dtype, options) if p.library not in report.skipped}
        flags = f"{sizes[model]} {'--bf16' if dtype == 'bf16' else ''}"
        measure(report, f"{model} {dtype}", flags, {name: partial(build, flags=flags) for name, build in builds.items()}, options)
    return report


def chosen(model: str, dtype: str, options: Options) -> list[Peer]:
    peers = [p for p in (MIXTRALS if model == "mixtral" else GPT2S) if dtype == "bf16" or p.library != "torchtitan"]
    if options.quick:
        return list({p.library: p for p in reversed(peers)}.values())
    return [p for p in peers if not options.peer or any(text in p.name for text in options.peer)]


def measure(report: Report, case: str, flags: str, builds: dict[str, Build], options: Options) -> None:
    """One model in one precision: build the systems, show that they agree, time them, add what came out to the report."""
    c, dtype = prepared(flags), case.split()[-1]
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
    report.samples[case] = samples

    m, tokens = c.run.model, c.run.training.micro_batch_size * c.run.training.seq_length
    flops = flops_per_token(m, c.run.moe, c.run.training.seq_length, c.vocab_size) * tokens
    size = parameter_counts(m, c.run.moe, c.vocab_size).total
    peak_flops = 2.0 * (PEAK_WIDTH if not options.quick else 64) ** 3
    share = {n: spread(flops / a.cpu / (peak_flops / b.cpu) for a, b in zip(samples[n], samples[PEAK])).median for n in systems}
    ours = [name for name in (OURS, COMPILED) if name in systems]
    figures: dict[str, Any] = {
        "parameters": size, "losses_of_the_first_steps": losses, "flops_per_step": flops, "tokens_per_step": tokens,
        "share_of_peak_by_cpu": share,
        "tokens_per_cpu_second": {n: tokens / spread(t.cpu for t in samples[n]).median for n in systems},
        "speed_over_fastest": {},
    }  # fmt: skip
    for library, keeps_memory in itertools.product(PEERS, (False, True)):
        if theirs := [n for n in systems if n.startswith(library) and n.endswith("kept memory") == keeps_memory]:
            best = min(theirs, key=lambda n: spread(t.cpu for t in samples[n]).median)
            least = {n: min(t.cpu for t in samples[best]) / min(t.cpu for t in samples[n]) for n in ours}
            figures["speed_over_fastest"][best] = {
                n: paired_ratio(samples, best, n)._asdict() | {"least_over_least": least[n]} for n in ours
            }
    report.figures[case] = figures
    columns = {
        "tokens per cpu s": lambda n: f"{tokens / spread(t.cpu for t in samples[n]).median:.0f}" if n in systems else "",
        "of peak": lambda n: f"{share[n]:.0%}" if n in systems else "",
    }
    text = f"{case}: {size:,} parameters, {tokens} tokens, {flops / 1e9:.1f} GFLOP per step\n"
    report.tables.append(text + timing_table(samples, OURS, columns) + "\n" + conclusion(figures))


def conclusion(figures: dict[str, Any]) -> str:
    if not figures["speed_over_fastest"]:
        return "no peer was measured"
    return "\n".join(
        f"{name} makes {ratio['median']:.2f}x the tokens per CPU second of {best} "
        f"(quartiles {ratio['low']:.2f}-{ratio['high']:.2f}, least over least {ratio['least_over_least']:.2f})"
        for best, ratios in figures["speed_over_fastest"].items()
        for name, ratio in ratios.items()
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
    """The product of two square matrices, by the faster of torch's two libraries."""
    a, b = torch.randn(2, width, width, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    yield lambda: float(matmul(a, b)[0, 0])


@contextlib.contextmanager
def our_system(more: str, flags: str) -> Iterator[Callable[[], float]]:
    with one_rank(flags) as (world, mesh):
        training = Training(f"{flags} {more}", world, mesh)
        batches = training.next_batches()
        yield lambda: float(training.step(batches).lm_loss)
