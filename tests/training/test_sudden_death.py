"""Killed again and again, a run under torchrun ends as if nothing had happened; a rank that fails or hangs ends the run."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.files import iteration_name, iterations_in, leftovers_in, read_manifest
from megatron_moe.checkpoint.load import load_tensors
from training import launches

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds worker processes through /proc"),
]

KILLS = 20
ITERATIONS = 70
RUN = f"{launches.TINY} --moe-expert-parallel-size 2 --train-iters {ITERATIONS} --eval-interval 9 --save-interval 2 --keep-last 3"


def last_checkpoint(save: Path) -> dict[str, torch.Tensor]:
    path = save / iteration_name(ITERATIONS)
    entries = read_manifest(path).tensors
    tensors = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in entries.items()}
    load_tensors(path, tensors)
    return tensors


def measured(save: Path, event: str) -> dict[tuple, set[str]]:
    """(iteration, split) -> all that was logged for it, without the times of this machine."""
    found: dict[tuple, set[str]] = {}
    for r in launches.records(save, event):
        values = {key: r.get(key) for key in ("consumed_samples", "learning_rate", "lm_loss", "grad_norm", "moe", "tokens")}
        found.setdefault((r["iteration"], r.get("split")), set()).add(json.dumps(values))
    return found


class Killer:
    """Kills ranks of a run under torchrun, each time after a few steps, at a moment that the seed decides."""

    def __init__(self, process, save: Path, scratch: Path, seed: int):
        self.process, self.save, self.scratch = process, save, scratch
        self.chance = random.Random(seed)
        self.moments: list[str] = []
        self.dead: set[int] = set()
        self.promises: list[tuple[int, int]] = []  # (loads before the kill, newest checkpoint that was committed then)

    def strike(self) -> None:
        self._wait(lambda: len(self._ranks()) == 2 and not set(self._ranks()) & self.dead, "both ranks")
        steps, moment = self._steps(), self.chance.choice(["starting", "training", "training", "saving", "saving"])
        if moment == "starting":
            over = time.monotonic() + self.chance.uniform(0, 8)
            self._wait(lambda: time.monotonic() > over or self._steps() > steps, "a moment before the first step")
        else:
            iterations = [r["iteration"] for r in launches.records(self.save, "train")]
            has_time = max(iterations, default=0) < ITERATIONS // 2  # on a fast machine, too, the run must outlive the kills
            wanted = steps + (self.chance.randint(1, 4) if has_time else 1)
            self._wait(lambda: self._steps() >= wanted, f"step {wanted - steps} of this life")
            if moment == "training":
                time.sleep(self.chance.uniform(0, launches.records(self.save, "train")[-1]["iteration_time_ms"] / 1000))
            else:
                self._wait(lambda: leftovers_in(self.save), "the next save")
                time.sleep(self.chance.uniform(0, 0.05))
        ranks = self._ranks()
        for pid in self.chance.choice([ranks[:1], ranks[1:], ranks]):
            launches.kill(pid)
        self.dead |= set(ranks)  # torchrun ends the other one
        self.promises.append((len(launches.records(self.save, "load")), max(iterations_in(self.save), default=0)))
        self.moments.append(moment)
        print(f"killed while {moment}; steps {self._steps()}, committed {self.promises[-1]}")

    def _ranks(self) -> list[int]:
        return launches.workers_of(self.process)

    def _steps(self) -> int:
        return len(launches.records(self.save, "train"))

    def _wait(self, condition, what: str) -> None:
        launches.wait_until(condition, f"{what}, after {len(self.moments)} kills", self.process, self.scratch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.matrix
def test_twenty_kills_lose_nothing_and_leave_the_curve_of_the_undisturbed_run(tmp_path):
    """The run that is killed saves in the background; the undisturbed one waits for its saves."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for scratch in (calm, killed):
        scratch.mkdir()
    process = launches.start(f"{RUN} --save {calm}/run --load {calm}/run", ranks=2, scratch=calm)
    try:
        code, text = launches.end(process, calm)
    finally:
        launches.clear(process)
    assert code == 0, text
    process = launches.start(
        f"{RUN} --save {killed}/run --load {killed}/run --async-save", ranks=2, scratch=killed, torchrun=f"--max-restarts {KILLS + 2}"
    )
    try:
        killer = Killer(process, killed / "run", killed, seed=0)
        for _ in range(KILLS):
            killer.strike()
        code, text = launches.end(process, killed)
    finally:
        launches.clear(process)
    assert code == 0, text

    for event in ("train", "eval"):
        straight = measured(calm / "run", event)
        disturbed = measured(killed / "run", event)
        assert straight.keys() <= disturbed.keys()
        for when, values in disturbed.items():  # more than one where a step was computed again: they must all be the same
            assert len(values) == 1, f"{event} {when} has not the same values every time"
            assert values == straight.get(when, values), f"{event} {when} is not that of the undisturbed run"
    assert {iteration for iteration, _ in measured(killed / "run", "train")} == set(range(1, ITERATIONS + 1))
    mine, theirs = last_checkpoint(killed / "run"), last_checkpoint(calm / "run")
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []

    check_history(launches.records(killed / "run"), killer)
    left = {entry.name for entry in (killed / "run").iterdir()} - {"lock", "config.json", "metrics.jsonl", "exit.json"}
    assert left == {entry.name for entry in (calm / "run").iterdir()} - {"lock", "config.json", "metrics.jsonl", "exit.json"}
    assert json.loads((killed / "run" / "exit.json").read_text())["is_done"]


def check_history(records: list[dict], killer: Killer) -> None:
    """No life of the run starts before the newest checkpoint of the lives before."""
    saved = at = 0
    for record in records:
        if record["event"] == "save":
            saved = max(saved, record["iteration"])
        if record["event"] == "start":
            at = 0
        if record["event"] == "load":
            at = record["iteration"]
            assert at >= saved, f"went back to {at}, though {saved} was saved"
        if record["event"] == "train":
            assert record["iteration"] == at + 1
            at += 1
    loads = [r["iteration"] for r in records if r["event"] == "load"]
    for count, committed in killer.promises:
        if committed:
            assert loads[count] >= committed, f"load {count} took {loads[count]}, though {committed} was committed"
    assert {"training", "saving", "starting"} == set(killer.moments)


# ---------------------------------------------------------------- one rank only


def end_of_faulty_run(fault: str, flags: str, scratch: Path) -> str:
    """Two ranks under torchrun, one with a fault: that they end, and not with success, is asserted; returns the output."""
    process = launches.start(
        f"{launches.TINY} --train-iters 100 --save {scratch}/run --save-interval 1 {flags}",
        ranks=2, scratch=scratch, program=launches.FAULTY, FAULT=fault, REACHED=f"{scratch}/reached",
    )  # fmt: skip
    try:
        code, text = launches.end(process, scratch)
    finally:
        launches.clear(process)
    assert code == 1, text
    assert not (scratch / "run" / "exit.json").exists()
    assert iterations_in(scratch / "run")[-1] == 3 and not leftovers_in(scratch / "run")
    return text


@pytest.mark.parametrize("fault, how", [("raises", ""), pytest.param("raises during a save", "--async-save", marks=pytest.mark.matrix)])
def test_exception_on_one_rank_ends_all_and_is_named_in_the_summary(tmp_path, fault, how):
    """What is saved in the background at that moment is finished before the rank leaves."""
    text = end_of_faulty_run(fault, how, tmp_path)
    summary = text[text.rindex("Root Cause") :]
    assert "rank      : 1" in summary and "OSError: [Errno 5] Input/output error: '/data/shard_7.bin'" in summary, text
    assert "rank 0 lost the connection to another rank" in text or "SIGTERM" in text, text


def test_rank_that_hangs_ends_the_run_within_the_timeout_and_shows_where_it_hangs(tmp_path):
    text = end_of_faulty_run("hangs", "--distributed-timeout-minutes 0.1", tmp_path)
    assert "rank 0 waited for another rank longer than --distributed-timeout-minutes 0.1" in text, text
    report = text[text.index("rank 1: no step has ended for 5.4 s") :]
    assert "in hanging" in report[:2000] and "rank 0: no step has ended for 5.4 s" in text, text
