"""Filters on probabilities that can be checked by hand."""

import pytest
import torch

from megatron_moe.config.flags import ConfigError
from megatron_moe.config.sampling import SamplingConfig
from megatron_moe.inference.sampling import filtered, keep_top_k, keep_top_p, sample
from megatron_moe.model.loss import mask_padding

PROBS = torch.tensor([[0.2, 0.5, 0.05, 0.25]])
LOGITS = PROBS.log()


def kept(logits):
    """Tokens that may be drawn, of each row."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_temperature_divides_the_logits():
    # p^(1/2), normalised: 0.5 and 0.125 become 0.7071 and 0.3536, two to one
    probs = filtered(torch.tensor([[0.5, 0.125]]).log(), SamplingConfig(temperature=2.0)).softmax(-1)
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3]]))


@pytest.mark.parametrize("k, tokens", [(1, [1]), (2, [1, 3]), (3, [0, 1, 3])])
def test_top_k_keeps_the_k_likeliest_and_their_proportions(k, tokens):
    result = keep_top_k(LOGITS, k)
    assert kept(result) == [tokens]
    assert torch.equal(result[0, tokens], LOGITS[0, tokens])


def test_top_k_keeps_exactly_k_of_equal_tokens():
    assert len(kept(keep_top_k(torch.zeros(1, 6), 2))[0]) == 2


@pytest.mark.parametrize("p, tokens", [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [0, 1, 3]), (0.96, [0, 1, 2, 3])])
def test_top_p_keeps_the_shortest_head_that_reaches_p(p, tokens):
    result = keep_top_p(LOGITS, p)
    assert kept(result) == [tokens]
    assert torch.equal(result[0, tokens], LOGITS[0, tokens])


def test_rows_are_filtered_each_on_its_own():
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.35, 0.25]]).log()
    assert kept(keep_top_p(logits, 0.7)) == [[0], [0, 1]]


def test_top_p_counts_what_top_k_has_left():
    # top-2 leaves 0.5 and 0.25, that is 2/3 and 1/3: 0.6 is reached by the first. Of all four, 0.5 alone would not do.
    assert kept(filtered(LOGITS, SamplingConfig(top_k=2, top_p=0.6))) == [[1]]
    assert kept(filtered(LOGITS, SamplingConfig(top_p=0.6))) == [[1, 3]]


def test_temperature_comes_before_top_p():
    # at temperature 1/2: 0.04 0.25 0.0025 0.0625 over 0.355, so the likeliest has 0.704
    assert kept(filtered(LOGITS, SamplingConfig(temperature=0.5, top_p=0.7))) == [[1]]


@pytest.mark.parametrize("values", [{"temperature": 1e-30}, {"temperature": 1e-300}, {"top_p": 1e-30}, {"top_p": 1e-300}])
def test_a_tiny_temperature_or_top_p_is_greedy_and_finite(values):
    probs = filtered(LOGITS, SamplingConfig(**values)).softmax(-1)
    assert probs.tolist() == [[0, 1, 0, 0]]


def test_greedy_takes_the_likeliest():
    assert sample(torch.cat([LOGITS, -LOGITS]), SamplingConfig(greedy=True)).tolist() == [1, 2]


def test_draws_follow_the_probabilities_and_the_seed():
    draws = [sample(LOGITS.expand(4000, 4), SamplingConfig(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    frequencies = torch.bincount(draws[0], minlength=4) / 4000
    torch.testing.assert_close(frequencies, PROBS[0], atol=0.03, rtol=0)  # 4 standard deviations


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = mask_padding(torch.tensor([[0.0, 0.0, 50.0]]), vocab_size=2).expand(500, 3)
    for config in (SamplingConfig(), SamplingConfig(top_k=3), SamplingConfig(top_p=0.99, temperature=3.0), SamplingConfig(greedy=True)):
        assert sample(logits, config, torch.Generator().manual_seed(0)).max() < 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": 0.0}, "--greedy"),
        ({"top_p": 0.0}, "--top-p must be greater than 0"),
        ({"top_p": 1.5}, "--top-p must be at most 1"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"greedy": True, "top_k": 5}, r"--top-k \(5\)"),
    ],
)
def test_settings_without_a_meaning_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**values)
