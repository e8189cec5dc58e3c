"""A run that is told to stop finishes its step, saves, and says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_moe.checkpoint.files import iterations_in, leftovers_in
from training import launches

ENDLESS = f"{launches.TINY} --train-iters 100000"


def run_to_its_end(flags: str, scratch) -> tuple[int, str]:
    process = launches.start(f"{flags} --save {scratch}/run", scratch=scratch)
    try:
        return launches.end(process, scratch)
    finally:
        launches.clear(process)


def assert_stopped(save, reason: str) -> dict:
    """The last record says why, the marker too, and the last step is saved. Returns the marker."""
    marker, stop = json.loads((save / "exit.json").read_text()), launches.records(save)[-1]
    assert (stop["event"], stop["reason"], stop["iteration"]) == ("stop", reason, marker["iteration"])
    assert (marker["reason"], marker["is_done"]) == (reason, reason == "done")
    assert marker["checkpoint"] == f"iter_{stop['iteration']:07d}"
    assert (save / marker["checkpoint"] / "manifest.json").exists()
    assert stop["iteration"] == max(r["iteration"] for r in launches.records(save, "train"))
    return marker


def test_sigterm_in_the_middle_of_a_save_waits_for_it_and_a_second_job_is_kept_out(tmp_path):
    save, reached, second = tmp_path / "run", tmp_path / "reached0", tmp_path / "second"
    second.mkdir()
    process = launches.start(
        f"{ENDLESS} --save {save} --save-interval 1",
        scratch=tmp_path, program=launches.FAULTY, FAULT="slow save", REACHED=f"{tmp_path}/reached",
    )  # fmt: skip
    try:
        launches.wait_until(lambda: launches.records(save, "save"), "the first checkpoint", process, tmp_path)
        code, text = launches.end(launches.start(f"{ENDLESS} --save {save} --load {save}", scratch=second), second)
        assert code == 1 and f"--save {save} is in use by host" in text and f"pid {process.pid}; wait" in text, text
        reached.unlink()
        launches.wait_until(reached.exists, "a save", process, tmp_path)
        process.send_signal(signal.SIGTERM)
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 0, text
    assert "SIGTERM: stopping after this step" in text
    marker = assert_stopped(save, "signal SIGTERM")
    assert iterations_in(save) == list(range(1, marker["iteration"] + 1))


def test_sigterm_while_a_save_is_under_way_in_the_background_finishes_it_and_saves_the_last_step(tmp_path):
    save, reached = tmp_path / "run", tmp_path / "reached0"
    process = launches.start(
        f"{ENDLESS} --save {save} --save-interval 3 --async-save",
        scratch=tmp_path, program=launches.FAULTY, FAULT="slow background save", REACHED=f"{tmp_path}/reached",
    )  # fmt: skip
    try:
        launches.wait_until(reached.exists, "a save", process, tmp_path)
        process.send_signal(signal.SIGTERM)
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 0, text
    marker = assert_stopped(save, "signal SIGTERM")
    last = marker["iteration"]
    assert iterations_in(save) == sorted({*range(3, last + 1, 3), last}) and not leftovers_in(save)
    assert [r["iteration"] for r in launches.records(save, "save")] == iterations_in(save)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds worker processes through /proc")
def test_sigterm_to_all_processes_of_a_torchrun_stops_an_evaluation_and_saves(tmp_path):
    """As a cluster does it: the launcher, the ranks and their data workers all get the signal, and the ranks get the launcher's too."""
    save = tmp_path / "run"
    process = launches.start(
        f"{ENDLESS} --save {save} --num-workers 1 --moe-expert-parallel-size 2",
        ranks=2, scratch=tmp_path, program=launches.FAULTY, FAULT="endless evaluation", REACHED=f"{tmp_path}/reached",
    )  # fmt: skip
    try:
        launches.wait_until(lambda: len([*tmp_path.glob("reached?")]) == 2, "the evaluation", process, tmp_path)
        ranks = launches.workers_of(process)
        data_workers = [pid for rank in ranks for pid in launches.children_of(rank)]
        assert len(data_workers) >= 2
        for pid in (*data_workers, *ranks, process.pid):
            os.kill(pid, signal.SIGTERM)
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 1, text  # torchrun says so of every signal: hence the marker
    assert_stopped(save, "signal SIGTERM")
    assert "[rank" not in text, text  # no rank has raised


def test_marker_of_the_end_is_there_after_it_and_gone_while_the_run_goes_on(tmp_path):
    save = tmp_path / "run"
    code, text = run_to_its_end(f"{launches.TINY} --train-iters 2", tmp_path)
    assert code == 0, text
    assert_stopped(save, "done")
    process = launches.start(f"{ENDLESS} --save {save} --load {save}", scratch=tmp_path)
    try:
        launches.wait_until(lambda: len(launches.records(save, "start")) == 2, "the second run", process, tmp_path)
        assert not (save / "exit.json").exists()
    finally:
        launches.clear(process)
    assert not (save / "exit.json").exists()


def test_time_limit_saves_and_exits(tmp_path):
    code, text = run_to_its_end(f"{ENDLESS} --exit-duration-in-mins 0.01", tmp_path)
    assert code == 0, text
    assert_stopped(tmp_path / "run", "--exit-duration-in-mins 0.01 is over")


def test_run_directory_holds_the_resolved_configuration(tmp_path):
    code, text = run_to_its_end("--preset tiny --mock-data --train-iters 1000 --eval-iters 0 --exit-interval 1", tmp_path)
    assert code == 0, text
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["config"]["moe"]["num_experts"] == [4, 8]
    assert "--exit-interval" in content["command"]
    assert {"megatron_moe", "torch"} <= content["versions"].keys()


def test_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    # a learning rate that no model survives
    code, text = run_to_its_end(f"{ENDLESS} --lr 1e30 --min-lr 0 --lr-decay-style constant --clip-grad 0", tmp_path)
    assert code != 0
    assert "FloatingPointError" in text, text
    assert not iterations_in(tmp_path / "run") and not (tmp_path / "run" / "exit.json").exists()


# ---------------------------------------------------------------- signals by themselves

WAITING = """
import sys, tempfile
from datetime import timedelta
import torch.distributed as dist
from megatron_moe.config.training import TrainingConfig
from megatron_moe.training.signals import Stopper

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
stopper = Stopper(TrainingConfig(exit_signal_handler=sys.argv[1] == "on"), dist.group.WORLD)
stopper.SAME_SIGNAL_SECONDS = 0.5
assert stopper.agreed() is None
print("ready", flush=True)
if sys.argv[2] == "step":
    sys.stdin.readline()
    print(stopper.agreed(), flush=True)
    stopper.close()
    print("closed", flush=True)
dist.FileStore(tempfile.mktemp(), 1).wait(["never"], timedelta(seconds=100))  # not a line of Python runs in the main thread
"""


@pytest.fixture
def waiting(tmp_path):
    started = []

    def start(handler: str, where: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(launches.ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, handler, where],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_first_signal_waits_for_the_step_and_one_that_arrives_twice_is_one(waiting):
    """Ctrl-C under torchrun comes from the terminal and again from the launcher."""
    process = waiting("on", "step")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: stopping")  # heard, in a thread of its own: not before it is there
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "signal SIGINT\n"
    assert process.stdout.readline() == "closed\n"
    process.send_signal(signal.SIGTERM)  # after the end of training a signal is what it always is
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_second_signal_ends_the_process_even_when_it_hangs_in_a_collective(waiting):
    process = waiting("on", "hang")
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_without_the_handler_the_first_signal_ends_the_process(waiting):
    process = waiting("off", "hang")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_kill_switch_file_saves_and_exits_and_must_be_gone_to_start(tmp_path):
    save, switch, second = tmp_path / "run", tmp_path / "stop", tmp_path / "second"
    second.mkdir()
    process = launches.start(f"{ENDLESS} --save {save} --kill-switch-file {switch}", scratch=tmp_path)
    try:
        launches.wait_until(lambda: len(launches.records(save, "train")) >= 2, "two steps", process, tmp_path)
        switch.touch()
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 0, text
    assert_stopped(save, f"--kill-switch-file {switch} is there")
    code, text = run_to_its_end(f"{ENDLESS} --kill-switch-file {switch}", second)
    assert code == 2 and f"--kill-switch-file {switch} is there already" in text
    assert not (second / "run").exists()
