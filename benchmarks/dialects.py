"""Experts as a model, not as code: a corpus of 8 dialects that a dense model of equal active size cannot hold.

A dialect is a random permutation of 512 words, which says what follows each word; one word in ten is drawn at random instead.
A document names its dialect by its first token. So there are 8 x 512 facts to know, and a token needs those of one dialect only.

Every model takes the same steps on the same data through the product's own flags and `train_step`, and has two layers. `dense`
has the active size of `experts`, which add 8 experts and a learned router to it. `random routing` has those experts too, and sends
tokens to them by chance. `pyramid` (2 then 14 experts) is held against `experts` (8 then 8: as many parameters), `residual` (a dense
MLP beside the experts) against `experts` and, since it computes two MLPs per token, against `dense, twice as wide`, and both together
(PR-MoE) against either. Two models drop what exceeds a capacity of half the mean load: random token selection against position.
Losses are those of held-out documents in nats, less the entropy that the corpus itself has: 0 is perfect.
"""
# B sequences, S tokens each, T tokens, E experts, D dialects

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Options, Report, say, spread, table
from benchmarks.product import Training, one_rank
from megatron_moe.data.indexed_dataset import IndexedDatasetWriter
from megatron_moe.moe.layer import MoELayer, moe_layers

PEERS: dict[str, str] = {}

DIALECTS, WORDS, LENGTH, NOISE = 8, 512, 64, 0.1
STEPS, SEEDS, DOCUMENTS = 400, 3, 16000
EVALUATED = 8  # micro-batches
COMMON = (
    f"--num-layers 2 --expert-interval 1 --hidden-size 48 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH} "
    f"--vocab-size {WORDS + DIALECTS} --make-vocab-size-divisible-by 8 --position-embedding-type rope --normalization RMSNorm "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --micro-batch-size 32 --global-batch-size 32 --num-workers 0 "
    "--lr 6e-3 --min-lr 6e-4 --lr-decay-style cosine --lr-warmup-fraction 0.03 --weight-decay 0.01 --adam-beta2 0.95 --split 95,5,0 "
    "--tokenizer-type NullTokenizer --disable-moe-token-dropping --moe-loss-coeff 0.01"
)
DENSE, EXPERTS, RANDOM, PYRAMID, RESIDUAL, WIDE = "dense", "experts", "random routing", "pyramid", "residual", "dense, twice as wide"
BOTH, RTS, POSITION = "pyramid and residual", "dropping at random", "dropping by position"
HALF = "--num-experts 8 --ffn-hidden-size 96 --moe-token-dropping --moe-train-capacity-factor 0.5 --moe-eval-capacity-factor 8"
MODELS = {
    DENSE: "--num-experts 1 --ffn-hidden-size 96",
    EXPERTS: "--num-experts 8 --ffn-hidden-size 96",
    RANDOM: "--num-experts 8 --ffn-hidden-size 96",
    PYRAMID: "--num-experts 2 14 --ffn-hidden-size 96",
    RESIDUAL: "--num-experts 8 --mlp-type residual --ffn-hidden-size 96",
    BOTH: "--num-experts 2 14 --mlp-type residual --ffn-hidden-size 96",
    WIDE: "--num-experts 1 --ffn-hidden-size 192",
    RTS: HALF,
    POSITION: f"{HALF} --no-moe-rts",
}
# (a, b, what is said of b - a)
COMPARISONS = [
    (EXPERTS, DENSE, "learned experts against the dense model of equal active size"),
    (RANDOM, DENSE, "random routing against the dense model"),
    (PYRAMID, EXPERTS, "pyramid against as many experts in equal parts"),
    (RESIDUAL, EXPERTS, "residual branch against none"),
    (RESIDUAL, WIDE, "residual against the dense model of equal active size"),
    (BOTH, PYRAMID, "pyramid and residual against pyramid alone"),
    (BOTH, RESIDUAL, "pyramid and residual against residual alone"),
    (RTS, POSITION, "dropping at random against dropping by position"),
]


def run(options: Options) -> Report:
    steps, seeds, documents = (3, 1, 1200) if options.quick else (STEPS, options.rounds or SEEDS, DOCUMENTS)
    report = Report("dialects", {"steps": steps, "seeds": seeds, "documents": documents, "flags": COMMON, "models": MODELS})
    excess: dict[str, list[float]] = {name: [] for name in MODELS}
    sizes: dict[str, int] = {}
    bits: dict[str, list[list[float]]] = {"dialect": [], "word": []}
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder) / "dialects", documents)
        flags = f"{COMMON} --data-path {prefix} --train-iters {steps}"
        with one_rank(f"{flags} {MODELS[EXPERTS]}") as (world, mesh):
            for seed in range(seeds):  # models take turns: a slow minute of the machine matters to none, a seed to all
                for name, own in MODELS.items():
                    training = Training(f"{flags} {own} --seed {seed + 1}", world, mesh)
                    with by_chance(seed) if name == RANDOM else contextlib.nullcontext():
                        for _ in range(steps):
                            training.step()
                        excess[name].append(training.evaluate(EVALUATED) - entropy())
                    sizes[name] = sum(p.numel() for p in training.model.parameters())
                    say(f"seed {seed + 1}: {name}: {excess[name][-1]:.3f} nats above the entropy")
                    if name == EXPERTS:
                        joint = joint_counts(training)
                        for what, layers in joint.items():
                            bits[what].append([mutual_information(counts) for counts in layers])
    conclude(report, excess, sizes, bits, joint["dialect"][-1])
    return report


# ---------------------------------------------------------------- the corpus


def write_corpus(prefix: Path, documents: int) -> Path:
    """Document i is of dialect i % 8, as long as a sample, so that every sample is one document."""
    generator = np.random.default_rng(0)
    follows = np.stack([generator.permutation(WORDS) for _ in range(DIALECTS)])
    dialect = np.arange(documents) % DIALECTS
    tokens = np.empty((documents, LENGTH), np.int64)
    tokens[:, 0] = WORDS + dialect
    tokens[:, 1] = generator.integers(0, WORDS, documents)
    for i in range(2, LENGTH):
        by_chance = generator.random(documents) < NOISE
        tokens[:, i] = np.where(by_chance, generator.integers(0, WORDS, documents), follows[dialect, tokens[:, i - 1]])
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in tokens:
            writer.add_document(document)
    return prefix


def entropy() -> float:
    """Nats per token of the corpus, for a reader who knows the dialects: the label of a document's last token is the name of
    the next one's dialect, that of its first token is any word."""
    right = 1 - NOISE + NOISE / WORDS
    word = -right * math.log(right) - NOISE * (1 - 1 / WORDS) * math.log(NOISE / WORDS)
    return (math.log(WORDS) + (LENGTH - 2) * word + math.log(DIALECTS)) / LENGTH


# ---------------------------------------------------------------- routing, seen and replaced


@contextlib.contextmanager
def by_chance(seed: int) -> Iterator[None]:
    """Every token goes to experts drawn at random; their gate weights are still learned."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(ranks_TE: Tensor, k: int) -> Tensor:
        return torch.rand(ranks_TE.shape, generator=generator).topk(k).indices

    with mock.patch("megatron_moe.moe.policies.topk.best", drawn):
        yield


def joint_counts(training: Training) -> dict[str, list[Tensor]]:
    """How often tokens of each dialect, and tokens that are each word, went to each expert, on held-out documents.

    Per MoE layer: "dialect" [D, E] and "word" [WORDS + D, E].
    """
    layers = moe_layers(training.model)
    kinds = {"dialect": DIALECTS, "word": WORDS + DIALECTS}
    counts = {what: [torch.zeros(n, moe.num_experts) for moe in layers] for what, n in kinds.items()}
    of_token: dict[str, Tensor] = {}  # of the batch under way, [T]

    def watching(moe: MoELayer, number: int):
        route = moe.route

        def watched(*args):
            routing, limits = route(*args)
            for what, tables in counts.items():
                cell_T = of_token[what] * moe.num_experts + routing.ids_TK[:, 0]
                tables[number] += torch.bincount(cell_T, minlength=tables[number].numel()).view_as(tables[number])
            return routing, limits

        return watched

    forward = training.model.forward

    def remembered(tokens_BS: Tensor, *args):
        of_token["dialect"] = (tokens_BS[:, :1] - WORDS).expand_as(tokens_BS).flatten()
        of_token["word"] = tokens_BS.flatten()
        return forward(tokens_BS, *args)

    with contextlib.ExitStack() as stack:
        for number, moe in enumerate(layers):
            stack.enter_context(mock.patch.object(moe, "route", watching(moe, number)))
        stack.enter_context(mock.patch.object(training.model, "forward", remembered))
        training.evaluate(EVALUATED)
    return counts


def mutual_information(counts_NE: Tensor) -> float:
    """Bits that the expert of a token says about what the rows count; of 8 dialects, 3 when each has experts of its own, and 0
    when routing takes no notice of it."""
    p_NE = counts_NE.double() / counts_NE.sum()
    independent_NE = p_NE.sum(1, keepdim=True) * p_NE.sum(0, keepdim=True)
    return float(torch.special.xlogy(p_NE, p_NE / independent_NE.clamp_min(1e-30)).sum() / math.log(2))


# ---------------------------------------------------------------- what came out


def conclude(
    report: Report, excess: dict[str, list[float]], sizes: dict[str, int], bits: dict[str, list[list[float]]], counts_DE: Tensor
) -> None:
    rows = []
    for name, values in excess.items():
        rows.append([name, f"{sizes[name]:,}", f"{np.median(values):.3f}", f"{min(values):.3f}-{max(values):.3f}"])
    report.tables.append(
        f"nats above the entropy of the corpus ({entropy():.3f})\n" + table(["model", "parameters", "median", "seeds"], rows)
    )
    margins = {}
    for a, b, what in COMPARISONS:
        differences = [theirs - ours for ours, theirs in zip(excess[a], excess[b])]
        margins[what] = {"median": spread(differences).median, "seeds": differences}
    report.tables.append("gain in nats, seed by seed\n" + table(
        ["comparison", "median", "seeds"],
        [[what, f"{m['median']:+.3f}", f"{min(m['seeds']):+.3f} to {max(m['seeds']):+.3f}"] for what, m in margins.items()],
    ))  # fmt: skip
    shares_DE = counts_DE / counts_DE.sum(1, keepdim=True)
    report.tables.append(
        f"{EXPERTS}: what the expert of a token says, in bits of at most {math.log2(shares_DE.shape[1]):.0f}, median of the seeds\n"
        + table(["about the", "layer 1", "layer 2"], [[what, *(f"{np.median(b):.2f}" for b in zip(*of))] for what, of in bits.items()])
        + "\nshare of each dialect's tokens by expert, last layer, last seed\n"
        + table(
            ["dialect", *map(str, range(shares_DE.shape[1]))], [[str(d), *(f"{s:.0%}" for s in row)] for d, row in enumerate(shares_DE)]
        )
    )
    report.figures = {
        "entropy": entropy(), "nats_above_entropy": excess, "parameters": sizes, "gains": margins, "bits_by_layer": bits,
        "share_by_dialect_and_expert": shares_DE.tolist(),
    }  # fmt: skip
