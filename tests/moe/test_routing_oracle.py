"""Choosing, dropping and weighing against loops over tokens and experts, for sizes that nobody would think of."""

import gate_oracle as oracle
import pytest
import torch
from gate_oracle import choose_experts, combine_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.moe.losses import load_balancing_sum
from megatron_moe.moe.routing import count_assignments, drop_over_capacity, expert_capacity

quick = settings(max_examples=60, deadline=None)


@st.composite
def routings(draw):
    """Logits on a coarse grid, so that ties are common, and a k that fits."""
    tokens, experts = draw(st.integers(0, 13)), draw(st.integers(2, 7))
    k = draw(st.integers(1, min(experts, 4)))
    values = draw(st.lists(st.integers(-3, 3), min_size=tokens * experts, max_size=tokens * experts))
    return torch.tensor(values, dtype=torch.float64).view(tokens, experts), k


@quick
@given(routings())
def test_choices_counts_and_weights_equal_the_loops(case):
    logits, k = case
    probs, ids = choose_experts(logits, k)
    expected = [oracle.softmax(row) for row in logits.tolist()]
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64).view_as(probs))
    # ids from our own probabilities: two softmaxes may round a tie apart
    assert ids.tolist() == oracle.choose(probs.tolist(), k)
    assert count_assignments(ids, logits.shape[1]).tolist() == oracle.counts(ids.tolist(), logits.shape[1])
    weights = combine_weights(probs, ids)
    torch.testing.assert_close(weights, torch.tensor(oracle.weights(probs.tolist(), ids.tolist()), dtype=torch.float64).view_as(weights))


@quick
@given(routings(), st.integers(0, 20), st.sampled_from(["position", "probs", "random"]), st.integers(0, 99))
def test_dropping_equals_queues_at_the_experts(case, capacity, order, seed):
    logits, k = case
    probs, ids = choose_experts(logits, k)
    priority = torch.randint(0, 5, ids.shape, generator=torch.Generator().manual_seed(seed)) / 5  # coarse: ties
    if order == "probs":
        priority = probs.gather(1, ids)
    kept = drop_over_capacity(ids, capacity, order, None if order == "position" else priority)
    assert kept.shape == ids.shape
    assert kept.tolist() == oracle.keep(ids.tolist(), capacity, order, priority.tolist())
    counts = count_assignments(kept, logits.shape[1])
    assert counts.tolist() == count_assignments(ids, logits.shape[1]).clamp(max=capacity).tolist()
    weights = combine_weights(probs, kept)
    expected = torch.tensor(oracle.weights(probs.tolist(), kept.tolist()), dtype=torch.float64).view_as(weights)
    torch.testing.assert_close(weights, expected)
    assert not weights[kept < 0].any()


@quick
@given(routings())
def test_balance_loss_equals_the_formula(case):
    logits, k = case
    if not len(logits):
        return
    probs, ids = choose_experts(logits, k)
    loss = load_balancing_sum(probs, count_assignments(ids, logits.shape[1])) / len(logits)
    assert loss.item() == pytest.approx(oracle.balance(probs.tolist(), ids.tolist(), logits.shape[1]), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 3000),
    st.integers(1, 256),
    st.sampled_from([0.1, 0.3, 0.5, 1, 1.0, 1.1, 1.25, 2, 1e-3, 3.3]),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_capacity_equals_counting_up(tokens, experts, factor, k, minimum):
    assert expert_capacity(tokens, experts, factor, k, minimum) == oracle.capacity(tokens, experts, factor, k, minimum)


def test_capacity_zero_drops_all_and_weighs_nothing():
    probs, ids = choose_experts(torch.randn(5, 4), k=2)
    kept = drop_over_capacity(ids, 0, "position")
    assert (kept == -1).all()
    assert torch.equal(combine_weights(probs, kept), torch.zeros(5, 2))


def test_capacity_above_the_tokens_drops_nobody():
    for k in (1, 2, 3):
        _, ids = choose_experts(torch.randn(5, 4), k)
        assert torch.equal(drop_over_capacity(ids, 99, "position"), ids)


def test_second_choices_queue_behind_all_first_choices():
    ids = torch.tensor([[1, 0], [0, 1], [0, 1]])  # the first token's second choice wants expert 0 too
    assert drop_over_capacity(ids, 2, "position").tolist() == [[1, -1], [0, 1], [0, -1]]


def test_three_choices_by_position_queue_token_by_token():
    ids = torch.tensor([[1, 0, 2], [0, 1, 2], [0, 1, 2]])
    assert drop_over_capacity(ids, 2, "position").tolist() == [[1, 0, 2], [0, 1, 2], [-1, -1, -1]]


def test_a_token_dropped_by_both_experts_has_zero_weight_and_a_finite_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    probs, _ = choose_experts(logits, 2)
    weights = combine_weights(probs, torch.full((3, 2), -1))
    weights.sum().backward()
    assert torch.equal(weights, torch.zeros(3, 2))
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_the_only_choice_keeps_its_probability_so_the_router_learns():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    probs, ids = choose_experts(logits, 1)
    weights = combine_weights(probs, ids)
    torch.testing.assert_close(weights, probs.gather(1, ids))
    weights.sum().backward()
    assert logits.grad.abs().min() > 0


def test_more_choices_are_renormalised_over_the_survivors():
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    torch.testing.assert_close(combine_weights(probs, torch.tensor([[0, 1, -1]])), torch.tensor([[0.625, 0.375, 0.0]]))


def test_noise_changes_the_only_choice_but_not_the_probabilities():
    logits, noise = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    probs, ids = choose_experts(logits, 1, noise)
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(probs, logits.softmax(-1))


def test_noise_of_two_choices_moves_only_the_second():
    logits, noise = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[-9.0, 0.0, 3.0]])
    assert choose_experts(logits, 2, noise)[1].tolist() == [[0, 2]]
    assert choose_experts(logits, 2, torch.tensor([[9.0, 0.0, 0.0]]))[1].tolist() == [[0, 1]]  # never the first again


def test_noise_leaves_the_probabilities_differentiable():
    logits = torch.randn(4, 3, requires_grad=True)
    probs, ids = choose_experts(logits, 2, torch.randn(4, 3))
    assert not ids.requires_grad
    assert probs.requires_grad


def test_uniform_routing_has_balance_loss_one_and_the_worst_has_the_number_of_experts():
    even = load_balancing_sum(torch.full((8, 4), 0.25), torch.tensor([2, 2, 2, 2])) / 8
    one = load_balancing_sum(torch.tensor([[1.0, 0, 0, 0]] * 8), torch.tensor([8, 0, 0, 0])) / 8
    assert even.item() == pytest.approx(1.0)
    assert one.item() == pytest.approx(4.0)


def test_the_balance_loss_has_a_gradient_through_the_probabilities_only():
    probs = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([4, 1, 0])
    load_balancing_sum(probs, counts).backward()
    torch.testing.assert_close(probs.grad, (3 * counts / 5.0).double().expand(5, 3))


def test_no_assignment_at_all_has_balance_loss_zero_and_not_nan():
    assert load_balancing_sum(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64)).item() == 0.0
