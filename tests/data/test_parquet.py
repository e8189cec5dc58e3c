"""Parquet as input of the data tools: the same documents as from JSONL, and its own kinds of bad input."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_moe.data import corpus
from megatron_moe.data.corpus import Input
from tools import preprocess_data, train_tokenizer

TEXTS = [f"row {i} \u20ac " * (i % 5 + 1) for i in range(100)]


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture
def write(arrow, tmp_path):
    """write(name, **columns): a Parquet file of row groups of 30 rows."""

    def call(name, compression="zstd", **columns):
        from pyarrow import parquet

        parquet.write_table(arrow.table(columns), tmp_path / name, row_group_size=30, compression=compression)
        return str(tmp_path / name)

    return call


@pytest.fixture
def run(tmp_path, capsys):
    """run(inputs, *flags) -> exit code, stdout, stderr, contents of .bin and .idx by key."""

    def call(inputs, *flags, keys=("text",)):
        code = preprocess_data.main(["--input", *inputs, "--tokenizer-type", "ByteTokenizer", "--output-prefix", str(tmp_path / "out"),
                                     "--workers", "0", "--json-keys", *keys, *flags])  # fmt: skip
        out, err = capsys.readouterr()
        prefixes = [f"{tmp_path}/out_{key}_document" for key in keys]
        files = [Path(p + s).read_bytes() for p in prefixes for s in (".bin", ".idx")] if code == 0 else None
        for path in tmp_path.glob("out_*_document*"):
            path.unlink()
        return SimpleNamespace(code=code, out=out, err=err, files=files)

    return call


def jsonl(tmp_path, rows):
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_the_same_texts_make_the_same_files_as_from_jsonl(arrow, write, run, tmp_path, compression):
    titles = [text[:5] for text in TEXTS]
    path = write("x.parquet", compression, text=TEXTS, n=list(range(100)), title=arrow.array(titles, arrow.large_string()))
    same = jsonl(tmp_path, [{"text": a, "title": b} for a, b in zip(TEXTS, titles)])
    ours, theirs = (run([p], "--append-eod", keys=("title", "text")) for p in (path, same))
    assert ours.code == 0 and ours.files == theirs.files, ours.err
    assert "100 documents" in ours.out


def test_a_glob_of_parquet_mixes_with_jsonl_and_the_name_does_not_matter(write, run, tmp_path):
    for name, part in (("a.parquet", TEXTS[:40]), ("b.parquet", TEXTS[40:70])):
        write(name, text=part)
    (tmp_path / "b.parquet").rename(tmp_path / "b.data")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[70:]))
    mixed = run([f"{tmp_path}/*.parquet", f"{tmp_path}/b.data", f"{tmp_path}/c.jsonl"])
    assert mixed.code == 0 and mixed.files == run([jsonl(tmp_path, [{"text": text} for text in TEXTS])]).files


def test_it_is_streamed_in_blocks_within_row_groups_and_reports_how_far_it_is(write, tmp_path):
    path = write("x.parquet", text=TEXTS)
    source = Input(path)
    sizes, progress = [], []
    for block in source.blocks(("text",), 200):
        sizes.append(block.content.num_rows)
        progress.append(source.bytes_read)
    assert sum(sizes) == 100 and max(sizes) < 30 and len(sizes) > 8
    assert progress == sorted(progress) and progress[0] < progress[-1] == Path(path).stat().st_size


def test_a_dictionary_column_is_text_too(arrow, write, run, tmp_path):
    path = write("x.parquet", text=arrow.array(["b", "a", "b"]).dictionary_encode())
    assert run([path]).files == run([jsonl(tmp_path, [{"text": t} for t in "bab"])]).files


def test_rows_without_text_are_bad_records_with_their_number(write, run, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 100)
    path = write("x.parquet", text=[*TEXTS[:60], None, *TEXTS[60:]])
    result = run([path])
    assert result.code == 2 and f"{path}:61: 'text' is null" in result.err and "--on-bad-line skip" in result.err
    skipped = run([path], "--on-bad-line", "skip")
    assert skipped.code == 0 and skipped.files == run([jsonl(tmp_path, [{"text": text} for text in TEXTS])]).files


def test_a_row_that_is_no_utf8_is_a_bad_record(arrow, write, run):
    raw = arrow.array([b"good", b"caf\xe9", b"fine"], arrow.binary())
    path = write("x.parquet", text=arrow.Array.from_buffers(arrow.string(), 3, raw.buffers()))
    result = run([path])
    assert result.code == 2 and f"{path}:2: not UTF-8 (byte 0xe9 at offset 3)" in result.err


def test_columns_that_are_missing_or_no_text_are_named(write, run):
    path = write("x.parquet", body=TEXTS, n=list(range(100)))
    assert "no column 'text'; it has 'body', 'n' (--json-keys chooses)" in run([path]).err
    result = run([path], keys=("n",))
    assert result.code == 2 and "column 'n' holds int64, not text" in result.err


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"PAR1....", lambda c: c[:10] + b"\xff" * 200 + c[210:]],
                         ids=["cut", "nothing", "page"])  # fmt: skip
def test_a_damaged_file_is_named(write, run, tmp_path, damage):
    path = Path(write("x.parquet", text=[t * 20 for t in TEXTS]))
    path.write_bytes(damage(path.read_bytes()))
    result = run([str(path)], "--on-bad-line", "skip")
    assert result.code == 2 and f"{path}: damaged Parquet data" in result.err


def test_a_tokenizer_can_be_trained_on_it(write, tmp_path):
    path = write("x.parquet", text=TEXTS)
    assert train_tokenizer.main(["--input", path, "--vocab-size", "300", "--output", str(tmp_path / "t.json")]) == 0


def test_without_pyarrow_the_message_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1....")
    result = run([str(tmp_path / "x.parquet")])
    assert result.code == 2 and "x.parquet is Parquet, and that needs the Python package pyarrow; pip install pyarrow" in result.err


def test_parquet_through_a_pipe_is_refused(tmp_path, monkeypatch, run):
    (tmp_path / "x").write_bytes(b"PAR1....")
    with open(tmp_path / "x") as file:
        monkeypatch.setattr(sys, "stdin", file)
        result = run(["-"])
    assert result.code == 2 and "standard input is Parquet, which is read from its end" in result.err
