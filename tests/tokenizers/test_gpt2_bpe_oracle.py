"""The fast GPT-2 tokenizer gives the ids of a slow one that was written for reading."""

import json
import sys
import unicodedata

import pytest
from gpt2_bpe_oracle import GPT2BPEOracle, piece_pattern, printable_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.tokenizers import build_tokenizer

# What was a character twenty years ago: about later ones the Unicode tables of two libraries may disagree.
ASSIGNED = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")]

CORPUS = (
    """The quick brown fox can't jump; it'll walk, they've said. I'm sure you'd agree, we're done: 1234 567 3.14159.
def main(argument_one, argument_two):\n        return [x ** 2 for x in range(100)]\n\n\n\tif __name__ == "__main__":
        main(1, 2)   # trailing space   \nna\u00efve caf\u00e9, Stra\u00dfe, \u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c, \u4f60\u597d\u4e16\u754c,
\u3053\u3093\u306b\u3061\u306f \U0001f600\U0001f680 \u0627\u0644\u0633\u0644\u0627\u0645 \u0905\u0928\u0941\u091a\u094d\u091b\u0947\u0926
"""
    * 3
)

TEXTS = [
    "", " ", "  ", "\n", "\r\n\r\n", "a", " a", "  a", "   a  b   ", "a\n b", "a \n\n  b\t\tc ", "\t\n\x0b\x0c\r", "end with spaces   ",
    "can't CAN'T it's we'll they've I'm he'd you're 's 'S ''s 'tis o'clock don''t l'l 'll've", "x='s't", "'", "''''", "\u2019s it\u2019s",
    "1 22 333 4,444.55 0x1F 1e-9 10% \u00bd \u2163 \u0661\u0662\u0663 7th a1b2c3 1\u00b2", "!!! ... ?! -- == => :: <|endoftext|> $5 #x @y &&",
    "snake_case camelCase __init__ a.b.c /usr/lib C:\\x <br/> {}[]()", "\u4f60\u597d\u4e16\u754c hello\u4e16\u754c123 \u3053\u3093\u306b\u3061\u306f\u3002 \uc548\ub155",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea\u2764\ufe0f x\U0001f680y",
    "e\u0301 \u00e9 a\u0300\u0316b \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22", "\x00\x01\x1b[0m\x7f\x85\x9f \x1c\x1d\x1e\x1f a\x1cb \xad \ufeff \ufffd",
    "a\u00a0b \u2003 \u2028x\u2029 \u3000\u4e2d \u200b\u200dz \u1680q \u202fr", "the the the theme other fox foxes quick quickly jump", "A" * 70 + " " * 70 + "\n" * 20,
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(the fast one, the oracle) over files that the `tokenizers` library trained, merges across bytes of one character included."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("gpt2")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([CORPUS], trainer)
    vocab, merges = trained.model.save(str(folder))
    assert len(json.loads((folder / "vocab.json").read_text(encoding="utf-8"))) > 450
    return build_tokenizer(TokenizerConfig(vocab_file=vocab, merge_file=merges)), GPT2BPEOracle(vocab, merges)


def test_bytes_have_the_characters_of_gpt2():
    table = printable_bytes()
    assert [table[b] for b in (0, 10, 32, 33, 126, 127, 160, 161, 173, 174, 255)] == list(
        "\u0100\u010a\u0120!~\u0121\u0142\u00a1\u0143\u00ae\u00ff"
    )
    assert len(set(table.values())) == 256


def test_pieces_are_those_of_gpt2():
    cut = piece_pattern().findall
    assert cut("I'll say  hello\n\n 12ab") == ["I", "'ll", " say", " ", " hello", "\n\n", " 12", "ab"]
    assert cut("end  \n") == ["end", "  \n"] and cut("a\tb IT'S") == ["a", "\t", "b", " IT", "'", "S"]


def test_merges_go_by_rank_and_from_the_left(tmp_path):
    letters = [*printable_bytes().values(), "aa", "ab", "aab"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*letters, "<|endoftext|>"])}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na a\na ab\n", encoding="utf-8")
    oracle = GPT2BPEOracle(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert [oracle.merged(t) for t in ("aab", "aaaa", "aaa", "b")] == [["aab"], ["aa", "aa"], ["aa", "a"], ["b"]]
    fast = build_tokenizer(TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")))
    for text in ("aab", "aaaa", "aaa", "b", "baab aaab aaaab"):
        assert fast.encode(text) == oracle.encode(text)


@pytest.mark.parametrize("text", [*TEXTS, CORPUS])
def test_ids_are_equal_and_the_text_comes_back(both, text):
    fast, slow = both
    ids = slow.encode(text)
    assert fast.encode(text) == ids and fast.encode_batch([text, text]) == [ids, ids]
    assert slow.decode(ids) == fast.decode(ids) == text


def test_every_character_is_cut_alike(both):
    """Beside a letter, a digit, a space and a sign: whichever kind it is of, that shows."""
    fast, slow = both
    low = [c for c in ASSIGNED if c < "\u3400"]
    characters = low + ASSIGNED[len(low) :: 16]  # from there on thousands in a row are of one kind
    for first in range(0, len(characters), 1000):
        text = "".join(f"a{c}1{c} {c}!{c}{c} " for c in characters[first : first + 1000])
        assert fast.encode(text) == slow.encode(text), f"among U+{ord(characters[first]):04X} and the following"


MIXED = st.one_of(st.sampled_from(ASSIGNED), st.sampled_from([*" \n\t'", "'s", "'ll", "  ", "the", "\u4f60", "\U0001f600", "7"]))


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(MIXED, max_size=40))
def test_any_text_has_equal_ids(both, parts):
    fast, slow = both
    text = "".join(parts)
    ids = slow.encode(text)
    assert fast.encode(text) == ids and fast.decode(ids) == slow.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_decode_alike(both, data):
    """Also those that are no whole characters, as a model may write them."""
    fast, slow = both
    ids = data.draw(st.lists(st.integers(0, fast.vocab_size - 1).filter(lambda i: i != fast.eod), max_size=20))
    assert fast.decode(ids) == slow.decode(ids)
