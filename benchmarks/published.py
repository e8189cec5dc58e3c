"""Predicted against published training speeds, the table of docs/planning.md: python -m benchmarks.published

Nothing is run. Models are given by our flags, layouts as published where they are; what was not published is assumed, and marked. No
constant is chosen for a row: all of them have the defaults of tools/plan.py, but a load skew of 1, because the published runs had
balanced routing. TFLOP/s are published by the counts of their authors, and predicted by ours.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_moe.arguments import parse_args
from megatron_moe.model.flops import flops_per_token
from megatron_moe.training.planning.layout import Layout
from megatron_moe.training.planning.machines import MACHINES, Assumptions
from megatron_moe.training.planning.memory import memory
from megatron_moe.training.planning.time import step_time

COMMON = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights --hidden-dropout 0 "
    "--attention-dropout 0 --disable-moe-token-dropping --disable-moe-top2-2nd-expert-sampling --expert-interval 1 --bf16 "
    "--max-position-embeddings 4096 --seq-length 4096 "
)
NO_BIAS = "--disable-bias-linear "
MODELS = {
    "Mixtral 8x7B": NO_BIAS + "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --num-key-value-heads 8 --ffn-hidden-size 14336 "
    "--num-experts 8 --topk 2 --vocab-size 32000",
    "Mixtral 8x22B": NO_BIAS + "--num-layers 56 --hidden-size 6144 --num-attention-heads 48 --num-key-value-heads 8 --ffn-hidden-size 16384 "
    "--num-experts 8 --topk 2 --vocab-size 32768",
    "Qwen2-57B-A14B": NO_BIAS + "--num-layers 28 --hidden-size 3584 --num-attention-heads 28 --num-key-value-heads 4 --moe-ffn-hidden-size 2560 "
    "--num-experts 64 --topk 8 --moe-shared-expert-intermediate-size 20480 --moe-shared-expert-gate --vocab-size 151936",
    "Qwen3-30B-A3B": NO_BIAS + "--num-layers 48 --hidden-size 2048 --num-attention-heads 32 --num-key-value-heads 4 --kv-channels 128 "
    "--moe-ffn-hidden-size 768 --num-experts 128 --topk 8 --vocab-size 151936",
    "Qwen3-235B-A22B": NO_BIAS + "--num-layers 94 --hidden-size 4096 --num-attention-heads 64 --num-key-value-heads 4 --kv-channels 128 "
    "--moe-ffn-hidden-size 1536 --num-experts 128 --topk 8 --vocab-size 151936",
    # latent attention is not built: 128 heads of 128 with 8 for keys and values, 250 million parameters a layer in place of 187
    "DeepSeek-V3": NO_BIAS + "--num-layers 61 --hidden-size 7168 --num-attention-heads 128 --num-key-value-heads 8 --kv-channels 128 "
    "--ffn-hidden-size 18432 --moe-ffn-hidden-size 2048 --num-experts 1 1 1" + " 256" * 58 + " --topk 8 --moe-router-num-groups 8 "
    "--moe-router-group-topk 4 "
    "--moe-shared-expert-intermediate-size 2048 --moe-router-score-function sigmoid --vocab-size 129280",
    "GPT-OSS-120B": "--num-layers 36 --hidden-size 2880 --num-attention-heads 64 --num-key-value-heads 8 --kv-channels 64 "
    "--moe-ffn-hidden-size 2880 --num-experts 128 --topk 4 --vocab-size 201088",
}  # fmt: skip


class Row(NamedTuple):
    """`published`: tokens/s/GPU, or TFLOP/s where it is below 1000 (an MFU times 989). `assumed`: what of the layout is not published.
    `path`: how rows travel, where it is not straight to their experts."""

    model: str
    precision: str
    layout: Layout
    global_batch: int
    published: float
    assumed: str = ""
    path: str | None = None

    @property
    def is_tflops(self) -> bool:
        return self.published < 1000


def _virtual(model_layers: int, pp: int, chunks: int) -> int:
    return max(model_layers // pp // chunks, 1)


ROWS = [
    Row("Mixtral 8x7B", "bf16", Layout(64, pp=4, virtual=1, ep=8), 256, 468, "batch 256"),
    Row("Mixtral 8x22B", "bf16", Layout(128, tp=2, sp=True, pp=8, virtual=1, ep=8), 256, 488, "layout and batch"),
    Row("Qwen2-57B-A14B", "bf16", Layout(64, tp=2, sp=True, pp=4, virtual=1, ep=4), 256, 386, "layout and batch"),
    Row("GPT-OSS-120B", "bf16", Layout(64, pp=4, ep=8), 1280, 5993, "no virtual stages"),
    Row("Qwen3-30B-A3B", "FP8", Layout(16, pp=2, virtual=_virtual(48, 2, 12), ep=8), 1024, 5113),
    Row("Qwen3-30B-A3B", "FP8, tokens dropped", Layout(16, pp=2, virtual=_virtual(48, 2, 24), ep=8), 512, 10494),
    Row("Qwen3-235B-A22B", "FP8", Layout(256, tp=2, sp=True, pp=8, virtual=_virtual(94, 8, 4), ep=32), 8192, 1633, path="hierarchical"),
    Row("DeepSeek-V3", "FP8", Layout(1024, tp=2, sp=True, pp=8, virtual=_virtual(61, 8, 4), ep=64), 8192, 1297, path="hierarchical"),
]


class Predicted(NamedTuple):
    tokens_per_second: float
    tflops: float
    gigabytes: float
    terms: dict[str, float]  # shares of the step

    def error(self, row: Row) -> float:
        return (self.tflops if row.is_tflops else self.tokens_per_second) / row.published - 1


def predict(row: Row) -> Predicted:
    run = parse_args(f"{COMMON} {MODELS[row.model]} --mock-data --train-iters 1".split()).run
    assumed, vocabulary = dataclasses.replace(Assumptions(), load_skew=1.0), run.model.vocab_size
    time = step_time(run, row.layout, vocabulary, row.global_batch, MACHINES["h100-sxm"], assumed, row.path)
    need = memory(run, row.layout, vocabulary, row.global_batch, 1.0)
    tokens = row.global_batch * run.training.seq_length / time.total / row.layout.devices
    shares = {name: value / time.total for name, value in dataclasses.asdict(time).items() if name != "hidden"}
    return Predicted(tokens, tokens * flops_per_token(run.model, run.moe, 4096, vocabulary) / 1e12, need.total / 1e9, shares)


def table() -> str:
    """As it stands in docs/planning.md."""
    lines = ["| model | GPUs, layout | published | predicted | error | largest terms | GB |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        found = predict(row)
        unit = "TFLOP/s" if row.is_tflops else "tokens/s"
        value = found.tflops if row.is_tflops else found.tokens_per_second
        layout = (
            str(row.layout).split(", DP")[0] + (f" {row.path}" if row.path else "") + (f" (assumed: {row.assumed})" if row.assumed else "")
        )
        largest = sorted(found.terms.items(), key=lambda item: -item[1])[:3]
        terms = ", ".join(f"{name} {share:.0%}" for name, share in largest)
        lines.append(f"| {row.model} {row.precision} | {row.layout.devices}, {layout} | {row.published:.0f} {unit} | {value:.0f} | "
                     f"{found.error(row):+.0%} | {terms} | {found.gigabytes:.0f} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
