"""Log-probabilities of given texts: each token once, from a plain forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import LEARNED, ROPE_GQA_SWIGLU, VOCAB, all_logits, small_model

from megatron_moe.inference import scoring
from megatron_moe.inference.scoring import Row, encode_pair, pair_row, row_problems, score_rows, windows
from megatron_moe.tokenizers.plain import ByteTokenizer

ROWS = [Row([3, 1, 4, 1, 5, 9, 2, 6], 3), Row([7, 8], 1), Row([49, 0, 12, 3], 1)]


def oracle(model, row) -> tuple[float, bool]:
    """A forward of the row alone."""
    log_probs = all_logits(model, torch.tensor([row.tokens[:-1]]))[0, :, :VOCAB].log_softmax(-1)
    targets = range(row.first, len(row.tokens))
    return sum(float(log_probs[i - 1, row.tokens[i]]) for i in targets), all(
        int(log_probs[i - 1].argmax()) == row.tokens[i] for i in targets
    )


@pytest.mark.parametrize("at_a_time", [2**24, 100])  # of 64 columns: one position after the other
def test_scores_are_those_of_each_row_alone(monkeypatch, at_a_time):
    monkeypatch.setattr(scoring, "LOGITS_AT_A_TIME", at_a_time)
    model = small_model(**ROPE_GQA_SWIGLU)
    likeliest = int(all_logits(model, torch.tensor([[7]]))[0, 0, :VOCAB].argmax())
    rows = [*ROWS, Row([7, likeliest], 1)]
    scores, project = score_rows(model, rows), model.project
    for score, row in zip(scores, rows):
        log_prob, is_greedy = oracle(model, row)
        assert score.log_prob == pytest.approx(log_prob, abs=1e-10)
        assert (score.is_greedy, score.tokens) == (is_greedy, len(row.tokens) - row.first)
    assert scores[-1].is_greedy
    assert model.project is project


@given(st.integers(2, 60), st.integers(1, 12), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_score_every_token_once_with_enough_before_it(length, window, data):
    stride = data.draw(st.integers(1, window))
    tokens, seen = list(range(length)), []
    for row in windows(tokens, window, stride):
        assert 1 <= row.first < len(row.tokens) <= window + 1
        assert row.tokens == tokens[row.tokens[0] : row.tokens[-1] + 1]
        for i in range(row.first, len(row.tokens)):
            seen.append(row.tokens[i])
            assert i >= min(max(window - stride, 1), row.tokens[i])  # so many tokens before it
    assert seen == tokens[1:]


def test_windows_are_those_of_the_worked_example():
    rows = list(windows(["^", *range(10)], window=4, stride=3))
    assert [(list(row.tokens), row.first) for row in rows] == [(["^", 0, 1, 2, 3], 1), ([2, 3, 4, 5, 6], 2), ([5, 6, 7, 8, 9], 2)]
    assert list(windows([1], 4, 2)) == []
    with pytest.raises(ValueError, match=r"the stride \(5\) must be from 1 to the window \(4\)"):
        list(windows([1, 2], 4, 5))


def test_a_pair_is_cut_where_the_context_ends():
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, "ab ", "c", 256) == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "", "c", 256) == ([256], [99])
    with pytest.raises(ValueError, match="nothing before the text"):
        encode_pair(tokenizer, "", "c", None)
    with pytest.raises(ValueError, match="nothing to score"):
        encode_pair(tokenizer, "a", "", 256)
    assert pair_row([1, 2, 3, 4], [5, 6], window=4) == Row([2, 3, 4, 5, 6], 3)
    with pytest.raises(ValueError, match="5 tokens are to be scored, and the window has 4"):
        pair_row([1], [2, 3, 4, 5, 6], window=4)


def test_rows_that_cannot_be_scored_are_named():
    model = small_model(**LEARNED)
    problems = row_problems(model, [Row([1, 50], 1), Row([1] * 26, 1)])
    assert "the token 50" in problems[0]
    assert "25 tokens exceeds the 24 learned positions" in problems[1]
