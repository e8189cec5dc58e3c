"""make_jsonl, train_tokenizer, merge_datasets, inspect_dataset: run as their command lines."""

import json

import pytest

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.tokenizers import build_tokenizer
from tools import inspect_dataset, make_jsonl, merge_datasets, preprocess_data, train_tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"a.py": b"print(1)", "sub/b.md": b"text", "sub/c.bin": b"no", "latin.txt": b"caf\xe9", "empty.py": b"",
                          "tests/d.py": b"test", "site-packages/e.py": b"other", "long.txt": b"x" * 100}.items():  # fmt: skip
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path


def corpus(*flags):
    assert make_jsonl.main(["--input", "in", "--output", "out.jsonl", *flags]) == 0
    return [json.loads(line) for line in open("out.jsonl", encoding="utf-8")]


def test_make_jsonl_takes_text_and_leaves_the_rest(folder, capsys):
    documents = corpus("--max-bytes", "50")
    assert {d["path"]: d["text"] for d in documents} == {"in/a.py": "print(1)", "in/sub/b.md": "text"}
    out = capsys.readouterr().out
    assert "2 documents" in out and "1: not UTF-8" in out and "2: smaller than --min-bytes or larger" in out


def test_make_jsonl_descends_into_tests_when_told(folder):
    assert "in/tests/d.py" in [d["path"] for d in corpus("--include-tests")]
    assert [d["path"] for d in corpus("--extensions", ".bin")] == ["in/sub/c.bin"]


def test_make_jsonl_shuffles_by_the_seed_alone(folder):
    for i in range(30):
        (folder / f"in/{i:02}.txt").write_text(str(i))
    first = corpus("--seed", "1")
    assert first == corpus("--seed", "1") != corpus("--seed", "2")
    assert [d["path"] for d in first] != sorted(d["path"] for d in first)


def test_make_jsonl_without_a_document_leaves_no_file(folder, capsys):
    assert make_jsonl.main(["--input", "in", "--output", "none.jsonl", "--extensions", ".xyz"]) == 2
    assert "no document" in capsys.readouterr().err and not (folder / "none.jsonl").exists()


def test_make_jsonl_reads_the_standard_library_by_default():
    config = make_jsonl.MakeJsonlConfig(output="x")
    files = make_jsonl.find_files(config)
    assert len(files) > 300 and not any("site-packages" in str(f) or "/test/" in str(f) for f in files)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_trained_tokenizer_preprocesses_and_is_inspected(folder, kind, capsys):
    (folder / "c.jsonl").write_text("".join(json.dumps({"body": f"hello number {i}"}) + "\n" for i in range(200)))
    output = "tokenizer.json" if kind == "bpe" else "sp.model"
    train = ["--input", "c.jsonl", "--json-key", "body", "--vocab-size", "300", "--model-type", kind, "--output", output]
    assert train_tokenizer.main(train) == 0
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=output))
    prepare = ["--input", "c.jsonl", "--json-keys", "body", "--append-eod", "--output-prefix", "c", "--workers", "0"]
    assert preprocess_data.main([*prepare, "--tokenizer-model", output]) == 0
    capsys.readouterr()
    shown = ["--input", "c_body_document", "--tokenizer-model", output, "--json"]
    assert inspect_dataset.main([*shown, "--document", "7"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text.startswith("hello number 7")
    assert inspect_dataset.main([*shown, "--top", "3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 200 and len(figures["top_tokens"]) == 3
    assert figures["made_by"]["fingerprint"] == tokenizer.fingerprint
    assert figures["sequence_length"]["min"] <= figures["sequence_length"]["median"] <= figures["sequence_length"]["max"]


def test_train_tokenizer_names_the_bad_line(folder, capsys):
    (folder / "c.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    assert train_tokenizer.main(["--input", "c.jsonl", "--output", "t.json"]) == 2
    assert "c.jsonl:2: 'text' is a int" in capsys.readouterr().err and not (folder / "t.json").exists()


@pytest.fixture
def datasets(folder):
    (folder / "parts").mkdir()
    for name in ("two", "one"):
        (folder / f"{name}.txt").write_text(name)
        assert preprocess_data.main(["--input", f"{name}.txt", "--tokenizer-type", "ByteTokenizer", "--output-prefix", f"parts/{name}",
                                     "--workers", "0"]) == 0  # fmt: skip
    return folder


def test_merge_takes_prefixes_in_order_and_folders_by_name(datasets):
    for inputs, expected in ((["parts/two_text_document", "parts/one_text_document"], [b"two", b"one"]), (["parts"], [b"one", b"two"])):
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", "all"]) == 0
        merged = IndexedDataset("all")
        assert [bytes(d.tolist()) for d in merged] == expected and merged.meta["documents"] == 2


def test_merge_says_what_is_wrong(datasets, capsys):
    for inputs, reason in ((["missing"], "missing.idx does not exist"), (["in"], "no .idx file")):
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", "all"]) == 2
        assert reason in capsys.readouterr().err


def test_inspect_prints_for_people_and_knows_its_limits(datasets, capsys):
    assert inspect_dataset.main(["--input", "parts/one_text_document", "--tokenizer-type", "ByteTokenizer"]) == 0
    out = capsys.readouterr().out
    assert "tokens: 3" in out and "1 x    101 'e'" in out
    assert inspect_dataset.main(["--input", "parts/one_text_document", "--document", "1"]) == 2
    assert "has 1 documents" in capsys.readouterr().err


def test_inspect_warns_of_another_tokenizer(datasets, capsys):
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "300"]
    assert inspect_dataset.main(["--input", "parts/one_text_document", *null]) == 0
    assert "made with another tokenizer (ByteTokenizer)" in capsys.readouterr().err
