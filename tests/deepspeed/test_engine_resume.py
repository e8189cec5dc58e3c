"""save_checkpoint and load_checkpoint: what goes on afterwards is, bit for bit, what would have gone on without them."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_pool import run_distributed
from engine_models import ADAM, IN, OUT, Block, D, E, config_of, expert, said, whole
from torch import nn
from torch.utils.data import TensorDataset

from megatron_moe import deepspeed
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.deepspeed.moe.layer import MoE

FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
WARMUP = {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3, "warmup_max_lr": 0.02, "warmup_type": "linear"}}


class Noisy(nn.Module):
    """Everything random at once: dropout, jitter, random token selection; a buffer that counts; a parameter that is not trained."""

    def __init__(self, ep_size: int = 1):
        super().__init__()
        self.first, self.blocks = nn.Linear(IN, D), nn.ModuleList([Block(), Block()])
        self.moe = MoE(D, expert(), E, ep_size, capacity_factor=1.0, min_capacity=1, noisy_gate_policy="Jitter")
        self.last, self.frozen = nn.Linear(D, OUT), nn.Linear(D, D).requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += 1
        x = F.dropout(self.first(x), 0.2, self.training)
        for block in self.blocks:
            x = block(x)
        y, l_aux, _ = self.moe(x)
        return self.last(x + y + self.frozen(x)), l_aux


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(26, IN, generator=generator), torch.randint(OUT, (26,), generator=generator))


def build(seed: int, stage: int, ep: int, fp16: bool = False, schedule: bool = True, optimizer=None, **more):
    torch.manual_seed(seed)
    sections = {"fp16": FP16} if fp16 else {}
    if schedule:
        sections["scheduler"] = WARMUP
    if optimizer is None:
        sections["optimizer"] = ADAM
    net = Noisy(ep)
    return deepspeed.initialize(
        model=net, optimizer=optimizer(net) if optimizer else None, training_data=images(),
        config=config_of(dist.get_world_size(), 2, stage, **sections, **more),
    )  # fmt: skip


def loss_of(engine, x, target):
    logits, l_aux = engine(x)
    return F.cross_entropy(logits.float(), target) + 0.05 * l_aux


def go_on(engine, loader, batches: int, save_after: int = 0, directory: str = "") -> list[float]:
    """Losses of so many micro-batches, epoch after epoch."""
    losses = []
    while len(losses) < batches:
        for x, target in loader:
            loss = loss_of(engine, x, target)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
            if len(losses) == save_after:
                engine.save_checkpoint(directory, client_state={"epoch": 3, "names": ["a", "b"]})
            if len(losses) == batches:
                break
    return losses


def everything(engine) -> dict[str, torch.Tensor]:
    out = {n: whole(t) for n, t in [*engine.module.named_parameters(), *engine.module.named_buffers()]}
    names = {p: n for n, p in engine.module.named_parameters()}
    for p, slots in engine.optimizer.state.items():
        out |= {f"{slot} {names[p]}": whole(torch.as_tensor(v)) for slot, v in slots.items()}
    return out


def counters(engine):
    return (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps, engine.loss_scale, engine.get_lr())


def _interrupted(directory, stage, ep, fp16):
    engine, _, loader, _ = build(1, stage, ep, fp16)
    expected = go_on(engine, loader, 14, 6, directory)[6:]  # saved on the way, in the middle of an epoch of one and two ranks
    whole_run = (expected, everything(engine), counters(engine))
    engine, _, loader, _ = build(2, stage, ep, fp16)  # other weights, another seed
    path, client_state = engine.load_checkpoint(directory)
    assert client_state == {"epoch": 3, "names": ["a", "b"]} and Path(path).parent.name == "global_step3"
    assert engine.global_steps == 3 and engine.micro_steps == 6
    found = go_on(engine, loader, 8)
    return whole_run, (found, everything(engine), counters(engine))


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("ranks", "ep", "stage"), [(1, 1, 0), (2, 2, 2), (4, 2, 0), (4, 2, 1), (4, 2, 3)])
def test_a_resumed_engine_run_is_exact(tmp_path, ranks, ep, stage, fp16):
    for (losses, tensors, numbers), (found, now, then) in run_distributed(_interrupted, ranks, str(tmp_path), stage, ep, fp16):
        assert found == losses
        assert numbers == then
        assert tensors.keys() == now.keys()
        assert [n for n, t in tensors.items() if not torch.equal(t, now[n])] == []


def _save(directory, stage, ep, optimizer=None, tag=None):
    engine, _, loader, _ = build(1, stage, ep, optimizer=optimizer, schedule=optimizer is None)
    go_on(engine, loader, 4)
    engine.save_checkpoint(directory, tag)
    return everything(engine)


def _load(directory, stage, ep, optimizer=None, tag=None):
    engine, _, _, _ = build(2, stage, ep, optimizer=optimizer, schedule=optimizer is None)
    path, _ = engine.load_checkpoint(directory, tag)
    assert path
    return everything(engine)


@pytest.mark.parametrize(
    ("wrote", "reads"), [((1, 0, 1), (4, 3, 2)), ((4, 2, 2), (2, 1, 1)), ((4, 3, 4), (1, 0, 1)), ((2, 0, 2), (4, 1, 4))]
)
def test_another_layout_reads_weights_and_moments(tmp_path, wrote, reads):
    """(ranks, ZeRO stage, expert-parallel degree)"""
    saved = run_distributed(_save, wrote[0], str(tmp_path), *wrote[1:])[0]
    found = run_distributed(_load, reads[0], str(tmp_path), *reads[1:])[0]
    assert saved.keys() == found.keys()
    assert [n for n, t in saved.items() if not torch.equal(t, found[n])] == []


def momentum(net):
    return torch.optim.SGD([{"params": net.moe.parameters(), "lr": 0.1}, {"params": net.last.parameters()}], lr=0.2, momentum=0.9)


def test_the_callers_optimizer_is_saved_too(tmp_path):
    saved = run_distributed(_save, 2, str(tmp_path), 1, 2, momentum)[0]
    found = run_distributed(_load, 2, str(tmp_path), 2, 1, momentum)[0]
    assert any(n.startswith("momentum_buffer") for n in saved) and saved.keys() == found.keys()
    assert [n for n, t in saved.items() if not torch.equal(t, found[n])] == []


# ---------------------------------------------------------------- tags


def _tags(directory):
    engine, _, loader, _ = build(1, 1, 1)
    go_on(engine, loader, 2)
    engine.save_checkpoint(directory, "best")
    first = everything(engine)
    go_on(engine, loader, 2)
    engine.save_checkpoint(directory, "best")  # over the one before
    second = everything(engine)
    go_on(engine, loader, 2)
    engine.save_checkpoint(directory, "last", save_latest=False)
    seen = {}
    for tag in (None, "best", "last"):
        engine.load_checkpoint(directory, tag)
        seen[tag] = engine.global_steps
    engine.load_checkpoint(directory, "best")
    now = everything(engine)
    return seen, all(torch.equal(t, now[n]) for n, t in second.items()), all(torch.equal(t, now[n]) for n, t in first.items())


def test_a_tag_that_is_saved_again_is_replaced(tmp_path):
    seen, is_second, is_first = run_distributed(_tags, 2, str(tmp_path))[0]
    assert seen == {None: 2, "best": 2, "last": 3} and is_second and not is_first
    assert (tmp_path / "latest").read_text() == "best"
    assert [p.name for p in sorted((tmp_path / "best").glob("iter_*"))] == ["iter_0000002"]


def _nothing(directory):
    engine, *_ = build(1, 0, 1)
    before = everything(engine)
    answer = engine.load_checkpoint(directory)
    return answer, all(torch.equal(t, before[n]) for n, t in everything(engine).items())


def test_nothing_saved_gives_none_and_changes_nothing(tmp_path):
    assert run_distributed(_nothing, 1, str(tmp_path)) == [((None, None), True)]


def _call(directory, what):
    engine, _, loader, _ = build(1, 0, 1)
    go_on(engine, loader, 2)
    engine.save_checkpoint(directory, "a")
    what(engine, directory)


def wrong_tag(engine, directory):
    engine.load_checkpoint(directory, "b")


def tag_with_a_slash(engine, directory):
    engine.save_checkpoint(directory, "a/b")


def unsafe_client_state(engine, directory):
    engine.save_checkpoint(directory, client_state={"args": object()})


def numbered_client_state(engine, directory):
    engine.save_checkpoint(directory, client_state={"best": {1: 2}})


def own_loader(engine, directory):
    engine.load_checkpoint(directory, custom_load_fn=print)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        (wrong_tag, CheckpointError, "there is no tag b in .*; there are a"),
        (tag_with_a_slash, ValueError, "a tag names a directory inside save_dir: not 'a/b'"),
        (unsafe_client_state, ValueError, r"client_state\['args'\] is <object .*use numbers, text"),
        (numbered_client_state, ValueError, r"client_state\['best'\] is \{1: 2\}, which does not come back"),
        (own_loader, ValueError, "custom_load_fn"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_cannot_be_saved_or_loaded_is_said(tmp_path, what, error, says):
    found = run_distributed(said, 1, _call, str(tmp_path), what)[0]
    assert found.startswith(error.__name__) and re.search(says, found), found


def _parts(directory):
    engine, _, loader, _ = build(1, 1, 2, schedule=False)
    go_on(engine, loader, 4)
    engine.save_checkpoint(directory, "all")
    engine.save_checkpoint(directory, "thawed", exclude_frozen_parameters=True)
    saved = everything(engine)
    other, *_ = build(2, 1, 2, schedule=False)
    other.load_checkpoint(directory, "all", load_module_only=True)
    only = (everything(other).keys() & saved.keys(), other.global_steps, len(other.optimizer.state))
    third, *_ = build(3, 1, 2, schedule=False)
    frozen = whole(third.module.frozen.weight)
    third.load_checkpoint(directory, "thawed")
    kept = torch.equal(frozen, whole(third.module.frozen.weight)) and torch.equal(whole(third.module.last.weight), saved["last.weight"])
    fourth, *_ = build(4, 1, 2, schedule=False)
    fourth.load_checkpoint(directory, "all", load_optimizer_states=False)
    return (
        only,
        kept,
        (fourth.global_steps, len(fourth.optimizer.state), torch.equal(whole(fourth.module.first.weight), saved["first.weight"])),
    )


def test_parts_of_a_checkpoint(tmp_path):
    (names, steps, states), kept, (fourth, fourth_states, is_equal) = run_distributed(_parts, 2, str(tmp_path))[0]
    assert "first.weight" in names and (steps, states) == (0, 0)
    assert kept
    assert (fourth, fourth_states, is_equal) == (2, 0, True)


# ---------------------------------------------------------------- weights alone


def _whole_file(directory, stage):
    engine, _, loader, _ = build(1, stage, 2)
    go_on(engine, loader, 2)
    assert engine.save_16bit_model(directory, "model.bin")
    return {n: whole(p) for n, p in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 3])
def test_save_16bit_model_is_a_file_of_whole_weights_under_deepspeeds_names(tmp_path, stage):
    weights = run_distributed(_whole_file, 4, str(tmp_path), stage)[0]
    saved = torch.load(tmp_path / "model.bin", weights_only=True)
    assert torch.equal(saved["first.weight"], weights["first.weight"].bfloat16())
    for number in range(E):
        key = f"moe.deepspeed_moe.experts.deepspeed_experts.{number}.0.weight"
        assert torch.equal(saved[key], weights["moe.core.experts.stack.0.weight"][number].bfloat16())
    net = Noisy()
    net.load_state_dict(saved)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    """The manifest is JSON and the rest tensors; the reader's own tests are tests/checkpoint/test_checkpoint_security.py."""
    run_distributed(_save, 1, str(tmp_path), 0, 1, None, "x")
    found = sorted(p.name for p in (tmp_path / "x" / "iter_0000001").iterdir())
    assert found == [".metadata", "__0_0.distcp", "manifest.json"]
    meta = json.loads((tmp_path / "x" / "iter_0000001" / "manifest.json").read_text())["meta"]
    assert meta["counters"]["global_steps"] == 2
