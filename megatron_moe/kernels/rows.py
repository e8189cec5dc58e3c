"""Adding up rows that belong to the same token: one public function, which picks the implementation."""
# R rows, D hidden, T tokens, N rows of each token

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels.blocks import row_blocks


def add_rows(rows_RD: Tensor, number_R: Tensor, numbers: int) -> Tensor:
    """[R, D] -> [numbers, D], float32 or wider, or the type of the rows where that rounds no more often: for each number the sum of its
    rows, as they lie; zeros where there are none. No gradient."""
    if rows_RD.device.type == "cpu" and len(number_R) >= numbers > 0 and len(number_R) % numbers == 0 and not looks_like_a_device():
        order_R = number_R.argsort(stable=True)
        row_TN = order_R.view(numbers, -1)
        if torch.equal(number_R[order_R].view(numbers, -1), torch.arange(numbers)[:, None].expand_as(row_TN)):
            return _of_equally_many(rows_RD, row_TN)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    return torch.zeros(numbers, rows_RD.shape[1], dtype=wide, device=rows_RD.device).index_add_(0, number_R, rows_RD.to(wide))


def looks_like_a_device() -> bool:
    """Tests that count what makes a host wait let the CPU stand for a device: then it must not look at the numbers either."""
    return False


def _of_equally_many(rows_RD: Tensor, row_TN: Tensor) -> Tensor:
    """On a CPU: reads each row once and writes each sum once; nothing as large as the rows is made in between."""
    N = row_TN.shape[1]
    row_NT = row_TN.t().contiguous()
    if N == 1:
        return rows_RD.index_select(0, row_NT[0])
    # the sum of two is rounded once whatever the type; more of them are added in float32
    dtype = rows_RD.dtype if N == 2 else torch.promote_types(rows_RD.dtype, torch.float32)
    sum_TD = rows_RD.new_empty(row_TN.shape[0], rows_RD.shape[1], dtype=dtype)
    for tokens in row_blocks(len(sum_TD), rows_RD.shape[1], rows_RD.device):
        first, *others = (rows_RD.index_select(0, row_T[tokens]) for row_T in row_NT)
        block = torch.add(first, others[0], out=sum_TD[tokens]) if N == 2 else sum_TD[tokens].copy_(first)
        for other in others if N > 2 else ():
            block += other
    return sum_TD
