"""The order of rows, and that dispatch and combine are a gather and its transposed sum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.moe.dispatch import Limits, LocalDispatcher


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_rows_are_sorted_by_expert_then_token_then_choice(tokens, experts, k, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, k), generator=generator)
    x, weights = torch.randn(tokens, 5, generator=generator), torch.rand(tokens, k, generator=generator)
    expected = [(e, t, c) for e in range(experts) for t in range(tokens) for c in range(k) if ids[t, c] == e]
    rows, offsets, row_weights, plan = LocalDispatcher(experts).dispatch(x, ids, weights)
    assert rows.shape == (tokens * k, 5)  # room for all: how many are dropped, only the device knows
    assert not row_weights[len(expected) :].any()
    rows = torch.where(torch.arange(len(rows))[:, None] < len(expected), rows, 0.0)  # what the experts owe for spare rows
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(e <= last for e, _, _ in expected) for last in range(experts)]
    for r, (_, t, c) in enumerate(expected):
        assert torch.equal(rows[r], x[t])
        assert row_weights[r] == weights[t, c]
    summed = torch.zeros(tokens, 5)
    for r, (_, t, _) in enumerate(expected):
        summed[t] += rows[r]
    torch.testing.assert_close(LocalDispatcher(experts).combine(rows, plan), summed)


def test_dropped_assignments_make_no_row_and_their_tokens_come_back_as_zero():
    dispatcher = LocalDispatcher(3)
    x = torch.randn(3, 4)
    rows, offsets, row_weights, plan = dispatcher.dispatch(x, torch.tensor([[2], [-1], [0]]), torch.ones(3, 1))
    assert torch.equal(rows[:2], x[[2, 0]])
    assert offsets.tolist() == [1, 1, 2]
    assert row_weights.tolist() == [1, 1, 0]
    assert torch.equal(dispatcher.combine(rows * row_weights[:, None], plan)[1], torch.zeros(4))


@pytest.mark.parametrize(
    ("limits", "rows", "has_spare_rows"),
    [(Limits(), 8, True), (Limits(is_dropless=True), 8, False), (Limits(capacity=1), 3, True), (Limits(capacity=9), 8, True)],
)
def test_rows_are_as_many_as_there_can_be(limits, rows, has_spare_rows):
    plan = LocalDispatcher(3).plan(torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]]).where(torch.tensor(not has_spare_rows), -1), limits)
    assert (len(plan.slot_R), plan.has_spare_rows) == (rows, has_spare_rows)


def test_no_tokens_make_an_empty_round_trip():
    dispatcher = LocalDispatcher(3)
    rows, offsets, row_weights, plan = dispatcher.dispatch(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert rows.shape == (0, 4)
    assert row_weights.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]
    assert dispatcher.combine(rows, plan).shape == (0, 4)


def test_a_token_of_three_experts_is_summed_in_float32_and_rounded_once():
    dispatcher = LocalDispatcher(3)
    _, _, _, plan = dispatcher.dispatch(torch.zeros(1, 1), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # in bf16 256 + 1 = 256
    y = dispatcher.combine(rows, plan)
    assert (y.item(), y.dtype) == (258.0, torch.bfloat16)


def test_gradients_of_the_round_trip_reach_tokens_and_weights():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, -1], [-1, -1], [2, 0]])

    def round_trip(x, weights):
        dispatcher = LocalDispatcher(3)
        rows, _, row_weights, plan = dispatcher.dispatch(x, ids, weights)
        return dispatcher.combine(rows.square() * row_weights[:, None], plan)

    assert torch.autograd.gradcheck(round_trip, (x, weights))
