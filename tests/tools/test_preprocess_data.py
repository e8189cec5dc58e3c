"""From text to datasets: inputs, bad lines, dead workers, and nothing half done."""

import glob
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_moe.data import corpus
from megatron_moe.data.corpus import lines_of, whole_lines
from megatron_moe.data.indexed_dataset import IndexedDataset
from tools import preprocess_data

GOOD = b'{"text": "one"}\n{"text": "two", "title": "2"}\n'
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(content, *flags) -> exit code, stderr, documents. The content is the file corpus.jsonl; without flags in one process."""
    monkeypatch.chdir(tmp_path)

    def call(content, *flags, name="corpus.jsonl", inputs=None, key="text"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        arguments = ["--input", *(inputs or [name]), "--tokenizer-type", "ByteTokenizer", "--output-prefix", "out", "--workers", "0"]
        code = preprocess_data.main([*arguments, *flags])
        out, err = capsys.readouterr()
        documents = None
        if os.path.exists(f"out_{key}_document.idx"):
            dataset = IndexedDataset(f"out_{key}_document")
            documents = [bytes(dataset[i].tolist()) if 256 not in dataset[i] else dataset[i].tolist() for i in range(len(dataset))]
        return SimpleNamespace(code=code, err=err, out=out, documents=documents)

    return call


def published(folder="."):
    return [path for path in glob.glob(f"{folder}/out*") if not path.endswith("_bad_lines.txt")]


def test_lines_become_documents(run):
    result = run(GOOD)
    assert (result.code, result.documents) == (0, [b"one", b"two"])
    meta = json.loads(Path("out_text_document.meta.json").read_text())
    assert meta.pop("fingerprint") and meta == {"tokenizer_type": "ByteTokenizer", "vocab_size": 257, "eod": 256,
                                                "append_eod": False, "documents": 2, "tokens": 6}  # fmt: skip
    assert "2 documents, 6 tokens" in result.out and "MB/s" in result.out


def test_eod_counts_in_the_sizes(run):
    assert run(GOOD, "--append-eod").documents == [[*b"one", 256], [*b"two", 256]]
    dataset = IndexedDataset("out_text_document")
    assert dataset.sizes.tolist() == [4, 4] and os.path.getsize("out_text_document.bin") == 16


def test_several_keys_make_several_datasets(run):
    content = b'{"text": "one", "title": "1"}\n{"text": "two", "title": "2"}\n'
    assert run(content, "--json-keys", "text", "title").documents == [b"one", b"two"]
    assert [bytes(d.tolist()) for d in IndexedDataset("out_title_document")] == [b"1", b"2"]


def zstd(content):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.dat", "corpus"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, lambda c: gzip.compress(c[:5]) + gzip.compress(c[5:]),
                                  lambda c: zstd(c[:5]) + zstd(c[5:])], ids=["plain", "gzip", "zstd", "2 gzips", "2 zstds"])  # fmt: skip
def test_compression_is_told_from_the_contents_and_not_from_the_name(run, pack, name):
    assert run(pack(GOOD), name=name).documents == [b"one", b"two"]


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_truncated_file_is_named(run, pack):
    content = pack(GOOD * 500)
    result = run(content[: len(content) // 2], "--on-bad-line", "skip")
    assert result.code == 2 and "corpus.jsonl: the" in result.err and "ends too early" in result.err and not published()


def test_a_damaged_file_is_named(run):
    content = bytearray(gzip.compress(GOOD * 500))
    content[-6] ^= 1  # the checksum
    result = run(bytes(content))
    assert result.code == 2 and "corpus.jsonl: damaged gzip data" in result.err and not published()


@pytest.mark.parametrize("content, kind", [(b"BZh91AY", "bzip2"), (GOOD.decode().encode("utf-16"), "UTF-16")])
def test_other_kinds_of_file_are_called_by_their_name(run, content, kind):
    result = run(content)
    assert result.code == 2 and f"corpus.jsonl is {kind}" in result.err


BAD = {
    "bad JSON": (b'{"text": "x"', "not valid JSON"),
    "missing key": (b'{"txet": "x"}', "no key 'text'; it has 'txet'"),
    "null": (b'{"text": null}', "'text' is null"),
    "number": (b'{"text": 5}', "'text' is a int"),
    "array": (b'["x"]', "a JSON list, not an object"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at offset 13)"),
    "blank": (b"", "blank line"),
    "blanks": (b"  \t", "blank line"),
    "surrogate": (b'{"text": "\\ud800"}', "half a surrogate pair"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
    "second BOM": (BOM + b'{"text": "x"}', "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_stops_everything(run, kind):
    line, reason = BAD[kind]
    result = run(GOOD + line + b"\n" + GOOD)
    assert result.code == 2 and f"corpus.jsonl:3: {reason}" in result.err, result.err
    assert "--on-bad-line skip" in result.err and not published()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_can_be_left_out_and_is_reported(run, kind):
    line, reason = BAD[kind]
    result = run(GOOD + line + b"\n" + GOOD, "--on-bad-line", "skip", "--max-bad-fraction", "0.2")
    assert result.code == 0 and result.documents == [b"one", b"two"] * 2 and "1 bad lines" in result.out
    assert Path("out_bad_lines.txt").read_text().startswith(f"corpus.jsonl:3: {reason}")


def test_too_many_bad_lines_fail(run):
    result = run(GOOD + b"x\n", "--on-bad-line", "skip")
    assert result.code == 2 and "1 of 3 lines are bad, more than --max-bad-fraction 0.01" in result.err and not published()


def test_what_the_tokenizer_refuses_is_a_bad_line_too(run):
    content = b'{"text": "1 2"}\n{"text": "1 9"}\n{"text": "3"}\n'
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "5"]
    result = run(content, *null)
    assert result.code == 2 and "corpus.jsonl:2: the tokenizer refuses it" in result.err
    assert run(content, *null, "--on-bad-line", "skip", "--max-bad-fraction", "0.5").documents == [b"\1\2", b"\3"]


@pytest.mark.parametrize("content", [BOM + GOOD, GOOD.replace(b"\n", b"\r\n"), GOOD.rstrip(b"\n")], ids=["BOM", "CRLF", "no last newline"])
def test_harmless_oddities_are_accepted(run, content):
    assert run(content).documents == [b"one", b"two"]


def test_empty_documents_are_left_out_and_counted(run):
    result = run(b'{"text": ""}\n' + GOOD, "--append-eod")
    assert len(result.documents) == 2 and "left out: 1 documents" in result.out


@pytest.mark.parametrize("content", [b"", b'{"text": ""}\n', BOM])
def test_an_input_without_any_document_is_an_error(run, content):
    result = run(content)
    assert result.code == 2 and "no document" in result.err and not published()


def test_plain_text_is_one_document_per_file(run, tmp_path):
    (tmp_path / "b.md").write_bytes(BOM + b"{second}\n\nfile")
    assert run(b"first\nfile", name="a.txt", inputs=["a.txt", "b.md"]).documents == [b"first\nfile", b"{second}\n\nfile"]
    assert run(GOOD, "--input-format", "text").documents == [GOOD]
    result = run(b"caf\xe9", name="bad.txt")
    assert result.code == 2 and "bad.txt: not UTF-8" in result.err
    assert "--json-keys" in run(b"x", "--json-keys", "title", name="a.txt").err


def test_globs_are_sorted_and_globs_that_match_nothing_are_an_error(run, tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert run(None, inputs=["*.jsonl"]).documents == [b"a", b"b"]
    for inputs, reason in ((["*.txt"], "matches none"), (["."], "is a folder"), (["a.jsonl", "*.jsonl"], "more than once")):
        result = run(None, inputs=inputs)
        assert result.code == 2 and reason in result.err


def test_an_id_that_does_not_fit_the_dtype_is_refused(run, monkeypatch):
    monkeypatch.setattr(preprocess_data.build_tokenizer.__globals__["ByteTokenizer"], "encode", lambda self, text: [70000])
    result = run(GOOD)
    assert result.code == 2 and "token id 70000 does not fit uint16" in result.err and not published()


def test_mistakes_on_the_command_line_are_told_together(capsys):
    with pytest.raises(SystemExit) as caught:
        preprocess_data.main(["--tokenizer-type", "HFTokenizer", "--output-prefix", "no/such/folder/x", "--wrokers", "2"])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "did you mean --workers" in err
    with pytest.raises(SystemExit):
        preprocess_data.main(["--tokenizer-type", "HFTokenizer", "--output-prefix", "no/such/folder/x"])
    err = capsys.readouterr().err
    assert all(part in err for part in ("--input FILE", "no folder", "HFTokenizer needs --tokenizer-model"))


def test_long_lines_and_lines_across_chunks_stay_whole():
    text = b"ab\n\nc" + b"x" * 1000 + b"\nend"
    chunks = [text[i : i + 3] for i in range(0, len(text), 3)]
    for size in (1, 4, 10**6):
        blocks = list(whole_lines(chunks, size))
        assert [line for block in blocks for line in lines_of(block)] == text.split(b"\n")
        assert all(block.endswith(b"\n") for block in blocks[:-1]) and len(blocks) == {1: 4, 4: 3, 10**6: 1}[size]
    assert lines_of(b"a\n") == [b"a"] and lines_of(b"\n") == [b""] and lines_of(b"") == [] and list(whole_lines([], 1)) == []


def test_workers_change_nothing(run, monkeypatch):
    for name in ("READ_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(corpus, name, 100)
    content = b"".join(json.dumps({"text": "x" * n}).encode() + b"\n" for n in range(1, 60))
    alone = run(content)
    files = [Path(f"out_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]
    together = run(content, "--workers", "2")
    assert together.documents == alone.documents
    assert files == [Path(f"out_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]


# ---------------------------------------------------------------- as a process of its own


def start(folder, *flags):
    command = [sys.executable, os.path.abspath(preprocess_data.__file__), "--tokenizer-type", "ByteTokenizer", "--output-prefix", "out"]
    return subprocess.Popen([*command, *flags], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def worker_pids(parent, count):
    """Processes that the pool of `parent` has spawned; waits until there are `count`."""
    for _ in range(300):
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = file.read().split()
        pids = [int(pid) for pid in children if b"spawn_main" in _command(int(pid))]
        if len(pids) == count:
            return pids
        time.sleep(0.1)
    raise AssertionError(f"{count} workers did not start")


def test_standard_input_is_read(tmp_path):
    process = start(tmp_path, "--input", "-", "--workers", "0")
    out, err = process.communicate(gzip.compress(GOOD), timeout=60)
    assert process.returncode == 0, err
    assert len(IndexedDataset(str(tmp_path / "out_text_document"))) == 2
    process = start(tmp_path, "--input", "-", "--workers", "0")
    _, err = process.communicate(GOOD + b"{\n", timeout=60)
    assert process.returncode == 2 and b"standard input:3: not valid JSON" in err


on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds worker processes through /proc")


def feed(process, blocks):
    process.stdin.write(b'{"text": "some words"}\n' * (blocks * corpus.BLOCK_BYTES // 23))
    process.stdin.flush()


@pytest.mark.fault
@on_linux
def test_a_killed_worker_does_not_hang_and_nothing_is_published(tmp_path):
    process = start(tmp_path, "--input", "-", "--workers", "2")
    feed(process, 3)
    os.kill(worker_pids(process.pid, 2)[0], signal.SIGKILL)
    _, err = process.communicate(b'{"text": "more"}\n' * 50_000, timeout=60)
    assert process.returncode == 1 and b"a worker process died" in err and b"Traceback" not in err, err
    assert os.listdir(tmp_path) == []


@pytest.mark.fault
@on_linux
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_cleans_up(number, code, tmp_path):
    process = start(tmp_path, "--input", "-", "--workers", "1")
    feed(process, 3)
    worker_pids(process.pid, 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and b"Traceback" not in err, err
    assert os.listdir(tmp_path) == []


@pytest.mark.fault
@on_linux
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    process = start(tmp_path, "--input", "-", "--workers", "2")
    feed(process, 3)
    workers = worker_pids(process.pid, 2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") and b"spawn_main" in _command(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.1)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for one that has ended and waits to be reaped
    except FileNotFoundError:
        return b""
