"""A run that is told to stop finishes its step, saves, and says why."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_moe.metrics.reader import read_records

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "--preset tiny --mock-data --train-iters 100000 --log-interval 1 --eval-iters 0"


def start(save: Path, flags: str) -> subprocess.Popen:
    words = f"{COMMAND} --save {save} {flags}".split()
    return subprocess.Popen(
        [sys.executable, "pretrain_gpt_moe.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(save: Path, number: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = save / "metrics.jsonl"
        if path.exists() and sum('"train"' in line for line in path.read_text().splitlines()) >= number:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {number} steps in {seconds} s")


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    process = start(tmp_path / "run", "")
    try:
        wait_for_steps(tmp_path / "run", 2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    stop = read_records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "signal SIGTERM")
    assert (tmp_path / "run" / f"iter_{stop['iteration']:07d}" / "manifest.json").exists()


def test_time_limit_saves_and_exits(tmp_path):
    process = start(tmp_path / "run", "--exit-duration-in-mins 0.02")
    try:
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "--exit-duration-in-mins" in read_records(tmp_path / "run" / "metrics.jsonl")[-1]["reason"]


def test_run_directory_holds_the_resolved_configuration(tmp_path):
    process = start(tmp_path / "run", "--exit-interval 1")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["config"]["moe"]["num_experts"] == [4, 8]
    assert "--exit-interval" in content["command"]
    assert {"megatron_moe", "torch"} <= content["versions"].keys()


def test_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    # a learning rate that no model survives
    process = start(tmp_path / "run", "--lr 1e30 --min-lr 0 --lr-decay-style constant --clip-grad 0")
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "not finite" in err or "FloatingPointError" in err, err
    assert not list((tmp_path / "run").glob("iter_*"))


def test_signal_that_arrives_twice_is_one_and_a_later_one_ends_the_process(monkeypatch):
    """Ctrl-C under torchrun comes from the terminal and again from the launcher."""
    import os

    from megatron_moe.config.training import TrainingConfig
    from megatron_moe.training.signals import Stopper

    killed: list[int] = []
    stopper = Stopper(TrainingConfig(), None)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        stopper._remember(signal.SIGUSR1, None)
        stopper._remember(signal.SIGUSR1, None)
        assert killed == [] and stopper.received == signal.SIGUSR1
        stopper.received_at -= 10.0
        stopper._remember(signal.SIGUSR1, None)
        assert killed == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_kill_switch_file_saves_and_exits_and_must_be_gone_to_start(tmp_path):
    switch = tmp_path / "stop"
    process = start(tmp_path / "run", f"--kill-switch-file {switch}")
    try:
        wait_for_steps(tmp_path / "run", 2)
        switch.touch()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    stop = read_records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (stop["event"], stop["reason"]) == ("stop", f"--kill-switch-file {switch} is there")
    assert (tmp_path / "run" / f"iter_{stop['iteration']:07d}" / "manifest.json").exists()
    again = start(tmp_path / "other", f"--kill-switch-file {switch}")
    _, err = again.communicate(timeout=60)
    assert again.returncode == 2 and f"--kill-switch-file {switch} is there already" in err
    assert not (tmp_path / "other").exists()
