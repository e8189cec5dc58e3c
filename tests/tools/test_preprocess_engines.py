"""preprocess_data with gigatoken in place of tokenizers: the same files, compared before it is trusted, and no silent choice.

The package is optional. What the tool does with it is tested everywhere with a stand-in that tokenizes with `tokenizers`, and can be
told to be wrong; that the real one makes the same files, where it is installed.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.data import corpus
from megatron_moe.tokenizers import build_tokenizer
from megatron_moe.tokenizers.gigatoken import PROBES, GigatokenTokenizer, first_difference, probes_for
from tools import preprocess_data, train_tokenizer

STAND_IN = """
import numpy as np
import tokenizers

WRONG = {wrong!r}  # texts with this in them get an id too few


class Tokenizer:
    @classmethod
    def from_json(cls, content):
        if {refuses!r}:
            raise RuntimeError("pre-tokenizer of a kind I do not know")
        self = cls()
        self.backend = self
        self.library = tokenizers.Tokenizer.from_str(content)
        return self

    def encode(self, text):
        ids = self.library.encode(text, add_special_tokens=False).ids
        return np.array(ids[1:] if WRONG and WRONG in text else ids, np.uint32)
"""
SENTENCES = [f"Document {i}: the cost is {i * 37} \u20ac, it's na\u00efve \u4f60\u597d{' and so on' * (i % 7)}.\n" for i in range(200)]
requires_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """corpus.jsonl, with an empty and a bad document, and tokenizer.json."""
    path = tmp_path_factory.mktemp("engines")
    lines = [json.dumps({"text": text, "title": text[:11]}) for text in SENTENCES]
    lines[50:50] = ['{"text": "", "title": "<|endoftext|>"}', "no JSON"]
    (path / "corpus.jsonl").write_text("\n".join(lines))
    (path / "words.jsonl").write_text("\n".join(lines[:50]))
    arguments = ["--input", str(path / "words.jsonl"), "--vocab-size", "300", "--output", str(path / "tokenizer.json")]
    assert train_tokenizer.main(arguments) == 0
    return path


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(wrong="", refuses=False): from then on `gigatoken` is this module, in worker processes, too."""

    def install(wrong="", refuses=False):
        (tmp_path / "gigatoken.py").write_text(STAND_IN.format(wrong=wrong, refuses=refuses))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "gigatoken", raising=False)

    yield install
    sys.modules.pop("gigatoken", None)


@pytest.fixture
def run(folder, tmp_path, capsys):
    """run(engine, *flags) -> exit code, stdout, stderr, the files by name."""

    def call(engine, *flags, name="corpus.jsonl"):
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        for path in output.iterdir():
            path.unlink()
        code = preprocess_data.main([
            "--input", str(folder / name), "--tokenizer-model", str(folder / "tokenizer.json"), "--output-prefix", str(output / "x"),
            "--on-bad-line", "skip", "--tokenizer-engine", engine, *flags])  # fmt: skip
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, files={path.name: path.read_bytes() for path in output.iterdir()})

    return call


KEYS = ("--json-keys", "text", "title")


@pytest.mark.parametrize("flags", [(), ("--append-eod",), (*KEYS, "--append-eod")], ids=["plain", "eod", "two keys"])
def test_both_engines_write_the_same_files(run, stand_in, flags):
    stand_in()
    theirs, ours = run("tokenizers", *flags), run("gigatoken", *flags)
    assert ours.code == theirs.code == 0, ours.err
    assert len(ours.files) == 3 * (2 if KEYS[0] in flags else 1) + 1 and ours.files == theirs.files
    assert "gigatoken: its ids equal those of tokenizers on " in ours.out and "gigatoken" not in theirs.out


def test_workers_and_the_parent_share_the_work_and_change_nothing(run, stand_in, monkeypatch):
    stand_in()
    alone = run("gigatoken", "--append-eod")
    for name in ("READ_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(corpus, name, 300)
    monkeypatch.setattr(preprocess_data, "WORKERS_FROM", 0)
    taken, starting = {"workers": 0, "parent": 0}, []
    submit, call = preprocess_data.ProcessPoolExecutor.submit, preprocess_data.Encoder.__call__

    def counted_submit(self, function, *args):
        future = submit(self, function, *args)
        if function is preprocess_data.encode_handful:
            taken["workers"] += 1
        else:
            starting.append(future)
        return future

    def counted_call(self, batch):
        taken["parent"] += 1
        if taken["parent"] == 3:  # in the middle of its work the workers have started
            for future in starting:
                future.result(60)
        return call(self, batch)

    monkeypatch.setattr(preprocess_data.ProcessPoolExecutor, "submit", counted_submit)
    monkeypatch.setattr(preprocess_data.Encoder, "__call__", counted_call)
    shared = run("gigatoken", "--append-eod", "--workers", "2")
    assert shared.code == 0 and shared.files == alone.files, shared.err
    assert taken["parent"] >= 3 and taken["workers"] > 1, taken


def test_auto_takes_it_where_it_is_installed_and_says_so(run, stand_in):
    stand_in()
    result = run("auto")
    assert result.code == 0 and "gigatoken: its ids equal those of tokenizers on " in result.out


@pytest.mark.parametrize("wrong, place", [("Document 7:", "corpus.jsonl:8"), ("caf\u00e9", "the built-in text")], ids=["data", "probe"])
def test_a_difference_names_the_first_document_and_auto_goes_on_with_tokenizers(run, stand_in, monkeypatch, wrong, place):
    monkeypatch.setattr(preprocess_data, "SAMPLED_DOCUMENTS", 1000)
    stand_in(wrong)
    asked = run("gigatoken")
    assert asked.code == 2 and place in asked.err and "--tokenizer-engine tokenizers" in asked.err and not asked.files
    auto = run("auto")
    lines = [line for line in auto.out.splitlines() if "gigatoken" in line]
    assert auto.code == 0 and len(lines) == 1 and "its ids differ from those of tokenizers, first in" in lines[0] and place in lines[0]
    assert auto.files == run("tokenizers").files


def test_a_tokenizer_that_it_cannot_load_is_an_error_or_a_line(run, stand_in):
    stand_in(refuses=True)
    asked, auto = run("gigatoken"), run("auto")
    assert asked.code == 2 and "cannot load this tokenizer (pre-tokenizer of a kind I do not know)" in asked.err
    assert auto.code == 0 and "not by gigatoken: " in auto.out


def test_truncation_and_padding_are_left_to_tokenizers(run, stand_in, folder, tmp_path):
    stand_in()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "short.json").write_text(json.dumps(tokenizer))
    result = run("gigatoken", "--tokenizer-model", str(tmp_path / "short.json"))
    assert result.code == 2 and "truncation or padding" in result.err


def test_without_the_package_auto_says_nothing_and_asking_for_it_is_an_error(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gigatoken" else find(name, *rest))
    auto, asked = run("auto"), run("gigatoken")
    assert auto.code == 0 and "gigatoken" not in auto.out
    assert asked.code == 2 and "gigatoken is not installed; pip install gigatoken" in asked.err


def test_other_tokenizers_have_no_engine(run):
    assert run("auto", "--tokenizer-type", "ByteTokenizer").code == 0
    asked = run("gigatoken", "--tokenizer-type", "ByteTokenizer")
    assert asked.code == 2 and "it reads tokenizers of the library `tokenizers`" in asked.err


def test_the_sample_has_documents_of_every_input(run, stand_in, folder, monkeypatch):
    stand_in("only in the second file")
    (folder / "second.jsonl").write_text('{"text": "only in the second file"}\n')
    result = run("gigatoken", "--input", str(folder / "corpus.jsonl"), str(folder / "second.jsonl"))
    assert result.code == 2 and "first in " in result.err and "second.jsonl:1" in result.err


def test_the_last_line_shows_what_the_time_went_into(run, stand_in):
    stand_in()
    for engine in ("gigatoken", "tokenizers"):
        last = run(engine).out.splitlines()[1 + (engine == "gigatoken")]
        shares = [int(part.split()[-1].rstrip("%)")) for part in last.partition("(")[2].split(", ")]
        assert all(work in last for work in preprocess_data.WORK) and 98 <= sum(shares) <= 102, last


@requires_gigatoken
@pytest.mark.parametrize("flags", [(), (*KEYS, "--append-eod", "--workers", "1")], ids=["plain", "all"])
def test_gigatoken_itself_writes_the_same_files(run, monkeypatch, flags):
    monkeypatch.setattr(preprocess_data, "WORKERS_FROM", 0)
    theirs, ours = run("tokenizers", *flags), run("gigatoken", *flags)
    assert ours.code == 0 and ours.files == theirs.files, ours.err


@requires_gigatoken
def test_gigatoken_itself_makes_the_same_ids_for_hard_texts(folder):
    base = build_tokenizer(TokenizerConfig(tokenizer_model=str(folder / "tokenizer.json")))
    fast = GigatokenTokenizer(base)
    texts = [*probes_for(base), *SENTENCES]
    assert first_difference(base, fast, ((text, text) for text in texts)) is None and len(texts) > len(PROBES)
    ids, sizes = fast.encode_flat(texts)
    expected_ids, expected_sizes = base.encode_flat(texts)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(sizes, expected_sizes)
    assert fast.decode(fast.encode(SENTENCES[3])) == SENTENCES[3] and (fast.eod, fast.vocab_size) == (base.eod, base.vocab_size)


def test_the_files_of_gpt2_are_handed_over_as_one_json(folder, tmp_path, stand_in):
    stand_in()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    base = build_tokenizer(TokenizerConfig(**files))
    assert first_difference(base, GigatokenTokenizer(base), ((text, text) for text in SENTENCES)) is None
    assert Path(files["vocab_file"]).exists()
