"""Numbers of DeepSpeed's own gating, run once on six tokens and three experts, and our rule where we define it otherwise."""

import pytest
import torch
from gate_oracle import choose_experts, combine_weights

from megatron_moe.moe.losses import load_balancing_sum
from megatron_moe.moe.routing import count_assignments, drop_over_capacity, expert_capacity

LOGITS = torch.tensor([[2, 1, 0], [1.5, 1, 0], [3, 0, 1], [0, 2, 1], [1, 0.5, 0], [2.5, 2, 0]])
TOP1_PROBS = torch.tensor([0.665241, 0.546549, 0.843795, 0.665241, 0.506480, 0.592201])


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "minimum", "capacity"),
    [
        (2048, 128, 1.0, 4, 16),
        (1024, 16, 1.25, 4, 80),
        (10, 3, 1.0, 0, 4),
        (100, 64, 1.0, 4, 4),
        (6, 3, 1.0, 4, 4),
        (2047, 64, 1.25, 4, 40),
    ],
)
def test_capacities_of_deepspeed(tokens, experts, factor, minimum, capacity):
    assert expert_capacity(tokens, experts, factor, k=1, min_capacity=minimum) == capacity


def test_k_multiplies_the_capacity():
    assert [expert_capacity(6, 3, 1.0, k, 0) for k in (1, 2, 3)] == [2, 4, 6]


def test_capacity_is_exact_where_floating_point_rounds_an_integer_up():
    assert 1000 / 10 * 1.1 > 110  # so would be 111 in float64
    assert expert_capacity(1000, 10, 1.1, 1, 0) == 110


def balance_loss(probs, counts):
    return load_balancing_sum(probs, counts).item() / probs.shape[0]


def test_top1_weights_are_the_raw_probabilities():
    probs, ids = choose_experts(LOGITS, k=1)
    assert ids.flatten().tolist() == [0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(combine_weights(probs, ids).flatten(), TOP1_PROBS, rtol=0, atol=1e-6)


def test_top1_counts_and_balance_loss_are_those_before_dropping():
    probs, ids = choose_experts(LOGITS, k=1)
    counts = count_assignments(ids, 3)
    assert counts.tolist() == [5, 1, 0]
    assert balance_loss(probs, counts) == pytest.approx(1.514279, abs=1e-6)


def test_top1_by_position_is_first_come_first_served():
    """Ours, documented: upstream's use_rts=False kept tokens 1 and 5 here, by the tie order of topk over a 0/1 column."""
    _, ids = choose_experts(LOGITS, k=1)
    assert drop_over_capacity(ids, 2, "position").flatten().tolist() == [0, 0, -1, 1, -1, -1]


def test_top2_counts_both_choices_and_its_balance_loss_the_first_ones():
    probs, ids = choose_experts(LOGITS, k=2)
    assert count_assignments(ids, 3).tolist() == [5, 5, 2]
    assert balance_loss(probs, count_assignments(ids[:, :1], 3)) == pytest.approx(1.514279, abs=1e-6)


def test_balance_loss_over_all_assignments_of_two_choices():
    """The formula of k >= 3, applied to k = 2 as DeepSpeed's topkgating does."""
    probs, ids = choose_experts(LOGITS, k=2)
    assert balance_loss(probs, count_assignments(ids, 3)) == pytest.approx(1.149270, abs=1e-6)


def test_top2_at_factor_one_drops_the_last_token_whole():
    probs, ids = choose_experts(LOGITS, k=2)
    capacity = expert_capacity(6, 3, 1.0, 2, 0)
    kept = drop_over_capacity(ids, capacity, "position")
    weights = combine_weights(probs, kept)
    assert capacity == 4
    assert kept[0].tolist() == [0, 1]
    torch.testing.assert_close(weights[0], torch.tensor([0.731059, 0.268941]), rtol=0, atol=1e-6)
    assert kept[5].tolist() == [-1, -1]
    assert weights[5].tolist() == [0.0, 0.0]


def test_top2_at_half_capacity_gives_the_whole_weight_to_the_survivor():
    probs, ids = choose_experts(LOGITS, k=2)
    kept = drop_over_capacity(ids, expert_capacity(6, 3, 0.5, 2, 0), "position")
    # expert 1: token 3 is its only first choice and has place 0; then the second choices of tokens 0, 1, 4, 5 queue
    assert kept.tolist() == [[0, 1], [0, -1], [-1, 2], [1, 2], [-1, -1], [-1, -1]]
    weights = combine_weights(probs, kept)
    assert weights[1].tolist() == [1.0, 0.0]
    assert weights[2].tolist() == [0.0, 1.0]
    assert weights[4:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_dropping_by_probability_keeps_the_most_certain():
    probs, ids = choose_experts(LOGITS, k=2)
    kept = drop_over_capacity(ids, 2, "probs", probs.gather(1, ids))
    # rows of ids, best first: e0 e1 | e0 e1 | e0 e2 | e1 e2 | e0 e1 | e0 e1
    assert kept.tolist() == [[0, -1], [-1, -1], [0, 2], [1, 2], [-1, -1], [-1, 1]]
    weights = combine_weights(probs, kept)
    torch.testing.assert_close(weights[2], torch.tensor([0.880797, 0.119203]), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights[3], torch.tensor([0.731059, 0.268941]), rtol=0, atol=1e-6)
    assert weights[0].tolist() == [1.0, 0.0]
    assert weights[5].tolist() == [0.0, 1.0]


def test_ties_go_to_the_lower_expert_for_every_k():
    for k in (1, 2, 3):
        for experts in (3, 4, 8, 17, 64, 128):
            _, ids = choose_experts(torch.zeros(2, experts), k)
            assert ids.tolist() == [list(range(k))] * 2, f"{k} of {experts}"
