"""a step of published models at 8 to 16,384 GPUs on paper: seconds and bytes by link, for four ways of rows between experts

Nothing is run, and nothing here was measured: seconds and bytes are those of tools/plan.py (megatron_moe/training/planning), whose
assumptions are printed above the table, each with where it comes from. How far off they were where a speed was published is printed too.

    flat                rows straight to their experts, EP within a node
    fused               the same, written by a kernel into the memory of the other GPUs
    flat over nodes     rows straight to their experts, EP over nodes
    hierarchical        a token once to each node, from there to its experts, EP over nodes

For each model, number of GPUs and way, the fastest layout that fits is shown, of those that `layouts` lists; the first two and the last
two have the same ones to choose from. The batch grows with the GPUs (weak scaling): as many sequences for each as the preset has. What is
sent is exposed but for FSDP's, which goes on during compute.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import published
from benchmarks.harness import Options, Report, table
from megatron_moe.arguments import parse_args
from megatron_moe.config.presets import GPT2_VOCAB_SIZE, PRESETS
from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import flops_per_token, parameter_counts
from megatron_moe.training.planning.exchange import Sent
from megatron_moe.training.planning.layout import Layout, divisors_up_to, of_run
from megatron_moe.training.planning.machines import MACHINES, SOURCES, Assumptions, Machine
from megatron_moe.training.planning.memory import Memory, memory
from megatron_moe.training.planning.time import StepTime, exchanges, step_time

PEERS: dict[str, str] = {}

ZOO = (
    "gpt-350m-moe-128", "gpt-1.3b-moe-128", "mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen3-30b-a3b", "qwen3-235b-a22b",
    "deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b-like",
)  # fmt: skip
GPUS = (8, 64, 512, 4096, 16384)
WAYS = {"flat": "alltoall", "fused": "fused", "flat over nodes": "alltoall", "hierarchical": "hierarchical"}
MACHINE = "h100-sxm"


@dataclass(frozen=True)
class Predicted:
    """A model on so many GPUs in its fastest layout."""

    layout: Layout
    batch: int
    memory: Memory
    time: StepTime
    sent: dict[str, Sent]


def run_of(preset: str) -> RunConfig:
    return parse_args(f"--preset {preset} --mock-data --train-iters 1".split()).run


def batch_of(preset: str, gpus: int) -> int:
    """Sequences of a step: as many for each GPU as at the size that the recipe was made for."""
    p = PRESETS[preset]
    return max(p.settings["global_batch_size"] // p.ranks, 1) * gpus


def layouts(run: RunConfig, gpus: int, way: str, per_node: int) -> Iterator[Layout]:
    """TP, SP and PP of the preset, or half or twice its PP; every EP that divides the experts and that the way is for; ZeRO 1 or 3."""
    given, experts = of_run(run, gpus), min(n for n in run.experts_of_blocks() if n > 1)
    for pp in sorted({max(given.pp // 2, 1), given.pp, given.pp * 2}):
        if gpus % (given.tp * pp):
            continue
        stage = gpus // pp
        for ep in divisors_up_to(experts, stage):
            is_wanted = ep > per_node and ep % per_node == 0 if way in ("flat over nodes", "hierarchical") else 1 < ep <= per_node
            if stage % ep or not is_wanted:
                continue
            for zero, recompute in itertools.product((1, 3), (None, "selective", "full")):
                yield dataclasses.replace(given, pp=pp, virtual=None, ep=ep, zero=zero, recompute=recompute, micro_batch=1)


def predict(preset: str, gpus: int, way: str, machine: Machine, assumed: Assumptions) -> Predicted | None:
    """The fastest that fits, and that the configuration allows."""
    run, batch, path = run_of(preset), batch_of(preset, gpus), WAYS[way]
    vocabulary, room = run.model.vocab_size or GPT2_VOCAB_SIZE, machine.memory_gb * 1e9 * (1 - assumed.memory_reserve)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, global_batch_size=batch))
    plain = Layout(gpus, micro_batch=1).applied(run)
    found = []
    for layout in layouts(run, gpus, way, machine.devices_per_node):
        need = memory(plain, layout, vocabulary, batch, assumed.load_skew)
        if need.total <= room:
            time = step_time(plain, layout, vocabulary, batch, machine, assumed, path)
            found.append((time.total, need.total, len(found), layout, need, time))
    for *_, layout, need, time in sorted(found, key=lambda entry: entry[:3]):
        if not layout.problems(run):
            return Predicted(layout, batch, need, time, exchanges(plain, layout, vocabulary, batch, machine, assumed, path))
    return None


def row_of(preset: str, gpus: int, way: str, p: Predicted, machine: Machine) -> dict[str, Any]:
    """Bytes and seconds. `sent`: of a rank in a step; ep: dispatch, combine and their gradients."""
    run = run_of(preset)
    m, vocabulary = run.model, run.model.vocab_size or GPT2_VOCAB_SIZE
    tokens = p.batch * run.training.seq_length / gpus / p.time.total
    useful = tokens * flops_per_token(m, run.moe, run.training.seq_length, vocabulary)
    seconds = dataclasses.asdict(p.time)
    exposed = sum(seconds[term] for term in ("tp", "ep", "cp", "dp", "p2p")) / p.time.total
    return {
        "model": preset, "gpus": gpus, "way": way, "layout": str(p.layout), "batch": p.batch, "bound_by": p.time.bound,
        "seconds": {term: short(value) for term, value in seconds.items()} | {"total": short(p.time.total)},
        "tokens_per_second_per_gpu": short(tokens),
        "model_flops_utilisation": short(useful / (machine.peak_tflops * 1e12)), "bytes_held": round(p.memory.total), "sent": {kind: {"node": round(s.near), "between": round(s.far)} for kind, s in p.sent.items()},
        "exposed": short(exposed),
    }  # fmt: skip


def short(value: float) -> float:
    """Predictions are not known to more digits."""
    return float(f"{value:.5g}")


def run(options: Options) -> Report:
    machine, assumed = MACHINES[MACHINE], Assumptions()
    zoo, sizes = (("gpt-350m-moe-128", "deepseek-v3"), (8, 64)) if options.quick else (ZOO, GPUS)
    report = Report("scale_model", {"machine": machine.name})
    rows, missing = [], []
    for preset, gpus, way in itertools.product(zoo, sizes, WAYS):
        found = predict(preset, gpus, way, machine, assumed)
        if found is None:
            missing.append(f"{preset} on {gpus} GPUs, {way}")
        else:
            rows.append(row_of(preset, gpus, way, found, machine))
    errors = [published.predict(row).error(row) for row in published.ROWS]
    report.figures = {
        "machine": dataclasses.asdict(machine), "assumptions": dataclasses.asdict(assumed), "sources": SOURCES,
        "errors_against_published_speeds": errors, "rows": rows, "without": missing,
    }  # fmt: skip
    report.tables = [assumptions(machine, assumed, errors), models(zoo), text_of(rows), without(missing)]
    return report


def assumptions(machine: Machine, assumed: Assumptions, errors: list[float]) -> str:
    lines = ["PREDICTED, not measured. What it rests on:", f"  {machine.name}: {machine.source}"]
    lines += [f"  {name} {value:g}: {SOURCES[name]}" for name, value in dataclasses.asdict(assumed).items()]
    lines += [
        "  routing: every choice of k experts as likely as any other, within the groups that a router allows",
        "  fused and flat use the same share of the line; the fused way saves copies and waits of the host, nothing else",
        f"  against published speeds (python -m benchmarks.published) the same formulae were {min(errors):+.0%} to {max(errors):+.0%} off",
    ]
    return "\n".join(lines)


def models(zoo: tuple[str, ...]) -> str:
    rows = []
    for preset in zoo:
        run = run_of(preset)
        counts = parameter_counts(run.model, run.moe, run.model.vocab_size or GPT2_VOCAB_SIZE)
        experts = sorted({n for n in run.experts_of_blocks() if n > 1})
        rows.append([preset, f"{counts.total / 1e9:.1f}", f"{counts.active / 1e9:.1f}", " ".join(map(str, experts)), str(run.moe.topk),
                     str(run.training.seq_length)])  # fmt: skip
    return table(["model", "billion parameters", "active", "experts", "k", "sequence"], rows)


def text_of(rows: list[dict[str, Any]]) -> str:
    """Gigabytes that a rank sends in a step: rows within the node and between nodes, FSDP's likewise, TP's and the pipeline's."""
    gb = lambda sent: f"{sent['node'] / 1e9:.2f}+{sent['between'] / 1e9:.2f}"  # noqa: E731
    lines = []
    for r in rows:
        s, sent = r["seconds"], r["sent"]
        lines.append([
            r["model"], str(r["gpus"]), r["way"], r["layout"].split(", micro-batch")[0], f"{s['total']:.3g}", f"{r['tokens_per_second_per_gpu']:.0f}",
            f"{r['model_flops_utilisation']:.0%}", f"{s['compute'] / s['total']:.0%}", f"{s['ep'] / s['total']:.0%}", f"{r['exposed']:.0%}", r["bound_by"],
            gb(sent["ep"]), gb(sent["dp"]), gb(sent["tp"]), gb(sent["p2p"]), f"{r['bytes_held'] / 1e9:.0f}",
        ])  # fmt: skip
    header = ["model", "GPUs", "rows go", "layout", "s/step", "tokens/s/GPU", "MFU", "compute", "rows", "all exposed", "bound by", "GB rows", "GB FSDP",
              "GB TP", "GB PP", "GB held"]  # fmt: skip
    return "GB of a rank in a step, within its node + between nodes\n" + table(header, lines)


def without(missing: list[str]) -> str:
    return "\n".join(["No layout that was tried fits, or there is none with such an EP:", *(f"  {one}" for one in missing)])
