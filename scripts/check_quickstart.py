"""Did the quickstart train? Reads its run directory, says what the losses mean, exits 1 when something is not as it should be.

python scripts/check_quickstart.py --run runs/quickstart

The yardstick is the entropy of single tokens in the corpus: a model that knows how often each token occurs, and nothing of
what stands before it, has that loss. After at least 100 steps the loss must lie below, and 3 nats under where it began.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.metrics.reader import read_records, valid_history

TRAINED = 100  # steps from which on a run is judged by its loss
FALL = 3.0  # nats


@dataclass(frozen=True)
class CheckConfig:
    """Check."""

    run: str = flag("runs/quickstart", "run directory of scripts/quickstart.sh", metavar="DIR")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not (Path(self.run) / "metrics.jsonl").is_file():
            yield f"--run {self.run}: there is no metrics.jsonl in it; run scripts/quickstart.sh first"


def unigram_entropy(prefix: str) -> float:
    """-sum p log p over the tokens of a dataset, in nats."""
    dataset = IndexedDataset(prefix)
    counts = np.bincount(dataset.read(0, dataset.num_tokens))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def findings(start: float, end: float, steps: int, entropy: float) -> list[str]:
    """What is wrong with these losses."""
    if steps < TRAINED:
        return [] if end < start else [f"the validation loss did not fall in {steps} steps"]
    wrong = []
    if start - end < FALL:
        wrong.append(f"the validation loss fell by {start - end:.2f} nats in {steps} steps, less than {FALL:g}")
    if end >= entropy:
        wrong.append(f"the validation loss ({end:.2f}) is not below the unigram entropy ({entropy:.2f})")
    return wrong


def main(argv: list[str] | None = None) -> int:
    run = Path(parse_tool(CheckConfig, "scripts/check_quickstart.py", argv).run)
    losses = {r["iteration"]: r["lm_loss"] for r in valid_history(read_records(run / "metrics.jsonl"))
              if r["event"] == "eval" and r["split"] == "valid"}  # fmt: skip
    if len(losses) < 2:
        print(f"{run}: {len(losses)} evaluation(s); the training did not end", file=sys.stderr)
        return 1
    try:
        entropy = unigram_entropy(str(run / "data" / "corpus_text_document"))
    except ValueError as error:
        print(f"scripts/check_quickstart.py: {error}", file=sys.stderr)
        return 1
    steps, (start, end) = max(losses), (losses[min(losses)], losses[max(losses)])
    print("validation loss: " + ", ".join(f"{losses[i]:.2f} at step {i}" for i in sorted(losses)) + " (nats per token)")
    print(f"it fell by {start - end:.2f}; token frequencies alone (unigram entropy) give {entropy:.2f}")
    wrong = findings(start, end, steps, entropy)
    wrong += [f"{run / name} is missing" for name in ("plot.png", "sample.txt") if not (run / name).is_file()]
    for problem in wrong:
        print(f"NOT AS IT SHOULD BE: {problem}")
    if not wrong:
        passed = "the model has learnt what follows what" if end < entropy else f"too few steps to judge (fewer than {TRAINED})"
        print(f"PASSED: {passed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
