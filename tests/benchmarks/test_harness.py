"""What all benchmarks share: turns, statistics, tables, files, and the command that lists and runs them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from functools import partial

import pytest

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.harness import (
    Apart,
    Options,
    Report,
    System,
    Times,
    interleave,
    missing,
    paired_ratio,
    spread,
    table,
    timing_table,
    write_report,
)


def test_quartiles_and_median_of_a_few_values():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (1.0, 2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0, 7.0)


def test_ratios_are_of_the_same_round_and_not_of_the_medians():
    samples = {"ours": [Times(0, 1), Times(0, 2), Times(0, 30)], "theirs": [Times(0, 2), Times(0, 3), Times(0, 40)]}
    ratio = paired_ratio(samples, "ours", "theirs")
    assert ratio.median == pytest.approx(2 / 3)
    assert (ratio.low, ratio.high) == (pytest.approx((1 / 2 + 2 / 3) / 2), pytest.approx((2 / 3 + 3 / 4) / 2))


def test_ratios_are_taken_by_the_clock_that_is_asked_for():
    samples = {"a": [Times(8, 1)], "b": [Times(2, 1)]}
    assert paired_ratio(samples, "a", "b").median == 1 and paired_ratio(samples, "a", "b", "wall").median == 4


def test_systems_take_turns_and_each_round_begins_with_another():
    turns = []
    samples = interleave([System(n, lambda n=n: turns.append(n)) for n in "abc"], rounds=4, warmups=1)
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


@contextlib.contextmanager
def sleeping():
    yield lambda: time.sleep(0.2) or 0.0


def test_cpu_time_leaves_out_waiting_and_counts_work():
    sleeper = Apart("asleep", sleeping)  # this process may hold threads of other tests, and their work counts
    asleep = sleeper.turn()
    sleeper.close()
    assert asleep.wall >= 0.2 and asleep.cpu < 0.1

    def work():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    assert harness.timed(work).cpu >= 0.1


def test_two_systems_of_one_name_are_our_mistake():
    with pytest.raises(AssertionError, match="names must differ"):
        interleave([System("a", int), System("a", int)], 1)


def test_tables_are_aligned_and_fastest_first():
    assert table(["name", "x"], [["a", "100"], ["long name", "1"]]).splitlines() == [
        "name         x", "---------  ---", "a          100", "long name    1",
    ]  # fmt: skip
    lines = timing_table({"slow": [Times(2, 2)], "fast": [Times(1, 1)]}, "slow", {"note": str.upper}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["fast", "slow"] and lines[2].endswith("FAST") and "0.50 (0.50-0.50)" in lines[2]


def test_the_file_holds_every_sample_and_says_where_it_was_measured(tmp_path):
    report = Report("step", {"size": 4}, {"peer": "not installed"}, {"fp32": {"ours": [Times(1.5, 2.5)]}}, {"figure": 1})
    path = write_report(report, tmp_path / "new")
    assert re.fullmatch(r"step-\d{4}-\d\d-\d\d-\d{6}-[a-z0-9-]+-cores\.json", path.name)
    found = json.loads(path.read_text())
    assert set(found) == {
        "benchmark", "date", "seconds", "machine", "versions", "parameters", "skipped", "figures", "samples",
    }  # fmt: skip
    assert set(found["machine"]) == {"cpu", "cores", "system", "load_at_start", "load_at_end"}
    assert found["samples"] == {"fp32": {"ours": {"wall": [1.5], "cpu": [2.5]}}}
    assert found["skipped"] == {"peer": "not installed"} and found["figures"] == {"figure": 1} and "torch" in found["versions"]


def test_a_peer_that_is_not_there_is_named_with_what_to_do():
    reasons = missing({"json": "there", "no_such_package": "a peer"})
    assert list(reasons) == ["no_such_package"] and "pip install no_such_package" in reasons["no_such_package"]


def test_quick_is_one_round_unless_a_number_is_given():
    assert [Options().rounds_or(7), Options(quick=True).rounds_or(7), Options(quick=True, rounds=3).rounds_or(7)] == [7, 1, 3]


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_list_has_every_benchmark_and_its_peers(words, capsys):
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S", out, re.MULTILINE) for name in ("preprocess", "step", "dialects"))
    assert "transformers" in out


def test_mistakes_are_answered_with_what_there_is(capsys, tmp_path):
    assert command.main(["stepp"]) == 2
    assert "use one of preprocess, data_reading, step, dialects" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        command.main(["step", "--out", str(tmp_path / "file"), "--rounds", "0"])
    assert caught.value.code == 2 and "--rounds must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["step", "--out", str(tmp_path / "file")])
    assert "is a file; name a folder" in capsys.readouterr().err


@contextlib.contextmanager
def counting(first):
    """A system that says how often it was called, beginning with `first`, and in which process."""
    turns = itertools.count(first)
    yield lambda: next(turns) + os.getpid() / 1e9


def broken():
    raise ValueError("no such thing")


def test_a_system_of_its_own_process_keeps_its_state_and_is_timed_there():
    system = Apart("apart", partial(counting, 5))
    try:
        first = system.run()
        samples = interleave([system, System("here", lambda: time.sleep(0.01))], rounds=2, warmups=0)
        assert int(first) == 5 and int(system.run()) == 8
        assert round((first - 5) * 1e9) != os.getpid()
        assert len(samples["apart"]) == 2 and samples["apart"][0].wall < 0.01 <= samples["here"][0].wall
    finally:
        system.close()


@contextlib.contextmanager
def rank_and_world(wait):
    """Says which rank it is; `wait` seconds later on rank 1, and ends rank 1 when asked to."""
    rank = int(os.environ["RANK"])

    def turn(ends=False):
        time.sleep(wait * rank)
        if ends and rank:
            os._exit(3)
        time.sleep(60 * ends)
        return rank, os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]

    yield turn


def test_a_system_of_several_ranks_takes_as_long_as_its_slowest():
    system = Apart("ranks", partial(rank_and_world, 0.1), ranks=2)
    try:
        (zero, size, port), (one, *same) = system.results()
        assert (zero, one, size) == (0, 1, "2") and same == [size, port]
        assert 0.1 <= system.turn().wall < 10
        with pytest.raises(RuntimeError, match="ranks ended with code 3"):
            system.results(True)  # rank 0 is not waited for
    finally:
        system.close()


def test_a_system_that_cannot_be_built_is_named():
    system = Apart("apart", broken)
    with pytest.raises(RuntimeError, match="apart ended with code 1"):
        system.run()
    system.close()
