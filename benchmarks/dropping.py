"""what a capacity factor drops, by k and balance coefficient: the table of docs/tuning.md

Byte-level models of 4 layers (2 of them with 8 experts) learn the source code of Python's standard library for a few hundred steps
without dropping, one for each k and balance. Over the last quarter of the steps, the load of every expert in every micro-batch of 2048
tokens says what share of the assignments each capacity factor would have dropped, by the layer's own formula of the capacity. Losses
are those of held-out text, in nats per byte.
"""
# E experts

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Options, Report, say, table
from benchmarks.preprocess import tool
from benchmarks.product import Training, one_rank
from megatron_moe.data.indexed_dataset import IndexedDatasetWriter
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.routing import expert_capacity

PEERS: dict[str, str] = {}

STEPS, EVALUATED = 300, 8
FACTORS = (0.5, 1.0, 1.25, 1.5, 2.0, 4.0)
COMMON = (
    "--num-layers 4 --hidden-size 96 --num-attention-heads 4 --ffn-hidden-size 192 --seq-length 128 --max-position-embeddings 128 "
    "--vocab-size 256 --tokenizer-type NullTokenizer --position-embedding-type rope --normalization RMSNorm --disable-bias-linear --swiglu "
    "--hidden-dropout 0 --attention-dropout 0 --micro-batch-size 16 --global-batch-size 16 --num-workers 0 --lr 4e-3 --min-lr 4e-4 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.03 --adam-beta2 0.95 --split 95,5,0 --num-experts 8 --disable-moe-token-dropping "
    "--disable-moe-top2-2nd-expert-sampling"
)
BALANCES = {
    "none": "--moe-loss-coeff 0",
    "0.001": "--moe-loss-coeff 0.001",
    "0.01": "--moe-loss-coeff 0.01",
    "0.1": "--moe-loss-coeff 0.1",
    "expert bias": "--moe-loss-coeff 0 --moe-router-enable-expert-bias",
}


def run(options: Options) -> Report:
    steps, ks = (4, (1,)) if options.quick else (STEPS, (1, 2))
    report = Report("dropping", {"steps": steps, "flags": COMMON, "balances": BALANCES, "factors": FACTORS})
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder))
        flags = f"{COMMON} --data-path {prefix} --train-iters {steps}"
        with one_rank(flags) as (world, mesh):
            for k in ks:
                for balance, own in BALANCES.items():
                    training = Training(f"{flags} --topk {k} {own}", world, mesh)
                    loads = [loads_of(training) for _ in range(steps)][-max(steps // 4, 1) :]
                    found[f"k {k}, {balance}"] = measured(loads, k) | {"loss": training.evaluate(EVALUATED)}
                    say(f"k {k}, {balance}: {found[f'k {k}, {balance}']}")
    report.figures = found
    report.tables.append("share of the assignments that a capacity factor drops\n" + table(
        ["k, balance", *map(str, FACTORS), "max/mean load", "loss"],
        [[name, *(f"{f['dropped'][str(c)]:.1%}" for c in FACTORS), f"{f['load_max_over_mean']:.2f}", f"{f['loss']:.3f}"] for name, f in found.items()],
    ))  # fmt: skip
    return report


def write_corpus(folder: Path) -> Path:
    """The standard library as bytes, one document per file."""
    corpus, prefix = folder / "corpus.jsonl", folder / "bytes"
    tool("make_jsonl.py", "--output", str(corpus))
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for line in corpus.read_text(encoding="utf-8").splitlines():
            writer.add_document(np.frombuffer(json.loads(line)["text"].encode(), np.uint8))
    return prefix


def loads_of(training: Training) -> list[Tensor]:
    """One step: assignments per expert, layer by layer. A step is one micro-batch here."""
    training.step()
    return [moe.stats.counts_E.clone() for moe in moe_layers(training.model)]


def measured(loads: list[list[Tensor]], k: int) -> dict:
    """Shares of the assignments over capacity, and the heaviest load over the mean, averaged over steps and layers."""
    counts_NE = torch.stack([counts for step in loads for counts in step])
    assignments, experts = float(counts_NE[0].sum()), counts_NE.shape[1]
    over = lambda factor: (counts_NE - expert_capacity(round(assignments / k), experts, factor, k, 0)).clamp_min(0)  # noqa: E731
    return {
        "dropped": {str(factor): float(over(factor).sum() / counts_NE.sum()) for factor in FACTORS},
        "load_max_over_mean": float((counts_NE.amax(1) / counts_NE.mean(1)).mean()),
    }
