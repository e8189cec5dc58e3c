"""The worker pool that all parallel tests stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from distributed_pool import WorkerError, run_distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks(bias):
    total = torch.tensor(dist.get_rank() + bias)
    dist.all_reduce(total)
    return total.item()


def _process_id():
    return os.getpid()


def _rank_one_raises():
    if dist.get_rank() == 1:
        raise ValueError("bad number 7")
    dist.barrier()  # would wait for ever


def _rank_one_dies():
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def _rank_zero_sleeps():
    if dist.get_rank() == 0:
        time.sleep(60)


def _changes_the_process():
    os.environ["POOL_TEST"] = "1"
    torch.set_default_dtype(torch.float64)
    os.chdir("/")


def _process_state():
    return os.environ.get("POOL_TEST"), torch.get_default_dtype(), os.getcwd()


def _unpicklable():
    return lambda: None


def test_results_come_back_in_rank_order_and_groups_are_real():
    assert run_distributed(_sum_of_ranks, 2, 10) == [21, 21]


def test_workers_are_reused_between_calls():
    assert run_distributed(_process_id, 2) == run_distributed(_process_id, 2)


def test_exception_of_one_rank_is_raised_here_with_rank_and_traceback_and_the_pool_recovers():
    with pytest.raises(ValueError, match="bad number 7") as caught:
        run_distributed(_rank_one_raises, 2)
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "rank 1 of 2 raised" in str(caught.value.__cause__)
    assert "in _rank_one_raises" in str(caught.value.__cause__)
    assert run_distributed(_sum_of_ranks, 2, 0) == [1, 1]


def test_dead_worker_is_an_error_and_not_a_hang():
    with pytest.raises(WorkerError, match="rank 1 of 2 died with exit code 9"):
        run_distributed(_rank_one_dies, 2)


def test_timeout_names_the_silent_rank_and_shows_its_stack():
    with pytest.raises(WorkerError, match="no answer from rank 0") as caught:
        run_distributed(_rank_zero_sleeps, 2, timeout=2)
    assert "in _rank_zero_sleeps" in str(caught.value)


def test_environment_dtype_and_directory_are_put_back():
    before = run_distributed(_process_state, 1)
    run_distributed(_changes_the_process, 1)
    assert run_distributed(_process_state, 1) == before


def test_result_that_cannot_travel_says_so():
    with pytest.raises(WorkerError, match="cannot be pickled"):
        run_distributed(_unpicklable, 1)
