"""Adding up rows that belong to the same token: one public function, which picks the implementation."""
# R rows, D hidden, T tokens, N rows of each token

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels.blocks import row_blocks


def rows_by_number(slot_R: Tensor, N: int) -> Tensor | None:
    """[R / N, N]: where the rows of each number lie, ascending, when row r fills slot slot_R[r] = number * N + any of N, and each slot is
    filled once. None on devices, where `add_rows` does not ask for it."""
    if slot_R.device.type != "cpu":
        return None
    row_TN = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(len(slot_R))).view(len(slot_R) // N, N)
    return row_TN if N <= 2 else row_TN.sort(dim=1).values  # the sum of two has no order


def add_rows(rows_RD: Tensor, number_R: Tensor, numbers: int, row_TN: Tensor | None = None) -> Tensor:
    """[R, D] -> [numbers, D], float32 or wider, or the type of the rows where that rounds no more often: for each number the sum of its
    rows, as they lie; zeros where there are none. row_TN: `rows_by_number` of these rows, where each number has as many. No gradient."""
    if row_TN is not None:
        return _of_equally_many(rows_RD, row_TN)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    return torch.zeros(numbers, rows_RD.shape[1], dtype=wide, device=rows_RD.device).index_add_(0, number_R, rows_RD.to(wide))


def _of_equally_many(rows_RD: Tensor, row_TN: Tensor) -> Tensor:
    """On a CPU: reads each row once and writes each sum once; nothing as large as the rows is made in between."""
    N = row_TN.shape[1]
    row_NT = row_TN.t().contiguous()
    if N == 1:
        return rows_RD.index_select(0, row_NT[0])
    # the sum of two is rounded once whatever the type; more of them are added in float32
    dtype = rows_RD.dtype if N == 2 else torch.promote_types(rows_RD.dtype, torch.float32)
    sum_TD = rows_RD.new_empty(row_TN.shape[0], rows_RD.shape[1], dtype=dtype)
    # blocks of the third-level cache: a sum is so little work that calling several threads for it often costs more than the second level gains
    for tokens in row_blocks(len(sum_TD), max(rows_RD.shape[1] // 4, 1), rows_RD.device):
        first, *others = rows_RD.index_select(0, row_NT[:, tokens].reshape(-1)).chunk(N)
        block = torch.add(first, others[0], out=sum_TD[tokens]) if N == 2 else sum_TD[tokens].copy_(first)
        for other in others if N > 2 else ():
            block += other
    return sum_TD
