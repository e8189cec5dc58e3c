"""Plain PyTorch definitions of every kernel: what is right, in any dtype, float64 included. They read the offsets on the host."""
# R rows, D input width, F output (or inner) width, E experts; T tokens, V padded vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.kernels.activation import activate


def grouped_mm(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows grouped by expert times their expert's matrix -> [R, F].

    offsets_E: int32, end of each expert's rows (running sum of rows per expert). Rows behind the last one are spare: they are
    not read, and come out as zero.
    """
    groups = _groups(x_RD, offsets_E)
    spare = x_RD.new_zeros(x_RD.shape[0] - sum(len(x) for x in groups), w_EDF.shape[2])
    return torch.cat([*(x @ w for x, w in zip(groups, w_EDF.unbind())), spare])


def grouped_outer(x_RD: Tensor, y_RF: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum over each expert's rows of x_r (outer) y_r -> [E, D, F]: the gradient of its matrix; zero for an expert without rows."""
    return torch.stack([x.t() @ y for x, y in zip(_groups(x_RD, offsets_E), _groups(y_RF, offsets_E))])


def _groups(x: Tensor, offsets_E: Tensor) -> list[Tensor]:
    ends = offsets_E.tolist()
    return [x[start:end] for start, end in zip([0, *ends], ends)]


def expert_of_row(rows: int, offsets_E: Tensor) -> Tensor:
    """[R]; a spare row counts to the last expert. (repeat_interleave refuses counts that do not add up to R.)"""
    row_R = torch.arange(rows, dtype=offsets_E.dtype, device=offsets_E.device)
    return torch.searchsorted(offsets_E, row_R, right=True).clamp_max(offsets_E.shape[0] - 1)


def weighted_activation(name: str, h_RF: Tensor, gate_RF: Tensor | None, row_weights_R: Tensor, offsets_E: Tensor,
                        b1_EF: Tensor | None = None, b_gate_EF: Tensor | None = None) -> Tensor:  # fmt: skip
    """row_weights[r] * act(h[r] + b1[e], gate[r] + b_gate[e]), e being the expert of row r."""
    if b1_EF is not None:
        expert_R = expert_of_row(h_RF.shape[0], offsets_E)
        h_RF = h_RF + b1_EF.index_select(0, expert_R)
        gate_RF = gate_RF if gate_RF is None else gate_RF + b_gate_EF.index_select(0, expert_R)
    return activate(name, h_RF, gate_RF) * row_weights_R[:, None].to(h_RF.dtype)


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, vocab_size: int) -> Tensor:
    """-log softmax(logits)[label] over the first `vocab_size` columns, [T], float32 or wider."""
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV[:, :vocab_size].to(wide), labels_T, reduction="none")
