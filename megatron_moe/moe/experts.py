"""The experts of one layer: E MLPs with stacked weights."""
# D hidden, F inner width, E experts (those that live here, under expert parallelism), R routed rows

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.kernels.grouped_gemm import grouped_gemm
from megatron_moe.utils.dtensor import local_weight

# Dims of each stack, the one place that says what a name means: expert and tensor parallelism, ZeRO and initialisation read it.
STACKS = {"w1": "EDF", "w_gate": "EDF", "w2": "EFD", "b1": "EF", "b_gate": "EF", "b2": "ED"}


class Experts(nn.Module):
    """y_r = w_r * (act(x_r W1[e]) W2[e]) for rows grouped by expert; w_r is the gate weight that travelled with the row.

    The gate weight is applied between the two products, where it is cheapest: combining is then a plain sum, and neither the
    experts' output nor a copy per choice is kept for the backward.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int, swiglu: bool = False, bias: bool = True):
        super().__init__()
        E, D, F_ = num_experts, hidden_size, ffn_size
        self.swiglu, self.use_reference = swiglu, False
        self.w1 = nn.Parameter(torch.empty(E, D, F_))
        self.w_gate = nn.Parameter(torch.empty(E, D, F_)) if swiglu else None
        self.w2 = nn.Parameter(torch.empty(E, F_, D))
        self.b1 = nn.Parameter(torch.zeros(E, F_)) if bias else None
        self.b_gate = nn.Parameter(torch.zeros(E, F_)) if bias and swiglu else None
        self.b2 = nn.Parameter(torch.zeros(E, D)) if bias else None
        for w in (self.w1, self.w_gate, self.w2):
            if w is not None:
                nn.init.normal_(w, std=0.02)

    def forward(self, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor) -> Tensor:
        """offsets_E: int32, end of each expert's rows. Returns [R, D]."""
        expert_R = None
        if self.b1 is not None:
            rows_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
            expert_R = torch.repeat_interleave(rows_E.long(), output_size=x_RD.shape[0])
        h_RF = self._linear(x_RD, self.w1, self.b1, offsets_E, expert_R)
        if self.swiglu:
            h_RF = F.silu(self._linear(x_RD, self.w_gate, self.b_gate, offsets_E, expert_R)) * h_RF
        else:
            h_RF = F.gelu(h_RF)
        row_weights_R1 = row_weights_R[:, None].to(h_RF.dtype)
        y_RD = grouped_gemm(h_RF * row_weights_R1, local_weight(self.w2), offsets_E, self.use_reference)
        if self.b2 is not None:  # the bias belongs to the expert's output, so it is weighted too
            y_RD = y_RD + row_weights_R1 * local_weight(self.b2).index_select(0, expert_R)
        return y_RD

    def _linear(self, x_RD: Tensor, w: Tensor, b: Tensor | None, offsets_E: Tensor, expert_R: Tensor | None) -> Tensor:
        y_RF = grouped_gemm(x_RD, local_weight(w), offsets_E, self.use_reference)
        return y_RF if b is None else y_RF + local_weight(b).index_select(0, expert_R)
