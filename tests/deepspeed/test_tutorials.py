"""The tutorials' code (tutorials.py) on 1 and 4 processes, ZeRO 0 to 3: it trains what a plain PyTorch loop trains.

The loop has no engine, no MoE layer of ours and one process: it walks the micro-batches of all ranks, takes the mean of their losses,
and keeps each expert in a module of its own (plain_moe.py). float64, so that what is wrong by a factor or a token is far outside the
tolerance, and no choice of expert hangs on rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tutorials
from distributed_pool import run_distributed
from plain_moe import plain
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_moe import deepspeed
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import is_moe_param

pytestmark = pytest.mark.distributed

STEPS, SEED = 3, 5
IN_ORDER = {"use_rts": False, "top2_2nd_expert_sampling": False}  # nothing is drawn
# name -> (network, arguments of its MoE layers)
BLOCKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (tutorials.Classifier, IN_ORDER),
    "classifier, residual": (tutorials.Classifier, IN_ORDER | {"use_residual": True, "drop_tokens": False}),
    "transformer": (tutorials.MoETransformer, IN_ORDER | {"k": 2, "drop_tokens": False}),
    "transformer, dropping": (tutorials.MoETransformer, IN_ORDER | {"k": 2, "capacity_factor": 0.5, "min_capacity": 1}),
    "switch": (tutorials.SwitchTransformer, IN_ORDER),
}
RANDOM: dict[str, tuple[Any, dict[str, Any]]] = {
    "switch, as published": (tutorials.SwitchTransformer, {"noisy_gate_policy": "RSample"}),
    "transformer, defaults": (tutorials.MoETransformer, {"k": 2}),
    "classifier, defaults": (tutorials.Classifier, {}),
}
OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1}
CLIP = 0.5


def config(stage: int, accumulation: int = 1) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": OPTIMIZER},
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
    }


def network(block: str, ep_size: int = 1) -> nn.Module:
    """In float64. Wider gates: no two experts are close."""
    cls, moe = (BLOCKS | RANDOM)[block]
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(SEED)
    model = cls(**moe, ep_size=ep_size)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("core.gate.weight"):
                p.mul_(4)
    return model


def batch(block: str, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """`step` counts micro-batches."""
    return (BLOCKS | RANDOM)[block][0].batch(torch.Generator().manual_seed(1000 * step + rank))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in model.state_dict().items()}


# ---------------------------------------------------------------- the two sides


def ported(block: str, ep_size: int, stage: int, accumulation: int, groups: str | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """On every rank: losses of its micro-batches, and the weights at the end."""
    model = network(block, ep_size)
    parameters = getattr(tutorials, groups)(model) if groups else None
    engine = tutorials.start(model, config(stage, accumulation), parameters)
    torch.manual_seed(SEED)  # what the layers draw
    batches = [batch(block, i, engine.global_rank) for i in range(STEPS * accumulation)]
    losses = tutorials.train(engine, batches, (BLOCKS | RANDOM)[block][0].loss)
    assert engine.global_steps == STEPS
    return losses, whole(engine.module)


def plain_loop(block: str, ranks: int, accumulation: int, decayed: Any = None) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The same in one process without any of it: losses by rank, and the weights at the end."""
    model = plain(network(block))
    parameters = dict(model.named_parameters())
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(model.parameters(), lr=o["lr"], betas=o["betas"], eps=o["eps"], weight_decay=o["weight_decay"])
    losses: list[list[float]] = [[] for _ in range(ranks)]
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulation):
            for rank in range(ranks):
                loss = BLOCKS[block][0].loss(model, *batch(block, step * accumulation + micro, rank))
                (loss / (ranks * accumulation)).backward()
                losses[rank].append(loss.item())
        for p in parameters.values():  # an expert without tokens has no gradient in a ModuleList; there it has zero, and decays
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return losses, {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


_EXPECTED: dict[tuple, Any] = {}


def expected(block: str, ranks: int, accumulation: int = 1):
    key = block, ranks, accumulation
    if key not in _EXPECTED:
        _EXPECTED[key] = plain_loop(*key)
    return _EXPECTED[key]


def check(found: list[tuple[list[float], dict[str, Tensor]]], want: tuple[list[list[float]], dict[str, Tensor]], start: dict[str, Tensor]):
    for rank, (losses, weights) in enumerate(found):
        assert losses == pytest.approx(want[0][rank], rel=1e-9), f"losses of rank {rank}"
        assert weights.keys() == want[1].keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, want[1][name], rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
            assert not torch.equal(weight, start[name]), f"{name} has not moved"


def start_of(block: str) -> dict[str, Tensor]:
    return whole(network(block))


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("block", BLOCKS)
def test_a_tutorial_in_one_process_trains_what_a_plain_loop_trains(block):
    check(run_distributed(ported, 1, block, 1, 0, 1), expected(block, 1), start_of(block))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_tutorial_on_four_processes_trains_what_a_plain_loop_trains(block, stage):
    """8 experts, 2 expert-parallel ranks: 4 experts on each."""
    check(run_distributed(ported, 4, block, 2, stage, 1), expected(block, 4), start_of(block))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulated_micro_batches_make_one_step(stage):
    block = "transformer"
    check(run_distributed(ported, 4, block, 2, stage, 2), expected(block, 4, 2), start_of(block))


@pytest.mark.parametrize("groups", ["create_moe_param_groups", "create_split_groups"])
@pytest.mark.parametrize("stage", [0, 2])
def test_groups_made_by_the_user_train_the_same(groups, stage):
    block = "classifier"
    check(run_distributed(ported, 4, block, 2, stage, 1, groups), expected(block, 4), start_of(block))


@pytest.mark.parametrize("block", RANDOM)
def test_what_is_random_is_equal_in_every_zero_stage(block):
    """Noise, and random token selection: drawn from torch's generator, so the stages draw alike."""
    found = [run_distributed(ported, 4, block, 2, stage, 1) for stage in range(4)]
    for stage in (1, 2, 3):
        for (losses, weights), (losses_0, weights_0) in zip(found[stage], found[0]):
            assert losses == pytest.approx(losses_0, rel=1e-9), f"stage {stage}"
            for name, weight in weights.items():
                torch.testing.assert_close(weight, weights_0[name], rtol=1e-8, atol=1e-9)
    start = start_of(block)
    assert all(not torch.equal(weight, start[name]) for name, weight in found[0][0][1].items())
    assert len({tuple(losses) for losses, _ in found[0]}) == 4  # every rank has images of its own


def _degree_from_groups(stage: int) -> tuple[int, int, list[float]]:
    deepspeed.init_distributed()
    deepspeed.utils.groups.initialize(ep_size=2)
    try:
        cls, moe = BLOCKS["classifier"]
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(SEED)
        model = cls(**moe)
        engine = tutorials.start(model, config(stage))
        losses = tutorials.train(engine, [batch("classifier", i, engine.global_rank) for i in range(2)], cls.loss)
        experts = [p for p in engine.module.parameters() if is_moe_param(p)]
        degree = next(m for m in engine.module.modules() if isinstance(m, MoE)).ep_size
        local = deepspeed.utils.groups.get_expert_parallel_world_size("ep_size_2")
        assert experts and all(p.group_name == "ep_size_2" for p in experts)
        return degree, local, losses
    finally:
        deepspeed.utils.groups.initialize(ep_size=1)


def test_groups_initialize_is_the_degree_of_layers_that_name_none():
    found = run_distributed(_degree_from_groups, 4, 2)
    assert [(degree, size) for degree, size, _ in found] == [(2, 2)] * 4


def _groups_seen(stage: int) -> list[dict[str, Any]]:
    model = network("classifier", 2)
    engine = tutorials.start(model, config(stage), tutorials.create_moe_param_groups(model))
    tutorials.train(engine, [batch("classifier", 0, engine.global_rank)], tutorials.Classifier.loss)
    names = {id(p): n for n, p in engine.module.named_parameters()}
    return [
        {k: v for k, v in group.items() if k in ("moe", "name", "weight_decay")} | {"names": [names[id(p)] for p in group["params"]]}
        for group in engine.optimizer.param_groups
    ]


def test_scanned_groups_keep_their_options_and_their_parameters():
    for dense, experts in run_distributed(_groups_seen, 4, 2):
        assert experts["moe"] is True
        assert experts["name"] == "weight_decay_moe_params"
        assert experts["names"] == ["fc3.core.experts.stack.weight", "fc3.core.experts.stack.bias"]
        assert dense["weight_decay"] == experts["weight_decay"] == 0.1
        assert len(dense["names"]) == 2 * 5 + 1  # five dense layers, the gate


class Images(torch.utils.data.Dataset):
    """Two classes: bright above, bright below."""

    def __init__(self):
        self.labels = torch.arange(64) % 2
        rows = torch.linspace(-1, 1, 32)[:, None].expand(32, 32)
        noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.images = (self.labels[:, None, None, None] * 2 - 1) * rows + 0.3 * noise

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.labels[i]


def _whole_script(folder: Path) -> tuple[float, float, int, str]:
    """training_data, several epochs, a checkpoint with a tag, and back."""
    torch.manual_seed(SEED)
    net = tutorials.Classifier(ep_size=2)
    args = type("Args", (), {"deepspeed_config": None})()
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=Images(),
        config={
            "train_batch_size": 16,
            "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.003, "warmup_num_steps": 5}},
            "zero_optimization": {"stage": 2, "allgather_bucket_size": 5e8, "overlap_comm": True, "contiguous_gradients": True},
        },
    )
    losses = [loss for _ in range(6) for loss in tutorials.train(engine, loader, tutorials.Classifier.loss)]
    engine.save_checkpoint(str(folder), tag="epoch6")
    path, _ = engine.load_checkpoint(str(folder), tag="epoch6")
    return sum(losses[:4]) / 4, sum(losses[-4:]) / 4, engine.global_steps, str(path)


def test_the_whole_script_learns_two_classes_and_saves(tmp_path):
    for first, last, steps, path in run_distributed(_whole_script, 4, tmp_path):
        assert first > 0.4 and last < 0.1, f"loss from {first} to {last}"
        assert steps == 6 * 4
        assert "epoch6" in path


# ---------------------------------------------------------------- can it fail?


def test_the_comparison_notices_experts_that_are_off_by_a_millionth():
    """Faults in the engine itself are planted in test_engine_parity.py."""
    losses, weights = expected("classifier, residual", 4)
    wrong = {n: w * (1 + 1e-6) if "deepspeed_experts" in n else w for n, w in weights.items()}
    with pytest.raises(AssertionError, match="deepspeed_experts"):
        check([(losses[0], wrong)], (losses, weights), start_of("classifier, residual"))
