"""An engine on a GPU: offload to the host, half precision, an optimizer that was made on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from engine_models import ADAM, batch, config_of, loss_of, our_net, whole

from megatron_moe import deepspeed

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


def trained(stage: int, zero: dict | None = None, folder=None, optimizer=None, steps=range(4), **sections):
    """Losses, homes of the shards of weights and moments, and the engine."""
    config = config_of(1, 2, stage, **({} if optimizer else {"optimizer": ADAM}), **sections)
    config["zero_optimization"] |= zero or {}
    net = our_net(torch.float32)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net) if optimizer else None, config=config)
    if folder is not None and os.path.exists(folder):
        engine.load_checkpoint(folder)
    losses = []
    for step in steps:
        for micro in range(2):
            x, target = (t.to(engine.device) for t in batch(step, micro, 0, torch.float32))
            loss = loss_of(engine, x, target)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    tensors = [*engine.module.parameters(), *(t for s in engine.optimizer.state.values() for k, t in s.items() if k != "step")]
    return losses, {local(t).device.type for t in tensors}, engine


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 10}}], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("spelled", [{"cpu_offload": True}, {"offload_optimizer": {"device": "cpu", "pin_memory": True}}], ids=str)
def test_offload_to_the_host_trains_the_same(precision, stage, spelled, world):
    plain, homes, _ = trained(stage, **precision)
    assert homes == {"cuda"}
    found, homes, engine = trained(stage, spelled, **precision)
    assert homes == {"cpu"} and engine.device.type == "cuda"
    assert found == pytest.approx(plain, rel=1e-5 if not precision else 5e-3)


def test_half_weights_on_the_host(world):
    fp16 = {"enabled": True, "initial_scale_power": 10, "fp16_master_weights_and_grads": True}
    plain, _, _ = trained(2, fp16=fp16)
    found, homes, engine = trained(2, {"cpu_offload": True}, fp16=fp16)
    assert homes == {"cpu"} and engine.skipped_steps == 0 and found == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("zero", [{}, {"cpu_offload": True}], ids=str)
def test_a_resumed_run_is_exact(zero, world, tmp_path):
    bf16 = {"bf16": {"enabled": True}}
    _, _, engine = trained(2, zero, steps=range(2), **bf16)
    engine.save_checkpoint(str(tmp_path / "run"))
    losses = []
    for step in (2, 3):
        for micro in range(2):
            loss = loss_of(engine, *(t.to(engine.device) for t in batch(step, micro, 0, torch.float32)))
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    found, _, again = trained(2, zero, str(tmp_path / "run"), steps=(2, 3), **bf16)
    assert found == losses
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(engine.module.parameters(), again.module.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_with_moments_on_the_cpu_moves_to_the_gpu(fused, world):
    def with_a_step(net):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.1, fused=fused)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    losses, homes, _ = trained(1, optimizer=with_a_step)
    assert homes == {"cuda"} and losses[-1] == losses[-1]


def test_the_host_does_not_wait_in_a_step_without_a_loss_scale(world):
    """But for the module experts, which have to be told where their rows end: a model without them."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    engine, *_ = deepspeed.initialize(model=net, config=config_of(1, 1, 1, optimizer=ADAM, bf16={"enabled": True}))
    x = torch.randn(3, 6, device="cuda")

    def step():
        engine.backward(engine(x).float().square().mean())
        engine.step()

    step()  # the first one looks whether every group moved
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
