"""How the next token is drawn from the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling.

    Filters apply in the order temperature, top-k, top-p.
    """

    greedy: bool = flag(False, "always take the likeliest token")
    temperature: float = flag(1.0, "divides the logits: below 1 prefers likely tokens, above 1 flattens")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0: all", minimum=0)
    top_p: float = flag(
        1.0, "draw among the likeliest tokens that together reach this probability (nucleus, arXiv 1904.09751)", above=0, maximum=1
    )
    seed: int = flag(1234, "of the draws; the same seed, prompts and batches give the same text", minimum=0)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.temperature <= 0:
            yield f"--temperature must be greater than 0, not {self.temperature:g}; the limit of small temperatures is --greedy"
        if self.greedy and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            yield (f"--greedy takes the likeliest token whatever --temperature ({self.temperature:g}), --top-k ({self.top_k}) and "
                   f"--top-p ({self.top_p:g}) say; drop one or the other")  # fmt: skip
