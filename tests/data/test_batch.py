"""Masks, positions and segments of a micro-batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.data.batch import look_ahead, make_batch

E = 99


def items(*texts):
    return [{"text": np.array(text, np.int64), "sample_id": 10 + i} for i, text in enumerate(texts)]


def test_hand_worked_documents():
    batch = make_batch(items([7, 8, E, 9, E, 6, 5]), E, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    assert batch.tokens.tolist() == [[7, 8, E, 9, E, 6]]
    assert batch.labels.tolist() == [[8, E, 9, E, 6, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 1]]
    assert batch.sample_ids.tolist() == [10]


def test_without_flags_documents_do_not_matter():
    batch = make_batch(items([E, 1, E, 2], [3, E, E, 4]), E)
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]] and batch.segment_ids is None
    assert batch.loss_mask.tolist() == [[1, 1, 1], [1, 1, 1]] and batch.loss_mask.dtype == torch.float32
    assert batch.sample_ids.tolist() == [10, 11] and batch.tokens.dtype == torch.int64 and batch.tokens.is_contiguous()


def test_an_eod_at_the_start_is_a_document_of_its_own():
    batch = make_batch(items([E, 1, 2]), E, reset_position_ids=True, reset_attention_mask=True)
    assert batch.position_ids.tolist() == [[0, 0]] and batch.segment_ids.tolist() == [[0, 1]]


def slow_masks(tokens):
    """As Megatron words it: everything after an EOD begins again, the EOD itself does not."""
    positions, segments, weights = [], [], []
    position = segment = 0
    for token in tokens:
        positions.append(position)
        segments.append(segment)
        weights.append(0.0 if token == E else 1.0)
        position, segment = (0, segment + 1) if token == E else (position + 1, segment)
    return positions, segments, weights


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12).flatmap(lambda n: st.lists(st.lists(st.sampled_from([1, 2, E]), min_size=n, max_size=n), min_size=1, max_size=4)))
def test_masks_equal_a_slow_loop(texts):
    batch = make_batch(items(*texts), E, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    for row, text in enumerate(texts):
        positions, segments, weights = slow_masks(text[:-1])
        assert batch.position_ids[row].tolist() == positions
        assert batch.segment_ids[row].tolist() == segments
        assert batch.loss_mask[row].tolist() == weights


@pytest.mark.parametrize("segments", [False, True])
def test_a_batch_moves_to_a_device(segments):
    batch = make_batch(items([1, 2, 3]), E, reset_attention_mask=segments).to("meta")
    assert batch.tokens.device.type == "meta" and (batch.segment_ids is not None) == segments


def test_labels_further_on_count_within_their_document():
    a, b, end, c, d, e = 5, 6, 1, 7, 8, 9
    text = items([a, b, end, c, d, e])
    for flags in ({"reset_position_ids": True}, {"reset_attention_mask": True}, {"reset_position_ids": True, "reset_attention_mask": True}):
        ahead = look_ahead(make_batch(text, end, **flags), 2)
        assert ahead.labels.tolist() == [[[b, end, c, d, e], [end, c, d, e, 0], [c, d, e, 0, 0]]]
        assert ahead.loss_mask.tolist() == [[[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]]
    ahead = look_ahead(make_batch(text, end), 2)  # one text
    assert ahead.loss_mask.tolist() == [[[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]]
    ahead = look_ahead(make_batch(text, end, eod_mask_loss=True), 2)  # what follows an end is not predictable, from further back neither
    assert ahead.loss_mask.tolist() == [[[1, 1, 0, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]]
    assert look_ahead(make_batch(text, end), 9).loss_mask[0, 5:].sum() == 0  # further than the sequence is long
