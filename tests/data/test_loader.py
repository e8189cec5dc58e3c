"""Which samples reach which rank, what stops a run before it starts, and data workers that obey."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megatron_moe.config.data import DataConfig
from megatron_moe.data import loader as loader_module
from megatron_moe.data.batch import make_batch
from megatron_moe.data.blended import BlendedDataset
from megatron_moe.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_moe.data.loader import build_datasets, build_loader, data_problems, highest_token
from megatron_moe.data.mock import MockDataset

COLLATE = functools.partial(make_batch, eod=0)


def write(prefix, documents, dtype="uint16", meta=None):
    with IndexedDatasetWriter(str(prefix), dtype, meta) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


@pytest.fixture
def corpus(tmp_path):
    """100 documents of 10 tokens; document d is ten times the token d."""
    return write(tmp_path / "corpus", [[d] * 10 for d in range(100)])


def sample_ids(**changes):
    arguments = {"first_sample": 0, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 2, "num_microbatches": 2,
                 "num_workers": 0, "collate": COLLATE, "num_steps": 2}  # fmt: skip
    return [batch.sample_ids.tolist() for batch in build_loader(MockDataset(9, 4, 1), **{**arguments, **changes})]


def test_ranks_take_turns_in_micro_batches():
    assert sample_ids() == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert sample_ids(data_parallel_rank=1) == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_are_the_same_under_every_data_parallel_size(size):
    ranks = [sample_ids(data_parallel_rank=r, data_parallel_size=size, num_microbatches=8 // size, num_steps=3) for r in range(size)]
    for step in range(3):
        here = slice(step * (8 // size), (step + 1) * (8 // size))
        together = sorted(batch for rank in ranks for batch in rank[here])
        assert together == [[16 * step + i, 16 * step + i + 1] for i in range(0, 16, 2)]


def test_resuming_goes_on_where_the_run_stopped():
    whole = sample_ids(num_steps=5)
    assert sample_ids(first_sample=3 * 8, num_steps=2) == whole[6:]


def test_reading_ahead_in_processes_changes_nothing():
    assert sample_ids(num_workers=2, num_steps=3) == sample_ids(num_steps=3)


def test_without_a_number_of_steps_there_is_no_end(corpus):
    dataset = build_datasets(DataConfig(data_path=(corpus,)), 16, 1, 100).train
    batches = build_loader(dataset, 10 * len(dataset), 1, 0, 1, 1, 0, COLLATE)
    assert [next(batches).sample_ids.item() - 10 * len(dataset) for _ in range(3)] == [0, 1, 2]


# ---------------------------------------------------------------- datasets from flags


def test_one_path_is_cut_by_split(corpus):
    train, valid, test = build_datasets(DataConfig(data_path=(corpus,), split="80,10,10"), 9, 1, 100)
    assert [len(d) for d in (train, valid, test)] == [88, 11, 11]
    assert {int(t) for i in range(11) for t in valid[i]["text"]} == set(range(80, 90))


def test_separate_paths_are_taken_whole(corpus, tmp_path):
    other = write(tmp_path / "other", [[7] * 50])
    data = DataConfig(train_data_path=(corpus,), valid_data_path=("1", other, "3", corpus))
    train, valid, test = build_datasets(data, 9, 1, 100)
    assert len(train) == 111 and test is None
    assert isinstance(valid, BlendedDataset) and valid.weights == [0.25, 0.75]


def test_blends_leave_out_what_has_no_weight_or_no_data(corpus, tmp_path, caplog):
    short = write(tmp_path / "short", [[7] * 100, [7]])  # the second document is a validation set of one token
    data = DataConfig(data_path=("0", str(tmp_path / "missing"), "1", corpus, "1", short), split="50,50")
    train, valid, test = build_datasets(data, 9, 1, 100)
    assert isinstance(train, BlendedDataset) and len(valid) == 55 and test is None
    assert "no valid data from" in caplog.text


def test_validation_does_not_depend_on_the_seed_of_the_run(corpus):
    data = DataConfig(data_path=(corpus,), split="50,50")
    a, b = (build_datasets(data, 9, seed, 100) for seed in (1, 2))
    assert [a.valid[i]["text"].tolist() for i in range(50)] == [b.valid[i]["text"].tolist() for i in range(50)]
    assert [a.train[i]["text"].tolist() for i in range(50)] != [b.train[i]["text"].tolist() for i in range(50)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mock_data_never_trains_on_the_validation_text(seed):
    train, valid, test = build_datasets(DataConfig(mock_data=True), 32, seed, 500)
    assert len({tuple(d[0]["text"].tolist()) for d in (train, valid, test)}) == 3


# ---------------------------------------------------------------- preflight


def test_nothing_wrong_with_good_data(corpus):
    assert data_problems(DataConfig(data_path=(corpus,)), 16, 100) == []
    assert data_problems(DataConfig(mock_data=True), 16, 100) == []


def test_all_problems_of_all_datasets_are_told_at_once(corpus, tmp_path):
    cut = write(tmp_path / "cut", [[1] * 50])
    os.truncate(cut + ".bin", 99)
    data = DataConfig(data_path=("1", corpus, "1", cut, "1", str(tmp_path / "missing")))
    problems = data_problems(data, 5000, 50)
    assert len(problems) == 4
    for part in (f"{cut}.bin", "missing.idx", "vocabulary larger than the model's: token id 99", "--seq-length + 1 = 5001"):
        assert any(part in problem for problem in problems), (part, problems)


def test_another_tokenizer_than_the_one_that_made_the_data(tmp_path):
    prefix = write(tmp_path / "x", [[1] * 50], meta={"fingerprint": "aaaa", "tokenizer_type": "HFTokenizer"})
    data = DataConfig(data_path=(prefix,), split="1")
    assert data_problems(data, 16, 100, fingerprint="aaaa") == [] == data_problems(data, 16, 100)
    (problem,) = data_problems(data, 16, 100, fingerprint="bbbb")
    assert "aaaa" in problem and "bbbb" in problem and "HFTokenizer" in problem


def test_a_large_file_is_sampled_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "SCANNED_TOKENS", 640)
    tokens = np.ones(10_000, np.int64)
    tokens[-1] = 777
    assert highest_token(IndexedDataset(write(tmp_path / "x", [tokens]))) == 777
    assert highest_token(IndexedDataset(write(tmp_path / "none", []))) == -1


# ---------------------------------------------------------------- processes

PROGRAM = """
import functools, os, signal, sys
from megatron_moe.data.batch import make_batch
from megatron_moe.data.loader import build_loader
from megatron_moe.data.mock import MockDataset
if __name__ == "__main__":
    if sys.argv[1] == "early":
        os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)])
    batches = build_loader(MockDataset(9, 4, 1), 0, 1, 0, 1, 1, 2, functools.partial(make_batch, eod=0))
    for _ in range(3):
        next(batches)
    print(*(worker.pid for worker in batches._workers), flush=True)
    if sys.argv[1] == "signal":
        sys.stdin.readline()
        for _ in range(20):
            next(batches)
        print("still reading", flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("boom")
"""


def start(tmp_path, how):
    (tmp_path / "program.py").write_text(PROGRAM)
    return subprocess.Popen([sys.executable, "program.py", how], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def is_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.fault
def test_workers_survive_the_signals_that_stop_a_run(tmp_path):
    process = start(tmp_path, "signal")
    workers = [int(pid) for pid in process.stdout.readline().split()]
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGUSR1)
    out, err = process.communicate("go on\n", timeout=60)
    assert "still reading" in out and process.returncode == 0, err
    assert all(is_gone(pid) for pid in workers)


@pytest.mark.fault
def test_workers_survive_signals_from_their_first_moment_on(tmp_path):
    process = start(tmp_path, "early")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.split()) == 2, err


@pytest.mark.fault
@pytest.mark.parametrize("how, code", [("end", 0), ("raise", 1)])
def test_a_trainer_that_ends_in_the_middle_of_the_data_does_not_hang(how, code, tmp_path):
    process = start(tmp_path, how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert all(is_gone(int(pid)) for pid in out.split())


@pytest.mark.fault
def test_workers_end_when_the_trainer_is_killed(tmp_path):
    process = start(tmp_path, "signal")
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert all(is_gone(pid) for pid in workers)
