"""Tokens that come one by one: no torn characters, no stop string, and together the text of all at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.inference.text import Detokenizer, StopScanner, TextStream, TokenIds
from megatron_moe.tokenizers.plain import ByteTokenizer

BYTES = ByteTokenizer()


def pieces_of(decoder, ids, prompt=()):
    detokenizer = Detokenizer(decoder, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.end()]


@pytest.mark.parametrize("text", ["plain", "Gr\u00fc\u00dfe, \u65e5\u672c\u8a9e \U0001f600!", "\U0001f469\u200d\U0001f467" * 30, "x" * 200])
def test_characters_come_whole_and_together_they_are_the_text(text):
    pieces = pieces_of(BYTES, BYTES.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing was kept back that was complete


@given(st.lists(st.integers(0, 255), max_size=150), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_the_text_that_they_are_at_once(ids, cut):
    """Bytes that are no text too, and a prompt that ends within a character."""
    prompt, new = ids[:cut], ids[cut:]
    head = BYTES.decode(prompt).rstrip("\ufffd")
    together = "".join(pieces_of(BYTES, new, prompt))
    assert BYTES.decode(ids).startswith(head)
    assert BYTES.decode(ids).endswith(together)
    if not prompt:
        assert together == BYTES.decode(ids)


def test_a_decoder_that_drops_the_first_blank_sees_the_prompt():
    class Pieces:
        def decode(self, ids):
            return "".join([" the", " cat", "s"][i] for i in ids).removeprefix(" ")

    assert pieces_of(Pieces(), [1, 2, 0], prompt=[0]) == [" cat", "s", " the", ""]
    assert pieces_of(TokenIds(), [5, 17]) == ["5", " 17", ""]


def test_a_byte_level_bpe_gives_whole_characters():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    text = "ab \u65e5\u672c \U0001f600 ab" * 9
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([text], trainer)
    pieces = pieces_of(backend, backend.encode(text).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["A E", "N", "T", "END."], ["END"], ["A ", "", "ENT", ""]),  # the worked example
        (["a\n", "\nUser: b"], ["\n\nUser:", "\nUser:"], ["a", ""]),
        (["xaab"], ["ab"], ["xa"]),
        (["aa", "a", "b"], ["aab"], ["", "a", ""]),
        (["abc"], ["abc", "b"], ["a"]),  # b is complete first
        (["no stop"], [], ["no stop"]),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, shown):
    scanner = StopScanner(stops)
    assert [scanner.push(piece) for piece in pieces] == shown
    assert scanner.stopped == bool(stops)
    assert scanner.push("more") == ("" if stops else "more")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_where_the_pieces_are_cut_does_not_matter(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    scanner, letters = StopScanner(stops), StopScanner(stops)
    shown = "".join(scanner.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)])) + scanner.end()
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(stop) for stop in stops)]
    if ends:  # by definition: up to the first character at which one is complete, without the longest such one
        before = text[: ends[0]]
        assert shown == before[: -max(len(stop) for stop in stops if before.endswith(stop))]
    else:
        assert shown == text
    assert shown == "".join(letters.push(letter) for letter in text) + letters.end()


def test_a_stop_string_may_begin_within_a_token_and_end_in_another():
    text = TextStream(BYTES, stops=["\u00dfe"])
    assert "".join(text.push(token) for token in BYTES.encode("Gr\u00fc\u00dfe und")) + text.end() == "Gr\u00fc"
    assert text.stopped
