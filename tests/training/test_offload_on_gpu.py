"""ZeRO-Offload and activation offload where there is something to move: beside a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import parity
from torch.distributed.tensor import DTensor

from megatron_moe.optimizer.groups import build_optimizer
from megatron_moe.optimizer.loss_scale import LossScale
from megatron_moe.parallel.apply import build_parallel_mesh, build_parallel_model
from megatron_moe.training.step import train_step

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="needs an NVIDIA GPU of compute capability 9 or newer",
)


@pytest.fixture
def world(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(flags: str) -> tuple[list[float], set[str], int]:
    """Losses of four steps, where the shards of parameters and moments live, and the most bytes on the device."""
    c, device = parity.config("pyramid", flags), torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats()
    mesh = build_parallel_mesh(c, "cuda")
    model = build_parallel_model(c, parity.VOCAB, mesh, device)
    optimizer = build_optimizer(model, c.optimizer)
    loss_scale = LossScale(c.scale, device) if c.training.fp16 else None
    losses = []
    for step in range(4):
        batches = [b.to(device) for b in parity.microbatches(step, 0, 1, c.training.micro_batch_size)]
        losses.append(float(train_step(model, optimizer, batches, mesh, 1e-2, 0.5, parity.SEED, step, loss_scale=loss_scale).lm_loss))
    tensors = [*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())]
    homes = {(t.to_local() if isinstance(t, DTensor) else t).device.type for t in tensors}
    return losses, homes, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16 --initial-loss-scale 1024"])
@pytest.mark.parametrize("stage", [1, 3])
def test_shards_and_the_update_on_the_host_train_the_same(precision, stage, world):
    plain, homes, _ = trained(f"{precision} --zero-stage {stage}")
    assert homes == {"cuda"}
    found, homes, _ = trained(f"{precision} --zero-stage {stage} --cpu-optimizer")
    assert homes == {"cpu"}
    assert found == pytest.approx(plain, rel=1e-5 if not precision else 2e-3)


def test_activations_on_the_host_train_the_same_in_less_memory(world):
    flags = "--bf16 --hidden-size 256 --ffn-hidden-size 1024 --num-layers 8 --num-experts 1 1 1 1 1 4 4 4 --micro-batch-size 8"
    plain, _, most = trained(flags)
    found, _, less = trained(f"{flags} --cpu-offloading")
    assert found == pytest.approx(plain, rel=1e-3)
    assert less < most
