"""A rank that dies, stops, hangs or raises: the others end in time and say which rank, in which iteration, in which collective."""

from __future__ import annotations

import os
import re
import threading
import time

import pytest
import torch.distributed as dist

from megatron_moe.training import last_words
from megatron_moe.training.last_words import LastWords
from training import launches

pytestmark = pytest.mark.fault

# ---------------------------------------------------------------- the digest by itself


class Rank:
    """LastWords of one rank in a thread, as if it were a process."""

    def __init__(self, rank: int, size: int, store: dist.Store):
        self.over, self.ready = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._live, args=(rank, size, store), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    def _live(self, rank: int, size: int, store: dist.Store) -> None:
        self.words = LastWords(rank, size, store)
        self.words.iteration = 10 + rank
        self.ready.set()
        self.over.wait()

    def close(self) -> None:
        self.words.close()
        self.over.set()


@pytest.fixture
def ranks():
    started: list[Rank] = []

    def start(size: int, present=None):
        store = dist.HashStore()
        started.extend(Rank(rank, size, store) for rank in (range(size) if present is None else present))
        return [r.words for r in started]

    yield start
    for rank in started:
        rank.close()


def test_a_rank_that_leaves_no_word_is_named_first(ranks):
    zero, two = ranks(3, present=(0, 2))
    text = zero.digest(RuntimeError("Connection closed by peer"), is_cause=False).splitlines()
    assert text[1].startswith("  rank 1: has left no word")
    assert text[2].startswith("  rank 0: iteration 10") and text[3].startswith("  rank 2: iteration 12")
    assert text[-1] == "  look for rank 1 first"
    assert two.digest(RuntimeError("lost"), is_cause=False) == "what each rank was doing stands in the message of rank 0"


def test_a_rank_that_raised_stands_before_those_that_lost_it(ranks):
    *_, last = ranks(4)
    text = last.digest(OSError(5, "Input/output error")).splitlines()
    assert text[1].startswith("  rank 3: iteration 13, raised OSError: [Errno 5] Input/output error")
    assert len(text) == 5 and "look for" not in text[-1]


def test_an_alarm_for_a_slow_step_leaves_room_for_another_one(ranks, monkeypatch):
    monkeypatch.setattr(last_words, "SAME_ALARM_SECONDS", 0.0)
    zero, one = ranks(2)
    assert "rank 1: iteration 11" in zero.digest()
    one.iteration = 99
    time.sleep(2 * last_words.LOOK_SECONDS)
    assert "rank 1: iteration 99, raised ValueError: later" in one.digest(ValueError("later"))


def test_words_of_a_thousand_ranks_fit_on_a_screen(ranks, monkeypatch):
    monkeypatch.setattr(last_words, "GRACE_SECONDS", 0.5)
    (zero,) = ranks(1000, present=(0,))
    assert len(zero.digest(RuntimeError("lost"), is_cause=False).splitlines()) < 25


class SilentStore(dist.Store):
    """On a rank that is stopped."""

    def compare_set(self, *args):
        time.sleep(20)
        raise dist.DistStoreError("no answer")

    def check(self, *args):
        return False


def test_a_store_that_does_not_answer_keeps_nobody(monkeypatch):
    monkeypatch.setattr(last_words, "GRACE_SECONDS", 0.2)
    words = LastWords(1, 2, SilentStore())
    started = time.monotonic()
    assert "does not answer: rank 0" in words.digest(RuntimeError("lost"), is_cause=False)
    assert time.monotonic() - started < 5
    words.close()


def test_one_process_and_ranks_that_met_in_a_file_have_no_store(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert last_words.open_store(1) is None and last_words.open_store(2) is None
    assert LastWords(0, 1, None).digest(ValueError("x")) == ""


# ---------------------------------------------------------------- real runs

TIMEOUT = "--distributed-timeout-minutes 0.1"


def faulty(fault: str, scratch, flags: str = "", ranks: int = 2):
    return launches.start(
        f"{launches.TINY} --train-iters 100 --save {scratch}/run {flags}",
        ranks=ranks,
        scratch=scratch,
        program=launches.FAULTY,
        FAULT=fault,
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds worker processes through /proc")
def test_when_a_rank_is_stopped_the_others_end_within_the_timeout_and_name_it(tmp_path):
    process = faulty("stopped", tmp_path, TIMEOUT)
    try:
        launches.wait_until(lambda: "no step has ended" in launches.output(tmp_path), "the alarm", process, tmp_path)
        started = time.monotonic()
        launches.wait_until(lambda: "is not waited for" in launches.output(tmp_path) or "longer than --distributed-timeout" in launches.output(tmp_path),
                            "the end of rank 0", process, tmp_path, seconds=30)  # fmt: skip
        assert time.monotonic() - started < 15
        text = launches.output(tmp_path)
    finally:
        launches.clear(process)
    assert "rank 1: has left no word: it was killed, is stopped" in text, text
    assert re.search(r"rank 0: iteration 4, waits in \w+ \(number \d+ of group", text), text
    assert "look for rank 1 first" in text


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds worker processes through /proc")
def test_when_a_rank_is_killed_the_others_say_so_at_once(tmp_path):
    process = faulty("killed", tmp_path)
    try:
        started = time.monotonic()
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 1 and time.monotonic() - started < 60, text
    assert "rank 0 lost the connection to another rank" in text, text
    assert "rank 1: has left no word" in text and re.search(r"rank 0: iteration 4, waits in \w+ \(number", text), text


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="finds worker processes through /proc")
def test_a_rank_that_raises_is_named_with_what_it_raised(tmp_path):
    process = faulty("raises", tmp_path)
    try:
        code, text = launches.end(process, tmp_path)
    finally:
        launches.clear(process)
    assert code == 1, text
    assert "rank 1: iteration 4, raised OSError: [Errno 5] Input/output error: '/data/shard_7.bin'; at faulty_run.py" in text, text
