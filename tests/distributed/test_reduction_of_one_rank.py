"""Where one rank holds a unit alone, the reduction of its gradients copies nothing, and changes nothing."""

from __future__ import annotations

from unittest import mock

import torch
from distributed_pool import run_distributed
from torch.distributed.fsdp import FSDPModule

from distributed.parity import SEED, config, microbatches, whole
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import count_loss_tokens, forward_backward


def gradients(flags: str, own: bool) -> tuple[dict[str, torch.Tensor], bool]:
    """Of two micro-batches; and whether every unit that ran took its output from its input."""
    c = config("pyramid", f"{flags} --bf16")
    mesh = build_parallel_mesh(c, "cpu")
    same: list[bool] = []

    def copied(this, source, *args, **kwargs):
        same.append(this is source)
        return original(this, source, *args, **kwargs)

    original = torch.Tensor.copy_
    no_comm = mock.patch.object(FSDPModule, "set_custom_reduce_scatter") if not own else mock.MagicMock()
    by_fsdp = mock.patch("megatron_moe.parallel.apply.can_cast", return_value=False)  # as on a GPU
    with no_comm, by_fsdp, mock.patch.object(torch.Tensor, "copy_", copied):
        model = build_parallel_model(c, 60, mesh, torch.device("cpu"))
        batches = microbatches(0, mesh.rank("dp"), mesh.size("dp"), 2)[:2]
        same.clear()
        forward_backward(model, batches, count_loss_tokens(batches, mesh), mesh, SEED, 0)
    return {name: whole(p.grad) for name, p in model.named_parameters()}, any(same)


def test_gradients_are_those_of_torchs_own_reduction_without_its_copy():
    for world, flags in ((1, "--zero-stage 2"), (2, "--zero-stage 3 --tensor-model-parallel-size 2")):
        theirs = run_distributed(gradients, world, flags, False)
        for (expected, copied), (found, shared) in zip(theirs, run_distributed(gradients, world, flags, True)):
            assert shared and not copied
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            assert any(g.any() for g in found.values())
