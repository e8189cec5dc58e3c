"""Mixing datasets by weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.data import blended
from megatron_moe.data.blended import BlendedDataset


class Numbered:
    """Says who it is and which of its samples was asked for."""

    def __init__(self, name, length=10):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"text": (self.name, index), "sample_id": index}


def blend(weights):
    return BlendedDataset([Numbered(i) for i in range(len(weights))], weights)


def test_golden_order_of_three_datasets():
    items = [blend([0.5, 0.3, 0.2])[i] for i in range(12)]
    assert [item["text"][0] for item in items] == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    assert [item["text"][1] for item in items] == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3]
    assert [item["sample_id"] for item in items] == list(range(12))


def test_weights_need_not_sum_to_one():
    assert [blend([5, 3, 2]).locate(i) for i in range(50)] == [blend([0.5, 0.3, 0.2]).locate(i) for i in range(50)]


def test_weights_are_summed_as_numpy_does():
    """Python's sum has other last bits from 3.12 on, and one of them decides a tie: a run would change with its Python."""
    weights = [0.1] * 10 + [0.3, 0.7, 1e-9]
    assert blend(weights).weights == (np.array(weights) / np.sum(np.array(weights))).tolist()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_shares_are_never_far_from_the_weights(weights):
    mix, count = blend(weights), 200
    drawn = [mix.locate(i)[0] for i in range(count)]
    for d, weight in enumerate(mix.weights):
        assert abs(drawn.count(d) - weight * count) < len(weights)


def test_a_sample_is_the_same_however_it_is_reached(monkeypatch):
    monkeypatch.setattr(blended, "CHUNK", 7)
    weights = [0.55, 0.25, 0.2]
    forwards = [blend(weights).locate(i) for i in range(100)]
    mix = blend(weights)
    for i in (99, 0, 55, 56, 6, 7, 98):
        assert mix.locate(i) == forwards[i]
    assert len(mix._chunks) <= 2


def test_every_dataset_is_read_in_its_own_order():
    mix = blend([0.6, 0.4])
    seen = {0: [], 1: []}
    for i in range(40):
        dataset, inner = mix.locate(i)
        seen[dataset].append(inner)
    assert seen == {d: list(range(len(inner))) for d, inner in seen.items()}


def test_a_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match="above zero"):
        blend([0, 0.5, 0.5])


def test_length_and_negative_samples():
    mix = BlendedDataset([Numbered(0, 4), Numbered(1, 6)], [1, 1])
    assert len(mix) == 10
    with pytest.raises(IndexError):
        mix[-1]
