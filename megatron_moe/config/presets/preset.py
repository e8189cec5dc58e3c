"""What a preset is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`ranks`: what the recipe was made for; its degrees of parallelism fit this number."""

    what: str
    ranks: int
    settings: dict[str, Any]


GPT2_VOCAB_SIZE = 50257  # of the published recipes; stands in where a vocabulary is not known
