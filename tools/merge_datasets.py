"""Concatenate datasets of one tokenizer into one.

python tools/merge_datasets.py --input part-1_text_document part-2_text_document --output-prefix all_text_document
python tools/merge_datasets.py --input folder/ --output-prefix all_text_document      # every pair in it, by name
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

from tqdm import tqdm

from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.indexed_dataset import IndexedDataset, merge


@dataclass(frozen=True)
class MergeConfig:
    """Merging datasets."""

    input: tuple[str, ...] = flag((), "prefixes of datasets (without .bin), or folders of them; merged in this order", metavar="PREFIX")
    output_prefix: str | None = flag(None, "prefix of the result", metavar="PREFIX")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.input:
            yield "--input PREFIX ... is required"
        if not self.output_prefix:
            yield "--output-prefix PREFIX is required"


def expand_prefixes(words: tuple[str, ...]) -> list[str]:
    """Prefixes as given; a folder stands for all its datasets in the order of their names. ValueError for an empty folder."""
    prefixes = []
    for word in words:
        found = [word]
        if os.path.isdir(word):
            found = sorted(os.path.join(word, name.removesuffix(".idx")) for name in os.listdir(word) if name.endswith(".idx"))
        if not found:
            raise ValueError(f"--input {word} has no .idx file in it; name a folder of datasets, or prefixes")
        prefixes += found
    return prefixes


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(MergeConfig, "tools/merge_datasets.py", argv)
    try:
        prefixes = expand_prefixes(config.input)
        total = sum(os.path.getsize(p + ".bin") for p in prefixes if os.path.exists(p + ".bin"))
        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            merge(prefixes, config.output_prefix, bar.update)
    except (ValueError, OSError) as error:
        print(f"tools/merge_datasets.py: {error}", file=sys.stderr)
        return 2
    result = IndexedDataset(config.output_prefix)
    print(f"{config.output_prefix}: {len(prefixes)} datasets, {result.num_documents} documents, {result.num_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
