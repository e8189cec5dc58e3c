"""The experts of one layer: E MLPs with stacked weights."""
# D hidden, F inner width, E experts (those that live here, under expert parallelism), R routed rows

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_moe.kernels.expert_mlp import expert_mlp
from megatron_moe.kernels.gathered_gemm import can_gather
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

    def gathers(self, x_TD: Tensor) -> bool:
        """Whether `forward` takes tokens and the token of each row, in place of a copy of the rows."""
        return False

    def in_one_call(self, work: Callable[..., Tensor], x_TD: Tensor) -> Tensor:
        """work(forward, x_TD), which may compute several times: for FSDP it is one forward, and its end in the backward is that of x_TD."""
        return work(self.forward, x_TD)


class Experts(StackedExperts):
    """y_r = w_r * (act(x_r W1[e]) W2[e]) for rows grouped by expert; w_r is the gate weight that travelled with the row.

    The gate weight is applied in here (on a device between the two products, on a CPU behind them: kernels/expert_mlp.py), so that
    combining is a plain sum and dispatchers need not keep the experts' output for the backward.
    """

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int, activation: str = "gelu", bias: bool = True,
                 fp8: bool = False, gather: bool = False):  # fmt: skip
        """fp8: multiply in FP8 (kernels/fp8.py). gather: pick rows from the tokens inside the products, where a kernel can."""
        super().__init__()
        self.fp8, self.gather = fp8, gather
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

    def gathers(self, x_TD: Tensor) -> bool:
        return self.gather and not self.use_reference and can_gather(x_TD)

    def forward(self, x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, has_spare_rows: bool = False,
                row_R: Tensor | None = None) -> Tensor:  # fmt: skip
        """offsets_E: int32, end of each expert's rows; there may be rows behind the last, of weight 0. Returns [R, D].

        row_R: where `gathers` says so, the rows are x_RD[row_R], int64.
        """
        stacks = {name: None if (w := getattr(self, name)) is None else local_weight(w) for name in STACKS}
        return expert_mlp(x_RD, offsets_E, row_weights_R, stacks, self.activation, self.bias_share, self.use_reference, has_spare_rows,
                          self.fp8, row_R)  # fmt: skip
