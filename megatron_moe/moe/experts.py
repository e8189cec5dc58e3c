"""The experts of one layer: E MLPs with stacked weights."""
# D hidden, F inner width, E experts (those that live here, under expert parallelism), R routed rows

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from megatron_moe.kernels.activation import activate
from megatron_moe.kernels.grouped_gemm import grouped_gemm
from megatron_moe.utils.dtensor import local_weight

# Dims of each stack, the one place that says what a name means: expert parallelism, ZeRO and initialisation read it.
STACKS = {"w1": "EDF", "w_gate": "EDF", "w2": "EFD", "b1": "EF", "b_gate": "EF", "b2": "ED"}


class StackedExperts(nn.Module):
    """What dispatchers, expert parallelism and ZeRO ask of experts."""

    def dims(self, name: str) -> str:
        """Of a stack, as STACKS says it."""
        raise NotImplementedError

    def cut_into(self, slices: int) -> None:
        """From now on the output here is one of so many parts that are added up. Raises ValueError where it cannot be."""
        raise NotImplementedError

    def in_one_call(self, work: Callable[..., Tensor], x_TD: Tensor) -> Tensor:
        """work(forward, x_TD), which may compute several times: for FSDP it is one forward, and its end in the backward is that of x_TD."""
        return work(self.forward, x_TD)


class Experts(StackedExperts):
    """y_r = w_r * (act(x_r W1[e]) W2[e]) for rows grouped by expert; w_r is the gate weight that travelled with the row.

    The gate weight is applied between the two products, where it is cheapest: combining is then a plain sum, and neither the
    experts' output nor a copy per choice is kept for the backward.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        E, D, F_, is_gated = num_experts, hidden_size, ffn_size, activation == "swiglu"
        self.activation, self.use_reference = activation, False
        self.bias_share = 1.0
        self.w1 = nn.Parameter(torch.empty(E, D, F_))
        self.w_gate = nn.Parameter(torch.empty(E, D, F_)) if is_gated else None
        self.w2 = nn.Parameter(torch.empty(E, F_, D))
        self.b1 = nn.Parameter(torch.zeros(E, F_)) if bias else None
        self.b_gate = nn.Parameter(torch.zeros(E, F_)) if bias and is_gated else None
        self.b2 = nn.Parameter(torch.zeros(E, D)) if bias else None
        for w in (self.w1, self.w_gate, self.w2):
            if w is not None:
                nn.init.normal_(w, std=0.02)

    def dims(self, name: str) -> str:
        return STACKS[name]

    def cut_into(self, slices: int) -> None:
        """Along the inner width. The output bias has none: each slice adds its share of it."""
        self.bias_share = 1.0 / slices

    def forward(self, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, has_spare_rows: bool = False) -> Tensor:
        """offsets_E: int32, end of each expert's rows; there may be rows behind the last, of weight 0. Returns [R, D]."""
        linear = partial(self._linear, offsets_E, _expert_of_row(x_RD, offsets_E) if self.b1 is not None else None, has_spare_rows)
        gate_RF = None if self.w_gate is None else linear(x_RD, self.w_gate, self.b_gate)
        h_RF = activate(self.activation, linear(x_RD, self.w1, self.b1), gate_RF)
        row_weights_R1 = row_weights_R[:, None].to(h_RF.dtype)
        # the bias belongs to the expert's output, so it is weighted too
        return linear(h_RF * row_weights_R1, self.w2, self.b2, row_weights_R1 * self.bias_share)

    def _linear(self, offsets_E: Tensor, expert_R: Tensor | None, has_spare_rows: bool,
                x: Tensor, w: Tensor, b: Tensor | None, bias_weights_R1: Tensor | None = None) -> Tensor:  # fmt: skip
        y = grouped_gemm(x, local_weight(w), offsets_E, self.use_reference, has_spare_rows)
        if b is None:
            return y
        bias = local_weight(b).index_select(0, expert_R)
        return y + (bias if bias_weights_R1 is None else bias_weights_R1 * bias)


def _expert_of_row(x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    """[R]; a spare row counts to the last expert. (repeat_interleave refuses counts that do not add up to R.)"""
    row_R = torch.arange(x_RD.shape[0], dtype=offsets_E.dtype, device=offsets_E.device)
    return torch.searchsorted(offsets_E, row_R, right=True).clamp_max(offsets_E.shape[0] - 1)
