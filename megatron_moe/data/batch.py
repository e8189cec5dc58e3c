from typing import NamedTuple
from torch import Tensor


class Batch(NamedTuple):
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None
    sample_ids: Tensor
