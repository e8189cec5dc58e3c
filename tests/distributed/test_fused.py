"""The fused all-to-all in Triton's interpreter: every kernel by itself, then ranks that write into each other's memory."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from distributed_pool import run_distributed
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.distributed import parity
from tests.distributed.fused_ranks import (
    Case,
    check_kernels,
    check_kernels_of_few_blocks,
    differences,
    differences_at_the_start,
    grown,
    in_flight,
    layout,
    soak,
    trained,
    wait_for_nobody,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton and memfd_create are of Linux"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@st.composite
def cases(draw):
    ranks, here = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 5))
    return Case(
        tokens=tuple(draw(st.integers(0, 6)) for _ in range(ranks)), k=draw(st.integers(1, min(4, ranks * here))), experts=ranks * here,
        width=draw(st.sampled_from([4, 20, 64])), kept=draw(st.sampled_from([0.0, 0.7, 1.0])),
        busy=draw(st.sampled_from([None, 1])), align=draw(st.sampled_from([1, 4])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # a failure ends the ranks: shrinking takes minutes
@given(cases())
def test_every_kernel_does_what_loops_do(case):
    run_distributed(check_kernels, 1, case, interpret=True)


def test_a_plan_of_many_blocks_and_tiles():
    run_distributed(check_kernels_of_few_blocks, 1, Case((75, 5), 3, 40, 4, seed=3), interpret=True)


ROWS = [  # one for each number of ranks, the others with --full
    Case((9,), 3, 4, 8),
    Case((5, 8), 3, 6, 8),
    pytest.param(Case((5, 5, 5, 5), 3, 8, 8), marks=pytest.mark.matrix),
    pytest.param(Case((3, 0, 1, 6), 2, 8, 8, busy=3), marks=pytest.mark.matrix),  # no token, one token, idle ranks
    pytest.param(Case((0, 0), 2, 4, 8), marks=pytest.mark.matrix),
    pytest.param(Case((7, 4), 1, 2, 12, kept=1.0), marks=pytest.mark.matrix),
    pytest.param(Case((7, 4), 3, 6, 8, dtype=torch.float64), marks=pytest.mark.matrix),
]


@pytest.mark.parametrize("case", ROWS, ids=lambda c: f"{c.ranks}-ranks-k{c.k}-{'-'.join(map(str, c.tokens))}-{c.dtype}")
def test_rows_results_and_gradients_are_bit_by_bit_those_of_the_all_to_all(case):
    assert run_distributed(differences, case.ranks, case, interpret=True) == [[]] * case.ranks


@pytest.mark.parametrize("policy", ["exact", "worst"])
def test_other_capacities_compute_the_same(policy):
    assert run_distributed(differences, 2, Case((6, 2), 2, 4, 8), policy, interpret=True) == [[]] * 2


def test_exact_room_grows_with_the_rows_of_the_busiest_rank():
    (before, after, differing), other = run_distributed(grown, 2, Case((6, 6), 1, 4, 8, kept=1.0, busy=1), interpret=True)
    assert (before, differing) == (6, []) and after >= 12 and other == (before, after, [])


def test_random_delays_change_nothing():
    assert run_distributed(soak, 2, Case((5, 6), 2, 4, 4), 6, interpret=True) == [0, 0]


@pytest.mark.parametrize("meeting", ["staged", "free"])
def test_the_soak_finds_a_missing_meeting(meeting):
    assert sum(run_distributed(soak, 2, Case((5, 6), 2, 4, 4), 6, meeting, interpret=True)) > 0


def test_who_did_not_come_is_named_and_nobody_waits_for_ever():
    said, _ = run_distributed(wait_for_nobody, 2, interpret=True)
    assert "rank 1" in said and "'staged'" in said and "20 looks" in said


def test_micro_batches_in_flight_and_recomputed_are_those_one_by_one():
    assert run_distributed(in_flight, 2, Case((5, 4), 2, 4, 8), interpret=True) == [True, True]


def test_the_test_at_the_start_names_the_first_token_that_differs():
    assert run_distributed(differences_at_the_start, 2, False, interpret=True) == [None, None]
    said = run_distributed(differences_at_the_start, 2, True, interpret=True)
    assert said[0] is None and "token 5 of rank 1" in said[1] and "output" in said[1]


def test_steps_that_lacked_room_give_the_weights_of_steps_that_had_it():
    (tight, again), (roomy, none) = run_distributed(trained, 2, (0.01, 4.0), interpret=True)[0]
    assert again > 0 and none == 0
    assert all(torch.equal(a, b) for a, b in zip(tight, roomy, strict=True))


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "world", "flags"),
    [
        ("modern", 2, "--moe-expert-parallel-size 2"),
        ("pyramid", 4, "--moe-expert-parallel-size 4 --recompute-granularity full"),
        ("deep", 4, "--moe-expert-parallel-size 2 --pipeline-model-parallel-size 2"),
    ],
)
def test_a_model_with_the_kernels_is_trained_as_on_one_process(model, world, flags):
    found = run_distributed(layout, world, model, f"{parity.FP64} {flags}", timeout=280, interpret=True)[0]
    parity.check(found, parity.expected(model, world, f"{parity.FP64} {flags}"), 1e-10)
