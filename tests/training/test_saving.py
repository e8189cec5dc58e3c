"""Runs that save: in the background, by the clock, and what is kept."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_pool import run_distributed
from torch.distributed.checkpoint import FileSystemWriter

from megatron_moe.checkpoint.files import (
    Best,
    CheckpointError,
    iteration_name,
    iterations_in,
    leftovers_in,
    read_best,
    read_manifest,
    run_directory,
)
from megatron_moe.checkpoint.find import find_checkpoint
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.checkpoint.ranks import Ranks
from megatron_moe.config.output import CheckpointConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.metrics.reader import read_records
from megatron_moe.metrics.tracker import Tracker
from megatron_moe.training import pretrain
from megatron_moe.training.saving import Saver
from megatron_moe.training.signals import Stopper
from training import runs

pytestmark = pytest.mark.distributed

BASE = "--mock-data --vocab-size 64 --eval-iters 0 --no-moe-alerts"


def events(save: Path, *names: str) -> list[tuple]:
    """(event, iteration), in the order in which they were written."""
    return [(r["event"], r["iteration"]) for r in read_records(save / "metrics.jsonl") if r["event"] in names]


def tensors_of(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    path = save / iteration_name(iteration)
    tensors = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in read_manifest(path).tensors.items()}
    load_tensors(path, tensors)
    return tensors


# ---------------------------------------------------------------- the same checkpoints

LAYOUTS = [
    (1, "--fp16 --initial-loss-scale 1024"),
    (2, "--bf16 --zero-stage 3 --moe-expert-parallel-size 2"),
    pytest.param(4, "--zero-stage 1 --tensor-model-parallel-size 2 --moe-expert-parallel-size 2", marks=pytest.mark.matrix),
    pytest.param(4, "--zero-stage 1 --pipeline-model-parallel-size 2 --micro-batch-size 1", marks=pytest.mark.matrix),
]


@pytest.mark.parametrize("ranks, layout", LAYOUTS)
def test_checkpoints_of_a_run_that_does_not_wait_are_those_of_one_that_does(tmp_path, ranks, layout):
    flags = f"{BASE} {layout} --train-iters 7 --save-interval 2"
    run_distributed(runs.train_here, ranks, f"{flags} --save {tmp_path}/waits")
    run_distributed(runs.train_here, ranks, f"{flags} --save {tmp_path}/goes-on --async-save")
    for iteration in (2, 4, 6, 7):
        waits, goes_on = (tensors_of(tmp_path / name, iteration) for name in ("waits", "goes-on"))
        assert waits.keys() == goes_on.keys()
        assert [name for name in waits if not torch.equal(waits[name], goes_on[name])] == [], f"iteration {iteration}"
        metas = [find_checkpoint(tmp_path / name, iteration).meta for name in ("waits", "goes-on")]
        assert metas[0]["progress"] == metas[1]["progress"] and metas[0].get("loss_scale") == metas[1].get("loss_scale")
    assert sorted(events(tmp_path / "goes-on", "save")) == [("save", 2), ("save", 4), ("save", 6), ("save", 7)]
    for record in (r for r in read_records(tmp_path / "goes-on" / "metrics.jsonl") if r["event"] == "save"):
        assert 0 < record["waited_seconds"] <= record["seconds"]


# ---------------------------------------------------------------- a disk that stands still


def _train_with_a_slow_disk(flags: str, goes_on_at: str) -> None:
    """The first checkpoint is written when step 7 begins, or when the saver waits for it: whoever waited before would never end."""
    go = threading.Event()
    write, step, wait = FileSystemWriter.write_data, pretrain.train_step, Saver._wait

    def write_data(writer, plan, planner):
        assert go.wait(60), "nobody has let the disk go on"
        return write(writer, plan, planner)

    def train_step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest):
        if goes_on_at == "step 7" and iteration == 6:
            go.set()
        return step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest)

    def waiting(saver, iteration):
        if saver._under_way is not None:
            assert not saver._under_way.is_over or go.is_set()
            threading.Timer(0.2, go.set).start()
        return wait(saver, iteration)

    with ExitStack() as patched:
        for where, name, what in (
            (FileSystemWriter, "write_data", write_data), (pretrain, "train_step", train_step), (Saver, "_wait", waiting),
        ):  # fmt: skip
            patched.enter_context(mock.patch.object(where, name, what))
        runs.train_here(flags)


def test_no_step_and_no_evaluation_waits_for_a_slow_disk(tmp_path):
    flags = f"{BASE} --train-iters 8 --save-interval 4 --async-save --eval-iters 1 --eval-interval 5 --save {tmp_path}/run"
    run_distributed(_train_with_a_slow_disk, 2, flags, "step 7")
    seen = events(tmp_path / "run", "train", "eval", "save", "alert")
    assert seen.index(("save", 4)) > seen.index(("train", 6)) > seen.index(("eval", 5)), seen
    assert iterations_in(tmp_path / "run") == [4, 8]


def test_save_that_comes_too_early_waits_for_the_one_before_and_says_so(tmp_path):
    run_distributed(
        _train_with_a_slow_disk, 2, f"{BASE} --train-iters 5 --save-interval 2 --async-save --save {tmp_path}/run", "the saver waits"
    )
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    (alert,) = (r for r in records if r["event"] == "alert")
    assert alert["iteration"] == 4 and alert["reason"].startswith("waited 0.") and "save less often" in alert["reason"], alert
    waited = {r["iteration"]: r["waited_seconds"] for r in records if r["event"] == "save"}
    assert waited.keys() == {2, 4, 5} and waited[4] > 0.1 > waited[2], waited


# ---------------------------------------------------------------- failures


def _train_with_a_full_disk(flags: str, failures: int) -> None:
    """The first so many saves find the disk full, on rank 1, when their checksums are made."""
    full = [OSError(28, "No space left on device")] * failures
    written = CheckpointManager._written

    def fail(manager, building):
        if full and dist.get_rank() == dist.get_world_size() - 1:
            raise full.pop()
        return written(manager, building)

    with mock.patch.object(CheckpointManager, "_written", fail):
        runs.train_here(flags)


@pytest.mark.fault
def test_save_that_fails_in_the_background_ends_the_run_or_is_an_alert(tmp_path):
    flags = f"{BASE} --train-iters 6 --save-interval 2 --async-save --save {tmp_path}/run"
    run_distributed(_train_with_a_full_disk, 2, f"{flags} --save-failure continue", 1)
    alerts = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "alert"]
    (alert,) = (r for r in alerts if not r["reason"].startswith("waited"))  # on a slow disk the next save has waited for this one
    assert "failed on rank 1: OSError: [Errno 28]" in alert["reason"] and alert["reason"].endswith("(--save-failure continue)"), alert
    assert events(tmp_path / "run", "save") == [("save", 4), ("save", 6)] and iterations_in(tmp_path / "run") == [4, 6]
    with pytest.raises(CheckpointError, match=r"checking iter_0000002 failed on rank 1: .*No space left"):
        run_distributed(_train_with_a_full_disk, 2, flags.replace("/run", "/stop"), 1)
    assert iterations_in(tmp_path / "stop") == [] and not leftovers_in(tmp_path / "stop")


@pytest.mark.fault
def test_failure_that_is_heard_of_at_the_end_does_not_keep_the_last_step_from_being_saved(tmp_path):
    flags = f"{BASE} --train-iters 3 --save-interval 2 --async-save --save {tmp_path}/run"
    run_distributed(_with_the_last_step_first, 1, flags)
    assert events(tmp_path / "run", "alert", "save") == [("alert", 3), ("save", 3)] and iterations_in(tmp_path / "run") == [3]


def _with_the_last_step_first(flags: str) -> None:
    """The save of step 2 fails only when the run has come to its end."""
    at_the_end, written = threading.Event(), CheckpointManager._written

    def fail(manager, building):
        if "iter_0000002" in building.name:
            assert at_the_end.wait(60)
            raise OSError(28, "No space left on device")
        return written(manager, building)

    settle = Saver.settle
    with (
        mock.patch.object(CheckpointManager, "_written", fail),
        mock.patch.object(Saver, "settle", lambda *args: (at_the_end.set(), settle(*args))),
    ):
        runs.train_here(flags)


# ---------------------------------------------------------------- when


def _saves_by_the_clock(directory: Path, minutes: list[list[float]]) -> list[int]:
    """Steps after which a save is due, by clocks that differ from rank to rank: minutes[rank][step]."""
    now = iter([0.0, *(60 * m for m in minutes[dist.get_rank()])])
    clock = [next(now)]
    config = CheckpointConfig(save=str(directory), save_interval=10, save_interval_minutes=1.5)
    saver = Saver(config, CheckpointManager(directory), Tracker(), Ranks(), lambda: clock[0])
    saver.manager.save = lambda *_, best: None
    stopper, due = Stopper(TrainingConfig(exit_signal_handler=False), dist.group.WORLD, saver.asks), []
    for iteration, clock[0] in enumerate(now, start=1):
        assert stopper.reason(iteration) is None
        if saver.after_step(iteration, stopper.answers):
            due.append(iteration)
            saver.save(iteration, {}, {})
    return due


def test_minutes_are_counted_by_rank_0_from_save_to_save_of_either_kind(tmp_path):
    slow, fast = [0.5 * step for step in range(1, 13)], [9.0 * step for step in range(1, 13)]
    due = run_distributed(_saves_by_the_clock, 2, tmp_path / "a", [slow, fast])
    assert due == [[3, 6, 9, 10]] * 2  # 1.5 minutes are three steps; the one of --save-interval starts the count anew
    assert run_distributed(_saves_by_the_clock, 2, tmp_path / "b", [fast, slow]) == [list(range(1, 13))] * 2


def _end_at_different_steps(directory: Path) -> list[int]:
    """Rank r is done with its part of a save after step 2 + r; the steps after which its end is heard of."""
    config = CheckpointConfig(save=str(directory), async_save=True)
    saver, heard = Saver(config, CheckpointManager(directory), Tracker(), Ranks()), []
    stopper = Stopper(TrainingConfig(exit_signal_handler=False), dist.group.WORLD, saver.asks)
    part = saver._under_way = SimpleNamespace(iteration=1, best=None, seconds=1.0, waited_seconds=0.0, is_over=False)
    for step in range(1, 6):
        part.is_over, part.conclude = step >= 2 + dist.get_rank(), lambda step=step: heard.append(step)
        assert stopper.reason(step) is None
        saver.after_step(step, stopper.answers)
    return heard


def test_end_of_a_save_is_heard_of_by_all_ranks_at_the_same_step(tmp_path):
    assert run_distributed(_end_at_different_steps, 2, tmp_path) == [[3], [3]]


def test_run_saves_by_minutes(tmp_path):
    run_distributed(runs.train_here, 2, f"{BASE} --train-iters 4 --save-interval-minutes 1e-9 --async-save --save {tmp_path}/run")
    assert iterations_in(tmp_path / "run") == [1, 2, 3, 4]


def test_keep_every_outlives_keep_last(tmp_path):
    flags = f"{BASE} --train-iters 9 --save-interval 1 --keep-last 2 --keep-every 3 --save {tmp_path}/run"
    run_distributed(runs.train_here, 1, flags)
    assert iterations_in(tmp_path / "run") == [3, 6, 8, 9]


# ---------------------------------------------------------------- the best one

LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: float("nan"), 12: 1.5}


def _train_with_losses(flags: str, full_at: int | None = None) -> None:
    """Validation losses are those of LOSSES, and differ a little from rank to rank. The save of `full_at` finds the disk full."""
    evaluate, written = pretrain.evaluate, CheckpointManager._written
    steps = []

    def evaluate_as_told(*args, **options):
        result = evaluate(*args, **options)
        return dataclasses.replace(result, lm_loss=LOSSES.get(len(steps), 9.0) + 0.6 * dist.get_rank())

    def train_step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest):
        steps[:] = range(iteration + 1)
        return step(model, optimizer, microbatches, mesh, rate, clip, seed, iteration, *rest)

    def fail(manager, building):
        if full_at and iteration_name(full_at) in building.name:
            raise OSError(28, "No space left on device")
        return written(manager, building)

    def after_step(saver, *args):
        if saver._under_way:
            saver._under_way._thread.join()  # heard of at once, on a slow machine too
        return after(saver, *args)

    step, after = pretrain.train_step, Saver.after_step
    if found := re.search(r"--load (\S+)", flags):
        steps[:] = range(find_checkpoint(found[1]).iteration)
    with ExitStack() as patched:
        for where, name, what in (
            (pretrain, "evaluate", evaluate_as_told), (pretrain, "train_step", train_step), (CheckpointManager, "_written", fail),
            (Saver, "after_step", after_step),
        ):  # fmt: skip
            patched.enter_context(mock.patch.object(where, name, what))
        runs.train_here(flags)


BEST = f"{BASE.replace('--eval-iters 0', '--eval-iters 1')} --eval-interval 2 --keep-last 1 --save-best"


@pytest.mark.parametrize("how", [pytest.param("", marks=pytest.mark.matrix), "--async-save"])
def test_best_checkpoint_is_saved_kept_and_remembered_by_a_run_that_goes_on(tmp_path, how):
    save = tmp_path / "run"
    flags = f"{BEST} {how} --train-iters 13 --lr-decay-iters 13 --save {save}"
    run_distributed(_train_with_losses, 2, f"{flags} --exit-interval 7")
    assert sorted(i for _, i in events(save, "save")) == [2, 4, 7]  # 6 is worse
    assert read_best(save) == Best(4, 2.0) and iterations_in(save) == [4, 7]
    run_distributed(_train_with_losses, 2, f"{flags} --load {save} --exit-interval 11")
    assert read_best(save) == Best(4, 2.0) and iterations_in(save) == [4, 11], "8 is as good, 10 is none"
    run_distributed(_train_with_losses, 2, f"{flags} --load {save}")
    assert read_best(save) == Best(12, 1.5) and iterations_in(save) == [12, 13]
    assert run_directory(save / "best", None) == (save, 12)
    tuned = f"{BASE} --train-iters 1 --lr-warmup-iters 0 --load {save}/best --finetune --save {tmp_path}/tuned"
    run_distributed(runs.train_here, 1, tuned)
    (load,) = (r for r in read_records(tmp_path / "tuned" / "metrics.jsonl") if r["event"] == "load")
    assert load["path"] == str(save / "iter_0000012")


@pytest.mark.fault
def test_best_one_that_was_not_saved_is_none(tmp_path):
    save = tmp_path / "run"
    run_distributed(_train_with_losses, 2, f"{BEST} --async-save --train-iters 7 --save-failure continue --save {save}", 4)
    assert read_best(save) == Best(6, 2.5), "the better one of step 4 is not there"
    assert iterations_in(save) == [6, 7]


def test_best_one_that_a_run_has_lost_is_forgotten(tmp_path):
    CheckpointManager(tmp_path).save(5, {"model.w": torch.zeros(1)}, {}, best=Best(5, 2.0))
    for gone, start, known in ((False, 5, Best(5, 2.0)), (False, 3, None), (True, 9, None)):
        if gone:
            shutil.rmtree(tmp_path / "iter_0000005")
        saver = Saver(CheckpointConfig(save=str(tmp_path), save_best=True), CheckpointManager(tmp_path), Tracker(), Ranks())
        saver.go_on_from(start)
        assert saver._best == known
        saver.evaluated(start, 2.5)
        assert saver.is_best == (known is None)


def test_nothing_is_deleted_where_the_note_of_the_best_is_damaged(tmp_path, caplog):
    saves = CheckpointManager(tmp_path, keep_last=1)
    saves.save(5, {"model.w": torch.zeros(1)}, {}, best=Best(5, 2.0))
    (tmp_path / "best_checkpoint.json").write_text("{")
    saves.save(6, {"model.w": torch.zeros(1)}, {})
    assert iterations_in(tmp_path) == [5, 6] and "nothing is deleted" in caplog.text
