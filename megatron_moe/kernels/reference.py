"""Plain PyTorch definitions of every kernel: what is right, in any dtype, float64 included."""
# R rows, D input width, F output width, E experts; T tokens, V padded vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows grouped by expert times their expert's matrix -> [R, F].

    offsets_E: int32, end of each expert's rows (running sum of rows per expert); offsets_E[-1] == R.
    An expert without rows takes part with zero rows, so that its gradient is zero and never None.
    """
    rows_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).tolist()
    # unbind, not w[e]: every index would make a gradient of the size of the whole stack
    return torch.cat([x @ w for x, w in zip(x_RD.split(rows_E), w_EDF.unbind())])


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(logits)[label] over the first `vocab_size` columns, [T], float32 or wider."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV[:, :vocab_size].to(wide), labels_T, reduction="none")
