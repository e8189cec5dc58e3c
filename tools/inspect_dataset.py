"""Say what is in a dataset: counts, lengths, the most frequent tokens, one document as text.

python tools/inspect_dataset.py --input corpus_text_document --tokenizer-model tokenizer.json
python tools/inspect_dataset.py --input corpus_text_document --tokenizer-model tokenizer.json --document 17
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

import numpy as np

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.tokenizers import Tokenizer, build_tokenizer

COUNTED_TOKENS = 1 << 24  # at a time


@dataclass(frozen=True)
class InspectConfig:
    """Inspecting a dataset."""

    input: str | None = flag(None, "prefix of the dataset (without .bin)", metavar="PREFIX")
    top: int = flag(10, "how many of the most frequent tokens to show", minimum=0)
    document: int | None = flag(None, "show this document, as text when a tokenizer is given", minimum=0)
    vocab_size: int | None = flag(None, "for NullTokenizer: the number of different ids", minimum=1)
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.input:
            yield "--input PREFIX is required"


def summary(dataset: IndexedDataset, top: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The figures of a dataset, ready for JSON."""
    sizes = dataset.sizes
    counts = token_counts(dataset)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[:top]
    return {
        "prefix": dataset.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
        "sequence_length": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())} if len(sizes) else None,
        "largest_token": max(counts, default=None),
        "different_tokens": len(counts),
        "top_tokens": [{"token": t, "count": counts[t], **({"text": tokenizer.decode([t])} if tokenizer else {})} for t in frequent],
        "made_by": dataset.meta or None,
    }


def token_counts(dataset: IndexedDataset) -> dict[int, int]:
    """How often each token occurs."""
    counts: dict[int, int] = {}
    for start in range(0, dataset.num_tokens, COUNTED_TOKENS):
        tokens = dataset.read(start, min(COUNTED_TOKENS, dataset.num_tokens - start))
        for token, count in zip(*(a.tolist() for a in np.unique(tokens, return_counts=True))):
            counts[token] = counts.get(token, 0) + count
    return counts


def document_of(dataset: IndexedDataset, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One document, all its sequences together. ValueError when there is no such document."""
    if number >= dataset.num_documents:
        raise ValueError(f"--document {number}: {dataset.prefix} has {dataset.num_documents} documents, counted from 0")
    first, last = dataset.document_indices[number : number + 2]
    start = dataset.start_of(first)
    tokens = dataset.read(start, dataset.start_of(last) - start).tolist()
    return {"document": number, "length": len(tokens), **({"text": tokenizer.decode(tokens)} if tokenizer else {"tokens": tokens})}


def print_plainly(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if name == "top_tokens":
            for entry in value:
                print(f"  {entry['count']:>12} x {entry['token']:>6} {entry.get('text', '')!r}")
        elif name == "text":
            print(value)
        else:
            print(f"{name.replace('_', ' ')}: {value}")


def main(argv: list[str] | None = None) -> int:
    config, tokenizer_config = parse_tool((InspectConfig, TokenizerConfig), "tools/inspect_dataset.py", argv)
    try:
        dataset = IndexedDataset(config.input)
        tokenizer = build_tokenizer(tokenizer_config, config.vocab_size) if tokenizer_config.kind else None
        if tokenizer and dataset.meta.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
            print(f"warning: {config.input} was made with another tokenizer ({dataset.meta.get('tokenizer_type')}): the text will be wrong",
                  file=sys.stderr)  # fmt: skip
        one = config.document
        figures = summary(dataset, config.top, tokenizer) if one is None else document_of(dataset, one, tokenizer)
    except (ValueError, OSError) as error:
        print(f"tools/inspect_dataset.py: {error}", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(figures))
    else:
        print_plainly(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
