"""the tutorial's classifier on real digits: does it learn as much with experts as without?

examples/image_classifier.py, through our DeepSpeed-shaped engine, on the 1797 handwritten digits that scikit-learn ships: dense, and with
8 experts in place of its last hidden layer: one of them per image, two, one beside a dense MLP, and one with a capacity of its even share, as
DeepSpeed's example has it. Same epochs, same batches, several seeds, one process. Accuracies are those on the 359 digits that no training
sees, after the last epoch.
"""

from __future__ import annotations

from benchmarks.harness import Options, Report, say, table
from examples import image_classifier

PEERS: dict[str, str] = {}

EPOCHS, SEEDS = 20, 3
DENSE = "dense"
MODELS = {
    DENSE: "",
    "8 experts": "--moe --num-experts 8",
    "8 experts, top 2": "--moe --num-experts 8 --top-k 2",
    "8 experts, residual": "--moe --num-experts 8 --mlp-type residual",
    "8 experts, capacity 1.0": "--moe --num-experts 8 --min-capacity 0",
}
MARGIN = 1.0  # points that experts may lie below


def run(options: Options) -> Report:
    epochs, seeds = (1, 1) if options.quick else (EPOCHS, options.rounds or SEEDS)
    report = Report("digits", {"epochs": epochs, "seeds": seeds, "models": MODELS})
    found = {name: [accuracy(f"{flags} --epochs {epochs} --seed {seed}") for seed in range(seeds)] for name, flags in MODELS.items()}
    means = {name: sum(values) / len(values) for name, values in found.items()}
    report.figures = {name: {"accuracies": found[name], "mean": means[name], "over dense": means[name] - means[DENSE]} for name in MODELS}
    rows = []
    for name, mean in means.items():
        over = mean - means[DENSE]
        rows.append([name, f"{mean:.2f}", " ".join(f"{a:.2f}" for a in found[name]), f"{over:+.2f}", "yes" if over > -MARGIN else "no"])
    report.tables.append(table(["model", "mean, % of the test images", "by seed", "points over dense", f"within {MARGIN:g} point"], rows))
    return report


def accuracy(flags: str) -> float:
    """In percent."""
    share = 100 * image_classifier.train(image_classifier.parse(flags.split()))
    say(f"{flags}: {share:.2f} %")
    return share
