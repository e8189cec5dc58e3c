"""Made-up text."""

import numpy as np
import pytest

from megatron_moe.data.mock import MockDataset


def test_a_sample_is_a_function_of_seed_and_number():
    a, b = MockDataset(100, 16, 1), MockDataset(100, 16, 1)
    b[5]
    assert (a[2**31 + 3]["text"] == b[2**31 + 3]["text"]).all() and a[3]["sample_id"] == 3
    assert (a[3]["text"] != a[4]["text"]).any() and (a[3]["text"] != MockDataset(100, 16, 2)[3]["text"]).any()
    assert len(a) == 2**31 and a[0]["text"].shape == (17,) and a[0]["text"].dtype == np.int64


@pytest.mark.parametrize("vocab_size", [2, 3, 50304])
def test_tokens_are_inside_the_vocabulary(vocab_size):
    dataset = MockDataset(vocab_size, 64, 1)
    text = np.concatenate([dataset[i]["text"] for i in range(20)])
    assert text.min() >= 0 and text.max() < vocab_size


def test_there_is_more_to_learn_than_word_frequencies():
    vocab_size = 32
    dataset = MockDataset(vocab_size, 512, 1)
    pairs = np.zeros((vocab_size, vocab_size))
    for i in range(100):
        text = dataset[i]["text"]
        np.add.at(pairs, (text[:-1], text[1:]), 1)
    joint = pairs / pairs.sum()
    word = joint.sum(1)
    unigram = -(word * np.log(word + 1e-12)).sum()
    bigram = -(joint * np.log(joint / (word[:, None] + 1e-12) + 1e-12)).sum()
    assert 1.0 < unigram < np.log(vocab_size) and bigram < 0.65 * unigram


def test_one_word_is_no_language():
    with pytest.raises(ValueError, match="at least two"):
        MockDataset(1, 8, 0)
