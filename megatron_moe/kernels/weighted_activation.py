"""What lies between the two products of the experts: biases, activation, gate weight. One public function picks the implementation."""
# R rows, F inner width, E experts

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.kernels import reference
from megatron_moe.kernels.on_gpu import takes_triton


def weighted_activation(
    name: str,
    h_RF: Tensor,
    gate_RF: Tensor | None,
    row_weights_R: Tensor,
    offsets_E: Tensor,
    b1_EF: Tensor | None = None,
    b_gate_EF: Tensor | None = None,
    use_reference: bool = False,
) -> Tensor:
    """row_weights[r] * act(h[r] + b1[e], gate[r] + b_gate[e]) -> [R, F], e being the expert of row r.

    name: as in kernels/activation.py; swiglu has a gate. offsets_E: int32, end of each expert's rows; rows behind the last one have
    weight 0. On a GPU this is one Triton kernel in each direction; torch.compile makes its own of the reference.
    """
    if use_reference or not takes_triton(h_RF):
        return reference.weighted_activation(name, h_RF, gate_RF, row_weights_R, offsets_E, b1_EF, b_gate_EF)
    return WeightedActivation.apply(name, h_RF, gate_RF, row_weights_R, offsets_E, b1_EF, b_gate_EF)


class WeightedActivation(torch.autograd.Function):
    """The Triton kernels: on a GPU, and on a CPU in Triton's interpreter."""

    @staticmethod
    def forward(ctx, name: str, h_RF: Tensor, gate_RF: Tensor | None, row_weights_R: Tensor, offsets_E: Tensor,
                b1_EF: Tensor | None, b_gate_EF: Tensor | None) -> Tensor:  # fmt: skip
        from megatron_moe.kernels import triton_activation

        h_RF, gate_RF, b1_EF, b_gate_EF = (None if x is None else x.contiguous() for x in (h_RF, gate_RF, b1_EF, b_gate_EF))
        weights_R = row_weights_R.float().contiguous()
        ctx.name, ctx.weights_dtype = name, row_weights_R.dtype
        ctx.save_for_backward(h_RF, gate_RF, weights_R, offsets_E, b1_EF, b_gate_EF)
        return triton_activation.forward(name, h_RF, gate_RF, weights_R, offsets_E, b1_EF, b_gate_EF)

    @staticmethod
    def backward(ctx, dout_RF: Tensor):
        from megatron_moe.kernels import triton_activation

        offsets_E, b1_EF, b_gate_EF = ctx.saved_tensors[3:]
        dh_RF, dgate_RF, dw_R = triton_activation.backward(ctx.name, dout_RF.contiguous(), *ctx.saved_tensors)
        db1_EF, db_gate_EF = (
            None if b is None else triton_activation.row_sums(dx, offsets_E).to(b.dtype)
            for b, dx in ((b1_EF, dh_RF), (b_gate_EF, dgate_RF))
        )
        return None, dh_RF, dgate_RF, dw_R.to(ctx.weights_dtype), None, db1_EF, db_gate_EF
