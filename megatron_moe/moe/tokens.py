"""What a router may know of its tokens beside their hidden states, and what it must ask other ranks."""
# T tokens, E experts

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenInfo:
    """Everything is optional and goes with the tokens: whoever hands the layer a part of them slices this alike."""

    keys_T: Tensor | None = None  # int64 (utils.random.token_keys): the source of all noise; without them there is none
    ids_T: Tensor | None = None  # int64 token ids, for hash routing
    used_T: Tensor | None = None  # bool; False: padding, which goes to no expert
    most_tokens: int | None = None  # tokens of the rank that has most of them, where that is known without asking
    num_sequences: int = 1  # of the micro-batch, one behind the other
    sequence_length: int | None = None  # tokens of each, also where not all of them are here; None: one sequence is all there is
    places_T: Tensor | None = None  # int64: where each token stands in the micro-batch; None: all of its tokens are here, in order
    layer_key: Tensor | None = None  # int64 scalar, set by the layer: its number as data, so one compiled graph serves all layers

    def of(self, part: slice, most_tokens: int | None, like_TD: Tensor) -> TokenInfo:
        """Of a part of the tokens `like_TD`."""
        cut = {n: v[part] for n in ("keys_T", "ids_T", "used_T") if (v := getattr(self, n)) is not None}
        return replace(self, most_tokens=most_tokens, places_T=self.places(like_TD)[part], **cut)

    def sequence_of(self, like_T: Tensor) -> Tensor:
        """int64 [T]: the sequence that each token is of."""
        place_T = self.places(like_T)
        return torch.zeros_like(place_T) if self.sequence_length is None else place_T // self.sequence_length

    def places(self, like_T: Tensor) -> Tensor:
        """int64 [T]: where each token stands in the micro-batch."""
        return torch.arange(like_T.shape[0], device=like_T.device) if self.places_T is None else self.places_T


NO_INFO = TokenInfo()


class Reducer:
    """Sums of routing counts, and the longest of the local token counts, over ranks. This one is for one process: identity.

    A layer knows no mesh; who splits its tokens hands it a Reducer that adds the parts up (parallel/expert.py).
    """

    def over_microbatch(self, counts: Tensor) -> Tensor:
        """Over the ranks among which the tokens of one micro-batch are spread. No gradient."""
        return counts

    def over_batch(self, counts: Tensor) -> Tensor:
        """Over all ranks that hold tokens of the step. No gradient."""
        return counts

    def most_tokens(self, tokens: int) -> int:
        """Of the ranks that share the experts. The host waits for the answer."""
        return tokens
