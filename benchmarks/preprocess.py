"""MB/s from JSONL to .bin/.idx (tools/preprocess_data.py), against tokenizers.encode_batch_fast alone on the same text and cores

Ours is the whole command in processes of its own: start-up, reading, parsing, tokenizing, checking, writing. The limit is
encode_batch_fast with a thread per core on strings that are in memory already, whose results are thrown away. The same command on one
line, in the same rounds, says what of ours is start-up.

The corpus is the standard library of the Python that runs, its tests and the packages that are installed, the tokenizer is trained on
the library without its tests: all by our tools.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Options, Report, System, Times, interleave, paired_ratio, spread, table, timing_table

PEERS: dict[str, str] = {}

ROOT = Path(__file__).resolve().parents[1]
LIMIT, OURS, START = "encode_batch_fast", "preprocess_data.py", "preprocess_data.py on one line"


def run(options: Options) -> Report:
    cores = len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)  # threads of `tokenizers`, read when it starts its first
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = make_corpus(Path(folder), options.quick)
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        one_line = corpus.with_name("one_line.jsonl")
        one_line.write_text(json.dumps({"text": "one line"}) + "\n")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        report = Report("preprocess", {"documents": len(texts), "megabytes": round(megabytes, 2), "workers": cores, "threads": cores})
        encode = limit_of(tokenizer)
        systems = [
            System(LIMIT, lambda: encode(texts)),
            System(OURS, lambda: preprocess(corpus, tokenizer, cores)),
            System(START, lambda: preprocess(one_line, tokenizer, cores)),
        ]
        samples = interleave(systems, options.rounds_or(3))
        check_equal(corpus, encode(texts))
    report.samples["whole"] = samples
    report.figures = rates(samples, megabytes)
    report.tables += [
        timing_table(samples, LIMIT, {"MB/s wall": lambda n: f"{megabytes / spread(t.wall for t in samples[n]).median:.2f}" if n != START else ""}),
        table(["of encode_batch_fast alone", "median", "quartiles"], [
            [name, f"{f['median']:.2f}", f"{f['low']:.2f}-{f['high']:.2f}"] for name, f in report.figures["share_of_limit"].items()
        ]),
    ]  # fmt: skip
    return report


def rates(samples: dict[str, list[Times]], megabytes: float) -> dict:
    """Ours over the limit, as speeds: above 1 is faster than the limit. Round by round."""
    net = [Times(*(a - b for a, b in zip(ours, start))) for ours, start in zip(samples[OURS], samples[START])]
    with_net = samples | {"net": net}
    shares = {
        f"{what}, by {clock} time": paired_ratio(with_net, LIMIT, name, clock)._asdict()
        for what, name in (("whole command", OURS), ("without start-up", "net"))
        for clock in Times._fields
    }
    return {"megabytes": megabytes, "share_of_limit": shares}


def make_corpus(folder: Path, is_quick: bool) -> tuple[Path, Path]:
    small, corpus, tokenizer = folder / "small.jsonl", folder / "corpus.jsonl", folder / "tokenizer.json"
    some = ["--input", str(Path(json.__file__).parent)] if is_quick else []
    tool("make_jsonl.py", *some, "--output", str(small))
    tool("train_tokenizer.py", "--input", str(small), "--vocab-size", "512" if is_quick else "8192", "--output", str(tokenizer))
    if is_quick:
        return small, tokenizer
    paths = sysconfig.get_paths()
    tool("make_jsonl.py", "--input", paths["stdlib"], paths["purelib"], "--include-tests", "--extensions", ".py", "--output", str(corpus))
    return corpus, tokenizer


def preprocess(corpus: Path, tokenizer: Path, workers: int) -> None:
    words = ["--tokenizer-model", str(tokenizer), "--workers", str(workers), "--output-prefix", str(corpus.with_suffix(""))]
    tool("preprocess_data.py", "--input", str(corpus), *words)


def tool(name: str, *words: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *words], check=True, capture_output=True)


def limit_of(tokenizer: Path) -> Callable[[list[str]], int]:
    """Tokens of all texts. A few thousand documents at a time: their results together would not fit in the memory of a laptop."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))

    def encode(texts: list[str]) -> int:
        blocks = (texts[i : i + 2048] for i in range(0, len(texts), 2048))
        return sum(len(e) for block in blocks for e in backend.encode_batch_fast(block, add_special_tokens=False))

    return encode


def check_equal(corpus: Path, tokens: int) -> None:
    """The dataset holds the tokens that the limit has made."""
    from megatron_moe.data.indexed_dataset import IndexedDataset

    found = int(IndexedDataset(f"{corpus.with_suffix('')}_text_document").sizes.sum())
    assert found == tokens, f"{found} tokens in the dataset, {tokens} from encode_batch_fast"
