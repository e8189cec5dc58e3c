"""Every tokenizer type, and what is said about files that are missing or foreign."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.tokenizers import build_tokenizer

TEXTS = ["def main():\n    return 0\n", "hello hello world", "caf\u00e9 \u4f60\u597d", ""]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer.json, the same as GPT-2 files, and a SentencePiece model, all trained on a few lines."""
    from tools import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    corpus = folder / "corpus.txt"
    corpus.write_text("hello world, hello main\ndef main(): return hello\n" * 50)
    assert train_tokenizer.main(["--input", str(corpus), "--vocab-size", "280", "--output", str(folder / "tokenizer.json")]) == 0
    model = ["--model-type", "sentencepiece", "--output", str(folder / "sp.model")]
    assert train_tokenizer.main(["--input", str(corpus), "--vocab-size", "300", *model]) == 0
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in bpe["merges"]) + "\n")
    return folder


def build(files, kind):
    return build_tokenizer(
        {
            "bytes": lambda: TokenizerConfig(tokenizer_type="ByteTokenizer"),
            "json": lambda: TokenizerConfig(tokenizer_model=str(files / "tokenizer.json")),
            "gpt2": lambda: TokenizerConfig(vocab_file=str(files / "vocab.json"), merge_file=str(files / "merges.txt")),
            "sentencepiece": lambda: TokenizerConfig(tokenizer_model=str(files / "sp.model")),
        }[kind]()
    )


@pytest.mark.parametrize("kind", ["bytes", "json", "gpt2", "sentencepiece"])
def test_text_comes_back_and_batches_equal_single_texts(files, kind):
    tokenizer = build(files, kind)
    ids = tokenizer.encode_batch(TEXTS)
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(i) for i in ids] == TEXTS
    assert all(0 <= i < tokenizer.vocab_size for document in ids for i in document) and tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["bytes", "json", "gpt2"])
def test_any_text_comes_back(files, kind):
    tokenizer = build(files, kind)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_sizes_and_ends_of_documents(files):
    assert (build(files, "bytes").vocab_size, build(files, "bytes").eod) == (257, 256)
    assert build(files, "json").eod == build(files, "gpt2").eod == 0
    assert build(files, "json").decode([0]) == "<|endoftext|>"
    assert build(files, "sentencepiece").eod == 2
    null = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer"), 100)
    assert (null.vocab_size, null.eod, null.encode("5 0\n 99"), null.decode([5, 100])) == (101, 100, [5, 0, 99], "5 100")


def test_gpt2_and_json_of_one_vocabulary_agree_but_are_told_apart(files):
    gpt2, from_json = build(files, "gpt2"), build(files, "json")
    assert gpt2.encode_batch(TEXTS) == from_json.encode_batch(TEXTS)
    assert gpt2.fingerprint != from_json.fingerprint == build(files, "json").fingerprint and len(gpt2.fingerprint) == 16


def test_fingerprint_changes_with_the_contents_and_not_with_the_name(files, tmp_path):
    content = (files / "tokenizer.json").read_text()
    (tmp_path / "same.json").write_text(content)
    (tmp_path / "other.json").write_text(content + "\n")
    same, other = (build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / n))) for n in ("same.json", "other.json"))
    assert same.fingerprint == build(files, "json").fingerprint != other.fingerprint


@pytest.mark.parametrize("text, reason", [("5 x", "'x'"), ("101", "allows 0 to 100"), ("-1", "from -1")])
def test_null_tokenizer_refuses_what_is_no_id(text, reason):
    with pytest.raises(ValueError, match=reason):
        build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer"), 100).encode(text)


def test_null_tokenizer_wants_a_size():
    with pytest.raises(ValueError, match="--vocab-size"):
        build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer"))


@pytest.mark.parametrize("flags", [
    {"tokenizer_model": "{}.json"},
    {"tokenizer_model": "{}.model"},
    {"vocab_file": "{}.json", "merge_file": "{}.txt"},
])  # fmt: skip
@pytest.mark.parametrize("content", [None, b"not a tokenizer", b"{}", b""])
def test_missing_and_foreign_files_are_named(flags, content, tmp_path):
    flags = {name: value.format(tmp_path / "file") for name, value in flags.items()}
    for path in flags.values():
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
    with pytest.raises(ValueError) as caught:
        build_tokenizer(TokenizerConfig(**flags))
    assert str(tmp_path / "file") in str(caught.value) and "; " in str(caught.value)  # the file, and what to do


def test_a_tokenizer_without_an_end_of_document_says_which_tokens_would_do(files, tmp_path):
    content = (files / "tokenizer.json").read_text()
    (tmp_path / "no-end.json").write_text(content.replace("<|endoftext|>", "<|nothing|>"))
    with pytest.raises(ValueError, match=r"</s>.*tools/train_tokenizer\.py"):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "no-end.json")))
    (tmp_path / "llama.json").write_text(content.replace("<|endoftext|>", "</s>"))
    assert build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "llama.json"))).eod == 0


def test_no_tokenizer_at_all_names_two_that_would_do():
    with pytest.raises(ValueError, match=r"ByteTokenizer.*--tokenizer-model"):
        build_tokenizer(TokenizerConfig())
