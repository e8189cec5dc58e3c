"""DeepSpeed's MoE checkpoint files, in and out: written by hand here, by our export, and by DeepSpeed itself where it is installed."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_moe
import torch
from distributed_pool import run_distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_moe import deepspeed
from megatron_moe.checkpoint.deepspeed_files import read_file
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.deepspeed.foreign_checkpoint import export_checkpoint, import_checkpoint
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

pytestmark = pytest.mark.distributed

MODEL = "mp_rank_00_model_states.pt"
EXPERT = re.compile(r"(one|two)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.")
MODULES = {"one": 4, "two": 8}  # MoE modules in the order of the model: experts


# ---------------------------------------------------------------- engines of ours


def build(ep_size: int = 1, stage: int = 0, half: str | None = None, options: dict[str, Any] | None = None):
    model = small_moe.Small(MoE, ep_size)
    model.load_state_dict(small_moe.start_weights(model))
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, **(small_moe.OPTIMIZER | (options or {})))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=small_moe.config(stage, half))
    return engine


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def weights_of(engine) -> dict[str, Tensor]:
    return {name: whole(t) for name, t in engine.module.state_dict().items()}


def moments_of(engine) -> dict[str, Tensor]:
    """slot/name -> tensor, in our names, stacks whole."""
    names = {id(p): n for n, p in engine.module.named_parameters()}
    state = engine.optimizer.state
    return {f"{slot}/{names[id(p)]}": whole(t) for g in engine.optimizer.param_groups for p in g["params"] for slot, t in state[p].items()}


# ---------------------------------------------------------------- files by hand


def start() -> dict[str, Tensor]:
    return small_moe.start_weights(small_moe.Small(MoE))


def other_weights() -> dict[str, Tensor]:
    """Not those that the engines begin with."""
    return {name: t + 1 + i / 100 for i, (name, t) in enumerate(start().items())}


def write_by_hand(folder: Path, weights: dict[str, Tensor], is_old: bool = False, **more: Any) -> Path:
    """As section 2.10 of the layout says, without the code under test."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    dense = OrderedDict((n, t) for n, t in weights.items() if not EXPERT.match(n))
    content = {
        "module": dense, "buffer_names": [], "optimizer": None, "param_shapes": None, "frozen_param_shapes": None, "shared_params": None,
        "frozen_param_fragments": None, "lr_scheduler": None, "data_sampler": None, "random_ltd": None, "skipped_steps": 2,
        "global_steps": 7, "global_samples": 224, "dp_world_size": 2, "mp_world_size": 1, "ds_config": {}, "ds_version": "0.19.8",
        "num_experts": 8 if is_old else [4, 8],
    } | more  # fmt: skip
    torch.save(content, tag / MODEL)
    for number, (module, experts) in enumerate(MODULES.items()):
        for e in range(experts):
            own = {n: t.clone() for n, t in weights.items() if n.startswith(f"{module}.deepspeed_moe.experts.deepspeed_experts.{e}.")}
            if not is_old:
                torch.save(own, tag / f"layer_{number}_expert_{e}_{MODEL}")
    if is_old:
        for e in range(8):
            own = {n: t.clone() for n, t in weights.items() if (found := EXPERT.match(n)) and int(found[2]) == e}
            torch.save(own, tag / f"expert_{e}_{MODEL}")
    (folder / "latest").write_text("global_step7")
    return tag


def imported(folder: Path, ep_size: int, stage: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], list[str], tuple]:
    engine = build(ep_size, stage)
    found = import_checkpoint(engine, folder, **options)
    return weights_of(engine), found.client_state, found.left, (engine.global_steps, engine.skipped_steps, engine.global_samples)


WEIGHTS_ALONE = {"load_optimizer_states": False}


@pytest.mark.parametrize(("world", "ep_size", "stage"), [(1, 1, 0), (4, 2, 0), (4, 2, 1), (4, 4, 2), (4, 2, 3)])
def test_files_of_one_expert_each_load_under_every_layout(tmp_path, world, ep_size, stage):
    wanted = other_weights()
    write_by_hand(tmp_path, wanted, iteration=12, note="mine")
    for weights, client_state, left, progress in run_distributed(imported, world, tmp_path, ep_size, stage, WEIGHTS_ALONE):
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[n], wanted[n]) for n in wanted)
        assert client_state == {"iteration": 12, "note": "mine"}
        assert progress == (7, 2, 224)
        assert left == []


def _imported_alone(folder: Path, options: dict[str, Any]):
    return imported(folder, 1, 0, options)


def test_old_files_of_an_expert_number_in_all_modules_load(tmp_path):
    """The first module has 4 experts, the second 8: files 4 to 7 have nothing of the first."""
    write_by_hand(tmp_path, other_weights(), is_old=True)
    with pytest.raises(CheckpointError, match=r"one: has 4 experts, and there are files of experts 0, 1, 2, 3, 4, 5, 6, 7"):
        run_distributed(_imported_alone, 1, tmp_path, WEIGHTS_ALONE)


def _old_import(folder: Path):
    model = torch.nn.ModuleDict({"only": MoE(8, torch.nn.Linear(8, 8), num_experts=4, drop_tokens=False)})
    engine, *_ = deepspeed.initialize(model=model, config={"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    import_checkpoint(engine, folder, **WEIGHTS_ALONE)
    return weights_of(engine)


def test_old_files_load_where_every_module_has_as_many_experts(tmp_path):
    wanted = {
        name: torch.randn(t.shape)
        for name, t in torch.nn.ModuleDict({"only": MoE(8, torch.nn.Linear(8, 8), num_experts=4)}).state_dict().items()
    }
    tag = write_by_hand(tmp_path, {})
    for path in tag.glob("layer_*"):
        path.unlink()
    content = torch.load(tag / MODEL, weights_only=True)
    content |= {"num_experts": 4, "module": {n: t for n, t in wanted.items() if "deepspeed_experts" not in n}}
    torch.save(content, tag / MODEL)
    for e in range(4):
        torch.save({n: t.clone() for n, t in wanted.items() if f"deepspeed_experts.{e}." in n}, tag / f"expert_{e}_{MODEL}")
    weights = run_distributed(_old_import, 1, tmp_path)[0]
    assert all(torch.equal(weights[n], wanted[n]) for n in wanted)


# ---------------------------------------------------------------- what does not fit


def rewrite(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


DAMAGES = {
    "no latest": (lambda f, t: (f / "latest").unlink(), "latest: cannot be read .*give a tag. tags in .*: global_step7"),
    "latest leads elsewhere": (lambda f, t: (f / "latest").write_text("../global_step7"), "is not the name of a folder beside it"),
    "no such tag": (lambda f, t: (f / "latest").write_text("global_step9"), "global_step9: not there; tags in .*: global_step7"),
    "no model file": (lambda f, t: (t / MODEL).unlink(), "mp_rank_00_model_states.pt: missing; there are layer_0_expert_0"),
    "an expert is missing": (lambda f, t: (t / f"layer_1_expert_5_{MODEL}").unlink(),
                             "two: has 8 experts, and there are files of experts 0, 1, 2, 3, 4, 6, 7"),
    "a module too many": (lambda f, t: torch.save({}, t / f"layer_2_expert_0_{MODEL}"),
                          "experts 0 of MoE module number 2, and the model has 2 such modules"),
    "cut off": (lambda f, t: (t / f"layer_0_expert_1_{MODEL}").write_bytes(b"PK\x03\x04 half"), "layer_0_expert_1.*cut off, damaged"),
    "another shape": (lambda f, t: rewrite(t / MODEL, lambda c: c["module"].update({"first.weight": torch.ones(8, 7)})),
                      r"first\.weight: \[8, 7\] in the files, \[8, 6\] here"),
    "a weight is missing": (lambda f, t: rewrite(t / MODEL, lambda c: c["module"].pop("last.bias")), "last.bias: missing"),
    "a weight too many": (lambda f, t: rewrite(t / MODEL, lambda c: c["module"].update({"head.bias": torch.ones(3)})),
                          "head.bias: in mp_rank_00_model_states.pt, and the model has no such tensor"),
    "model parallelism": (lambda f, t: torch.save({}, t / "mp_rank_01_model_states.pt"), "mp_rank_01_model_states.pt: was saved under model"),
    "ZeRO 3": (lambda f, t: (t / MODEL).rename(t / f"zero_pp_rank_0_{MODEL}"), "in pieces by ZeRO stage 3.*zero_to_fp32"),
}  # fmt: skip


def _refused(folder: Path, ep_size: int, stage: int) -> tuple[str, bool]:
    engine = build(ep_size, stage)
    before = weights_of(engine)
    try:
        import_checkpoint(engine, folder, **WEIGHTS_ALONE)
    except CheckpointError as error:
        after = weights_of(engine)
        return str(error), all(torch.equal(before[n], after[n]) for n in before)
    return "", False


@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, damage):
    apply, message = DAMAGES[damage]
    apply(tmp_path, write_by_hand(tmp_path, other_weights()))
    for said, is_untouched in run_distributed(_refused, 2, tmp_path, 2, 1):
        assert re.search(message, said), said
        assert is_untouched


def test_experts_that_strayed_into_the_model_file_are_passed_over(tmp_path):
    """DeepSpeed leaves them there when a model's names do not begin with those of its modules."""
    tag = write_by_hand(tmp_path, other_weights())
    stray = "one.deepspeed_moe.experts.deepspeed_experts.0.0.weight"
    rewrite(tag / MODEL, lambda c: c["module"].update({stray: torch.zeros(12, 8)}))
    weights, _, left, _ = run_distributed(_imported_alone, 1, tmp_path, WEIGHTS_ALONE)[0]
    assert torch.equal(weights[stray], other_weights()[stray])
    assert len(left) == 1 and stray in left[0]


# ---------------------------------------------------------------- strangers' files


class Evil:
    def __init__(self, flag: Path):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


class Mine:
    """A class of the user's own, in what he gave to save_checkpoint."""


def test_the_attack_works_on_plain_pickle(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "flag")))
    assert (tmp_path / "flag").exists()


@pytest.mark.fault
@pytest.mark.parametrize("force", ["", "1"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_would_run_something_is_refused_by_name(tmp_path, monkeypatch, force, is_zip):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    torch.save({"module": Evil(tmp_path / "flag")}, tmp_path / "file.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"has an object of posix\.system.*nothing was executed"):
        read_file(tmp_path / "file.pt", ignored=["posix.system"])  # not even when asked to
    assert not (tmp_path / "flag").exists()


def test_objects_of_deepspeed_and_numpy_are_inert(tmp_path):
    """A generator's state, arguments and an enumeration lie in Megatron's files."""
    import argparse

    state = np.random.RandomState(0).get_state()
    torch.save({"np_rng_state": state, "args": argparse.Namespace(lr=1.0), "w": torch.ones(2)}, tmp_path / "file.pt")
    content = read_file(tmp_path / "file.pt")
    assert torch.equal(content["w"], torch.ones(2))
    assert type(content["args"]).__name__ == "Inert" and content["args"].path == "argparse.Namespace"
    assert type(content["np_rng_state"][1]).__name__ == "Inert"


def test_a_class_of_the_users_own_is_refused_and_can_be_left_out(tmp_path):
    torch.save({"mine": Mine(), "w": torch.ones(2)}, tmp_path / "file.pt")
    name = f"{__name__}.Mine"
    with pytest.raises(CheckpointError, match=re.escape(f'give ignore_classes=["{name}"]')):
        read_file(tmp_path / "file.pt")
    assert type(read_file(tmp_path / "file.pt", [name])["mine"]).__name__ == "Inert"


def test_client_state_that_is_not_read_is_named(tmp_path):
    write_by_hand(tmp_path, other_weights(), np_rng_state=np.random.RandomState(0).get_state(), iteration=3)
    _, client_state, left, _ = run_distributed(_imported_alone, 1, tmp_path, WEIGHTS_ALONE)[0]
    assert client_state == {"iteration": 3}
    assert left == ["np_rng_state: holds objects of classes that are not read"]


# ---------------------------------------------------------------- out, and in again


def _trained_and_exported(folder: Path, ep_size: int, stage: int) -> tuple[dict, dict, list[float]]:
    engine = build(ep_size, stage)
    small_moe.train(engine, 0, 2, engine.global_rank)
    found = export_checkpoint(engine, folder, client_state={"note": "mine"})
    assert found.left == []
    weights, moments = weights_of(engine), moments_of(engine)
    return weights, moments, small_moe.train(engine, 2, 4, engine.global_rank)


def _imported_and_trained(folder: Path, ep_size: int, stage: int) -> tuple[dict, dict, list[float], list[str]]:
    engine = build(ep_size, stage, options={"lr": 0.5})  # the rate goes on where it was
    found = import_checkpoint(engine, folder)
    assert found.client_state == {"note": "mine"}
    assert (engine.global_steps, engine.skipped_steps) == (2, 0)
    weights, moments = weights_of(engine), moments_of(engine)
    return weights, moments, small_moe.train(engine, 2, 4, engine.global_rank), found.left


@pytest.mark.parametrize(
    ("ep_size", "stage", "other_stage"),
    [(2, 0, 3), (4, 1, 0)] + [pytest.param(*row, marks=pytest.mark.matrix) for row in ((2, 3, 1), (1, 2, 2))],
)
def test_an_export_comes_back_with_its_moments(tmp_path, ep_size, stage, other_stage):
    """Four ranks write, four ranks of another sharding read, and train on alike."""
    wrote = run_distributed(_trained_and_exported, 4, tmp_path, ep_size, stage)
    read = run_distributed(_imported_and_trained, 4, tmp_path, ep_size, other_stage)
    for (weights, moments, losses), (weights_2, moments_2, losses_2, left) in zip(wrote, read):
        assert left == []
        assert weights.keys() == weights_2.keys() and moments.keys() == moments_2.keys()
        assert all(torch.equal(weights[n], weights_2[n]) for n in weights)
        assert all(torch.equal(moments[n], moments_2[n]) for n in moments)
        assert losses_2 == pytest.approx(losses, rel=1e-5)
    assert any(moments[n].abs().max() > 0 for n in moments if "exp_avg_sq" in n)


def test_moments_come_back_under_another_expert_parallelism(tmp_path):
    """The number of optimizer files says what it was."""
    wrote = run_distributed(_trained_and_exported, 4, tmp_path, 4, 0)[0]
    read = run_distributed(_imported_and_trained, 4, tmp_path, 2, 0)[0]
    assert all(torch.equal(wrote[1][n], read[1][n]) for n in wrote[1])


def test_exported_files_are_those_of_the_layout(tmp_path):
    run_distributed(_trained_and_exported, 4, tmp_path, 2, 2)
    tag = tmp_path / "global_step2"
    assert (tmp_path / "latest").read_text() == "global_step2"
    experts = {f"layer_{i}_expert_{e}_{MODEL}" for i, n in enumerate(MODULES.values()) for e in range(n)}
    optimizer = {f"expp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)}
    assert {p.name for p in tag.iterdir()} == experts | optimizer | {MODEL}
    model = torch.load(tag / MODEL, weights_only=True)
    assert model["num_experts"] == [4, 8] and model["note"] == "mine" and model["global_steps"] == 2
    assert not [name for name in model["module"] if EXPERT.match(name)]
    expert = torch.load(tag / f"layer_1_expert_5_{MODEL}", weights_only=True)
    prefix = "two.deepspeed_moe.experts.deepspeed_experts.5."
    assert {n: list(t.shape) for n, t in expert.items()} == {
        f"{prefix}0.weight": [12, 8], f"{prefix}0.bias": [12], f"{prefix}2.weight": [8, 12], f"{prefix}2.bias": [8],
    }  # fmt: skip
    state = torch.load(tag / "expp_rank_1_mp_rank_00_optim_states.pt", weights_only=True)["optimizer"]
    dense, own = state["param_groups"]
    assert own["moe"] is True and own["name"] == "ep_size_2"
    # of rank 1: experts 2 and 3 of the first module and 4 to 7 of the second, each with its four tensors one after the other
    shapes = [list(state["state"][i]["exp_avg"].shape) for i in own["params"]]
    assert shapes == [[12, 8], [12], [8, 12], [8]] * (2 + 4)
    assert len(dense["params"]) == 2 + 1 + 2 + 1 + 4 + 2 + 2


def _bad_exports(folder: Path) -> list[str]:
    engine, said = build(), []
    export_checkpoint(engine, folder, tag="there")
    for options in ({"tag": "there"}, {"tag": "a/b"}, {"client_state": {"module": 1}}, {"client_state": {"x": Mine()}}):
        with pytest.raises(ValueError) as error:
            export_checkpoint(engine, folder, **options)
        said.append(str(error.value))
    return said


def test_exports_that_are_refused(tmp_path):
    there, path, reserved, other = run_distributed(_bad_exports, 1, tmp_path)[0]
    assert "exists and is not overwritten" in there
    assert "must be the name of a folder" in path
    assert "must not have the keys module" in reserved
    assert "'x' holds something else" in other
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name] == []


# ---------------------------------------------------------------- optimizers that do not fit


def _moments_refused(folder: Path, change: str) -> str:
    if change == "SGD":
        model = small_moe.Small(MoE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=small_moe.config())
    else:
        model = small_moe.Small(MoE)
        names = [n for n, _ in model.named_parameters()]
        parameters = dict(model.named_parameters())
        order = list(reversed(names)) if change == "order" else names
        cut = 3 if change == "groups" else 0
        groups = [{"params": [parameters[n] for n in part]} for part in (order[:cut], order[cut:]) if part]
        optimizer = torch.optim.AdamW(groups, **small_moe.OPTIMIZER)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=small_moe.config())
    try:
        import_checkpoint(engine, folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("SGD", "SGD keeps momentum_buffer, the optimizer of the files exp_avg, exp_avg_sq, step"),
        ("order", r"is \[.*\] here, and exp_avg in its place"),
        ("groups", r"the optimizer's groups are others than in the files"),
    ],
)
def test_an_optimizer_that_is_not_the_one_of_the_files_is_refused(tmp_path, change, message):
    run_distributed(_trained_and_exported, 1, tmp_path, 1, 0)
    assert re.search(message, run_distributed(_moments_refused, 1, tmp_path, change)[0])


# ---------------------------------------------------------------- flat optimizer files by hand

WORLD, EP = 4, 2


def in_model_order(weights: dict[str, Tensor]) -> tuple[list[str], list[list[str]]]:
    """Names of the dense parameters, and of the experts of each of two expert-parallel ranks, as DeepSpeed's modules have them."""
    dense = [n for n in weights if not EXPERT.match(n)]
    of_rank = []
    for rank in range(EP):
        own = []
        for module, experts in MODULES.items():
            each = experts // EP
            for e in range(rank * each, (rank + 1) * each):
                own += [f"{module}.deepspeed_moe.experts.deepspeed_experts.{e}.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")]
        of_rank.append(own)
    return dense, of_rank


def some_moments(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return {n: {s: torch.rand(t.shape, generator=draw) for s in ("exp_avg", "exp_avg_sq")} for n, t in weights.items()}


def flat(tensors: list[Tensor], align: int) -> tuple[Tensor, int]:
    """One tensor, filled up to a multiple of `align`; and by how much."""
    whole = torch.cat([t.flatten() for t in tensors])
    pad = -len(whole) % align
    return torch.cat([whole, torch.full((pad,), 99.0)]), pad


def write_zero(folder: Path, kind: str, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> Path:
    """ZeRO 2 by four data ranks, two of them to an expert-parallel group. `kind`: zero, elastic, bf16."""
    half = {n: t.bfloat16() for n, t in weights.items()}
    dense, of_rank = in_model_order(weights)
    shapes = [OrderedDict((n, weights[n].shape) for n in names) for names in (dense, of_rank[0])]
    tag = write_by_hand(folder, half, param_shapes=shapes, dp_world_size=WORLD)
    for rank in range(WORLD):
        parts, states, pads = [], [], []
        for names, ranks, place in ((dense, WORLD, rank), (of_rank[rank % EP], WORLD // EP, rank // EP)):
            pad, of_slot = 0, {}
            for slot in ("fp32", "exp_avg", "exp_avg_sq"):
                whole, pad = flat([weights[n] if slot == "fp32" else moments[n][slot] for n in names], 2 * ranks)
                of_slot[slot] = whole.chunk(ranks)[place].clone()
            pads.append(pad if place == ranks - 1 else 0)
            keep = len(of_slot["fp32"]) - pads[-1]
            parts.append(of_slot.pop("fp32") if kind == "bf16" else of_slot.pop("fp32")[:keep])
            states.append({"step": torch.tensor(7.0)} | ({s: t[:keep] for s, t in of_slot.items()} if kind == "elastic" else of_slot))
        groups = [{"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1, "params": [i]} for i in range(2)]
        groups[1] |= {"moe": True, "name": "ep_size_2"}
        base = states if kind == "elastic" else {"state": dict(enumerate(states)), "param_groups": groups}
        content = {
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": parts,
            "group_paddings": pads,
            "partition_count": [4, 2],
        }
        content |= {} if kind == "bf16" else {"zero_stage": 2}
        name = f"{'bf16_' if kind == 'bf16' else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content, "ds_version": "0.19.8"}, tag / name)
    return tag


def write_fp16(folder: Path, weights: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> Path:
    """fp16 without ZeRO: a flat tensor for each group, a file for each expert-parallel rank."""
    tag = write_by_hand(folder, {n: t.half() for n, t in weights.items()})
    dense, of_rank = in_model_order(weights)
    for rank in range(EP):
        states, parts = {}, []
        for i, names in enumerate((dense, of_rank[rank])):
            parts.append(torch.cat([weights[n].flatten() for n in names]))
            states[i] = {s: torch.cat([moments[n][s].flatten() for n in names]) for s in ("exp_avg", "exp_avg_sq")}
        groups = [{"lr": 0.02, "step": 7, "params": [0]}, {"lr": 0.02, "step": 7, "params": [1], "moe": True, "name": "ep_size_2"}]
        content = {
            "optimizer_state_dict": {"state": states, "param_groups": groups},
            "fp32_groups_flat": parts,
            "cur_scale": 64.0,
            "cur_iter": 7,
        }
        torch.save({"optimizer": content}, tag / f"expp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


def write_flat(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Path]:
    weights = other_weights()
    moments = some_moments(weights)
    tag = write_fp16(folder, weights, moments) if kind == "fp16" else write_zero(folder, kind, weights, moments)
    return weights, moments, tag


def _flat_imported(folder: Path, ep_size: int, stage: int):
    engine = build(ep_size, stage)
    found = import_checkpoint(engine, folder)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    return weights_of(engine), moments_of(engine), rates, found.left


@pytest.mark.parametrize("kind", ["zero", "elastic", "bf16", "fp16"])
@pytest.mark.parametrize(("world", "ep_size", "stage"), [(1, 1, 0), (4, 2, 3)])
def test_flat_moments_find_their_parameters(tmp_path, kind, world, ep_size, stage):
    """Weights are those that the optimizer has in fp32, not the rounded ones; so is every moment of every expert in its place."""
    weights, moments, _ = write_flat(tmp_path, kind)
    for found, states, rates, left in run_distributed(_flat_imported, world, tmp_path, ep_size, stage):
        assert all(torch.equal(found[n], weights[n]) for n in weights)
        for slot in ("exp_avg", "exp_avg_sq"):
            for module, experts in MODULES.items():
                for n in ("0.weight", "0.bias", "2.weight", "2.bias"):
                    stack = states[f"{slot}/{module}.core.experts.stack.{n}"]
                    for e in range(experts):
                        assert torch.equal(stack[e], moments[f"{module}.deepspeed_moe.experts.deepspeed_experts.{e}.{n}"][slot])
                gate = states[f"{slot}/{module}.core.gate.weight"]
                assert torch.equal(gate, moments[f"{module}.deepspeed_moe.gate.wg.weight"][slot])
            assert torch.equal(states[f"{slot}/last.weight"], moments["last.weight"][slot])
        assert {float(t) for n, t in states.items() if n.startswith("step/")} == {7.0}
        assert rates == ([0.01, 0.01] if kind == "elastic" else [0.02, 0.02])  # elastic files do not say it
        assert left == (["loss scale 64: this run has none"] if kind == "fp16" else [])


FLAT_DAMAGES = {
    "a data rank is missing": ("zero", lambda t: (t / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink(),
                               "saved by 4 data ranks, no optimizer file of rank 2"),
    "another order": ("zero", lambda t: rewrite(t / MODEL, lambda c: c["param_shapes"][0].move_to_end("first.weight")),
                      "the optimizer's own copy of the weights is not that of the model's file"),
    "experts of another rank": ("fp16", lambda t: _swap(t / "expp_rank_0_mp_rank_00_optim_states.pt", t / "expp_rank_1_mp_rank_00_optim_states.pt"),
                                "the optimizer's own copy of the weights is not that of the model's file"),
    "a file of another step": ("bf16", lambda t: rewrite(t / MODEL, lambda c: c["module"]["last.weight"].mul_(1.5)),
                               "last.weight: the optimizer's own copy"),
    "an expert-parallel rank is missing": ("fp16", lambda t: (t / "expp_rank_0_mp_rank_00_optim_states.pt").unlink(),
                                           r"optimizer files of expert-parallel ranks \[1\], some are missing"),
}  # fmt: skip


def _swap(a: Path, b: Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def _flat_refused(folder: Path) -> tuple[str, bool]:
    engine = build(2, 2)
    before = weights_of(engine)
    try:
        import_checkpoint(engine, folder)
    except CheckpointError as error:
        return str(error), all(torch.equal(before[n], t) for n, t in weights_of(engine).items())
    return "", False


@pytest.mark.fault
@pytest.mark.parametrize("damage", FLAT_DAMAGES)
def test_flat_files_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path, damage):
    kind, apply, message = FLAT_DAMAGES[damage]
    apply(write_flat(tmp_path, kind)[2])
    for said, is_untouched in run_distributed(_flat_refused, 2, tmp_path):
        assert re.search(message, said), said
        assert is_untouched


# ---------------------------------------------------------------- DeepSpeed itself


def deepspeed_run(folder: Path, ranks: int, **job: Any) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")
    folder.mkdir(exist_ok=True)
    job = {"out": str(folder), "ep_size": 1, "stage": 0, "half": None, "steps": 2, "more": 2, "load": None} | job
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("real_deepspeed.py")
    meet = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        str(folder / "store"),
        "--rdzv-conf",
        "store_type=file",
        "--local-addr",
        "127.0.0.1",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node", str(ranks), str(script)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [*command, str(folder / "job.json")], capture_output=True, text=True, timeout=250, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank_{r}.pt", weights_only=True) for r in range(ranks)]


def _taken_over(folder: Path, ep_size: int, stage: int, options: dict[str, Any]):
    engine = build(ep_size, stage, options={"lr": 0.5})
    found = import_checkpoint(engine, folder / "checkpoint", **options)
    weights = weights_of(engine)
    return weights, small_moe.train(engine, 2, 4, engine.global_rank), weights_of(engine), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "ep_size", "stage", "half"),
    [(1, 1, 0, None), (2, 2, 0, None), (4, 2, 1, None), (4, 2, 2, None), (2, 2, 2, "bf16"), (2, 2, 0, "bf16")],  # fp16: none on CPUs
)
def test_a_checkpoint_that_deepspeed_has_written_goes_on_here(tmp_path, ranks, ep_size, stage, half):
    theirs = deepspeed_run(tmp_path, ranks, ep_size=ep_size, stage=stage, half=half)
    for rank, (weights, losses, after, found) in enumerate(run_distributed(_taken_over, ranks, tmp_path, ep_size, 3, {})):
        assert found.client_state == {"note": "mine", "seen": [1, 2.5]}
        for name, tensor in theirs[rank]["weights"].items():  # of half precision the files have the exact ones beside
            assert torch.equal(weights[name].to(tensor.dtype), tensor), name
        assert losses == pytest.approx(theirs[rank]["more"], rel=1e-4 if half is None else 3e-2)
        if half is None:
            for name, tensor in theirs[rank]["after"].items():
                torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 2)])
def test_deepspeed_goes_on_from_a_checkpoint_of_ours(tmp_path, ranks, ep_size):
    pytest.importorskip("deepspeed.moe.sharded_moe", reason="deepspeed is not installed")
    ours = run_distributed(_trained_and_exported, ranks, tmp_path / "ours", ep_size, 2)
    # it loads before its first step and trains the steps 0 and 1 of the data: so do we
    theirs = deepspeed_run(tmp_path / "theirs", ranks, ep_size=ep_size, load=str(tmp_path / "ours"))
    again = run_distributed(_import_and_repeat, ranks, tmp_path / "ours", ep_size)
    for rank in range(ranks):
        assert theirs[rank]["losses"] == pytest.approx(again[rank][0], rel=1e-4)
        for name, tensor in theirs[rank]["weights"].items():
            torch.testing.assert_close(again[rank][1][name], tensor, rtol=1e-4, atol=1e-5)
    assert ours[0][2] != again[0][0]


def _import_and_repeat(folder: Path, ep_size: int):
    engine = build(ep_size, 1)
    import_checkpoint(engine, folder)
    losses = small_moe.train(engine, 0, 2, engine.global_rank)
    return losses, weights_of(engine)
