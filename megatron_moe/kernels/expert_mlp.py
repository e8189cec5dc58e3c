"""The experts' MLPs: one public function, which picks the implementation."""
# R rows, D hidden, F inner width, E experts

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_moe.kernels.expert_mlp_cpu import expert_mlp_cpu
from megatron_moe.kernels.fp8 import fp8_grouped_gemm
from megatron_moe.kernels.gathered_gemm import gathered_gemm
from megatron_moe.kernels.grouped_gemm import grouped_gemm
from megatron_moe.kernels.reference import expert_of_row
from megatron_moe.kernels.weighted_activation import weighted_activation

_FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expert_mlp(
    x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, stacks: dict[str, Tensor | None], activation: str, bias_share: float = 1.0,
    use_reference: bool = False, has_spare_rows: bool = False, fp8: bool = False, row_R: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """row_weights[r] * (act(x[r] w1[e] + b1[e], x[r] w_gate[e] + b_gate[e]) w2[e] + bias_share * b2[e]) -> [R, D], e the expert of row r.

    offsets_E: int32, end of each expert's rows. Rows behind the last one, which there may be with `has_spare_rows`, have weight 0; they
    and their gradients come out as zero. stacks: w1 and w_gate [E, D, F], w2 [E, F, D], b1 and b_gate [E, F], b2 [E, D]; None: not there.
    fp8: products in FP8 (fp8.py). row_R: where `can_gather` (gathered_gemm.py), the token of each row, int64; x_RD has the tokens then.
    """
    if not (use_reference or fp8) and row_R is None and is_one_operator(x_RD, stacks):
        return expert_mlp_cpu(x_RD, offsets_E, row_weights_R, [w for w in stacks.values() if w is not None], activation, bias_share)
    multiply = fp8_grouped_gemm if fp8 else grouped_gemm
    product = partial(multiply, offsets_E=offsets_E, use_reference=use_reference, has_spare_rows=has_spare_rows)
    first = [w for w in (stacks["w1"], stacks["w_gate"]) if w is not None]
    if row_R is None:
        h_RF, *gate = (product(x_RD, w) for w in first)
    else:
        h_RF, *gate = gathered_gemm(x_RD, row_R, first, offsets_E, has_spare_rows)
    gate_RF = gate[0] if gate else None
    a_RF = weighted_activation(activation, h_RF, gate_RF, row_weights_R, offsets_E, stacks["b1"], stacks["b_gate"], use_reference)
    y_RD = product(a_RF, stacks["w2"])
    if stacks["b2"] is None:
        return y_RD
    # the bias belongs to the expert's output, so it is weighted too
    bias_RD = stacks["b2"].index_select(0, expert_of_row(len(y_RD), offsets_E))
    return y_RD + row_weights_R[:, None].to(y_RD.dtype) * bias_share * bias_RD


def is_one_operator(x_RD: Tensor, stacks: dict[str, Tensor | None]) -> bool:
    """Whether the operator for CPUs computes this. float64 is for the reference, which defines what is right."""
    present = [w for w in stacks.values() if w is not None]
    return x_RD.device.type == "cpu" and x_RD.dtype in _FAST_DTYPES and all(w.dtype == x_RD.dtype for w in present)
