"""MB/s from JSONL to .bin/.idx (tools/preprocess_data.py): with tokenizers and with gigatoken, against the libraries alone and Megatron-LM

Ours is the whole command in processes of its own: start-up, reading, parsing, tokenizing, checking, writing. Two cases:

- tokenizers, on the standard library of the Python that runs: the limit is encode_batch_fast with a thread per core on strings that are
  in memory already, whose results are thrown away.
- gigatoken, on that library with its tests and on the packages that are installed: the limit is gigatoken alone, one thread, strings in
  memory; the peer is tools/preprocess_data.py --use-gigatoken of the Megatron-LM checkout that the environment variable MEGATRON_LM
  names. Both write the same files, which is checked.

The same commands on one line, in the same rounds, say what is start-up. The tokenizer is trained on the library without its tests: all
by our tools.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Options, Report, System, Times, interleave, missing, paired_ratio, spread, table, timing_table

PEERS = {
    "gigatoken": "the faster engine of the tool, and of Megatron-LM",
    "transformers": "Megatron-LM's preprocessing needs it; its checkout is where MEGATRON_LM says",
}

ROOT = Path(__file__).resolve().parents[1]
LIMIT, OURS, START = "encode_batch_fast", "preprocess_data.py", "preprocess_data.py on one line"
FAST_LIMIT, FAST, FAST_START = "gigatoken alone, 1 thread", "preprocess_data.py, gigatoken", "the same on one line"
MEGATRON, MEGATRON_START = "Megatron-LM --use-gigatoken", "Megatron-LM on one line"
# Megatron-LM wants Python 3.12, and all it misses below is a decorator without effect.
WITH_OVERRIDE = (
    "import runpy, sys, typing; typing.override = getattr(typing, 'override', lambda f: f); sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, sys.argv.pop(0)); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run(options: Options) -> Report:
    cores = len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)  # threads of `tokenizers`, read when it starts its first
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        small, corpus, tokenizer = make_corpus(Path(folder), options.quick)
        one_line = corpus.with_name("one_line.jsonl")
        one_line.write_text(json.dumps({"text": "one line"}) + "\n")
        report = Report("preprocess", {"cores": cores}, skipped=skipped())
        slow_case(report, small, one_line, tokenizer, cores, options.rounds_or(3))
        if "gigatoken" not in report.skipped:
            fast_case(report, corpus, one_line, tokenizer, cores, options.rounds_or(5))
    return report


def skipped() -> dict[str, str]:
    found = missing(PEERS)
    if "MEGATRON_LM" not in os.environ:
        found["Megatron-LM"] = "MEGATRON_LM does not name a checkout of it"
    return found


def slow_case(report: Report, corpus: Path, one_line: Path, tokenizer: Path, cores: int, rounds: int) -> None:
    texts = texts_of(corpus)
    megabytes = report.parameters["megabytes, tokenizers"] = megabytes_of(texts)
    report.parameters["documents, tokenizers"] = len(texts)
    encode = limit_of(tokenizer)
    flags = ("--tokenizer-engine", "tokenizers", "--workers", str(cores))
    samples = interleave([
        System(LIMIT, lambda: encode(texts)),
        System(OURS, lambda: preprocess(corpus, tokenizer, *flags)),
        System(START, lambda: preprocess(one_line, tokenizer, *flags)),
    ], rounds)  # fmt: skip
    check_equal(corpus, encode(texts))
    report.samples["whole"] = samples
    report.figures |= rates(samples, megabytes)
    report.tables += [
        timing_table(samples, LIMIT, {"MB/s wall": lambda n: speed(samples, n, megabytes, START)}),
        share_table("of encode_batch_fast alone", report.figures["share_of_limit"]),
    ]


def fast_case(report: Report, corpus: Path, one_line: Path, tokenizer: Path, cores: int, rounds: int) -> None:
    import gigatoken

    texts = texts_of(corpus)
    megabytes = report.parameters["megabytes, gigatoken"] = megabytes_of(texts)
    report.parameters["documents, gigatoken"] = len(texts)
    backend = gigatoken.Tokenizer(str(tokenizer)).backend
    # The first process tokenizes, too, so that together they are as many as there are cores.
    flags = ("--tokenizer-engine", "gigatoken", "--append-eod", "--workers", str(max(cores - 1, 1)))
    said: list[str] = []
    systems = [
        System(FAST_LIMIT, lambda: sum(len(backend.encode(text)) for text in texts)),
        System(FAST, lambda: said.append(preprocess(corpus, tokenizer, *flags))),
        System(FAST_START, lambda: preprocess(one_line, tokenizer, *flags)),
    ]
    has_peer = not {"transformers", "Megatron-LM"} & report.skipped.keys()
    if has_peer:
        systems += [
            System(MEGATRON, lambda: megatron(corpus, tokenizer, cores)),
            System(MEGATRON_START, lambda: megatron(one_line, tokenizer, cores)),
        ]
    samples = interleave(systems, rounds)
    if has_peer:
        for suffix in (".bin", ".idx"):
            ours, theirs = (Path(f"{prefix}_text_document{suffix}") for prefix in (corpus.with_suffix(""), megatron_prefix(corpus)))
            assert ours.read_bytes() == theirs.read_bytes(), f"{ours} and {theirs} differ"
    report.samples["gigatoken"] = samples
    shares = {work: spread(s[work] for s in map(work_shares, said))._asdict() for work in work_shares(said[0])}
    report.figures["shares of the work with gigatoken"] = shares
    report.tables += [
        timing_table(samples, FAST_LIMIT, {"MB/s wall": lambda n: speed(samples, n, megabytes, FAST_START, MEGATRON_START)}),
        share_table("of the work with gigatoken", shares),
    ]
    if has_peer:
        report.figures["speed over Megatron-LM with gigatoken"] = shares_of(samples, FAST, FAST_START, MEGATRON, MEGATRON_START)
        report.tables.append(share_table("speed over Megatron-LM with gigatoken", report.figures["speed over Megatron-LM with gigatoken"]))


def speed(samples: dict[str, list[Times]], name: str, megabytes: float, *no_speed: str) -> str:
    return "" if name in no_speed else f"{megabytes / spread(t.wall for t in samples[name]).median:.2f}"


def share_table(title: str, shares: dict[str, dict[str, float]]) -> str:
    return table([title, "median", "quartiles"], [
        [name, f"{f['median']:.2f}", f"{f['low']:.2f}-{f['high']:.2f}"] for name, f in shares.items()
    ])  # fmt: skip


def work_shares(said: str) -> dict[str, float]:
    """Reading, parsing, tokenizing, writing, from the line of the tool that ends with them."""
    return {work: int(percent) / 100 for work, percent in re.findall(r"(\w+) (\d+)%", said)}


def rates(samples: dict[str, list[Times]], megabytes: float) -> dict:
    """Ours over the limit, as speeds: above 1 is faster than the limit. Round by round."""
    return {"megabytes": megabytes, "share_of_limit": shares_of(samples, OURS, START, LIMIT)}


def shares_of(
    samples: dict[str, list[Times]], name: str, start: str, base: str, base_start: str | None = None
) -> dict[str, dict[str, float]]:
    """Speed of one over that of another, round by round: of the whole, and of both without their start-up."""
    net = {"net": less(samples[name], samples[start]), "base": less(samples[base], samples[base_start]) if base_start else samples[base]}
    whole = {"net": samples[name], "base": samples[base]}
    return {
        f"{what}, by {clock} time": paired_ratio(case, "base", "net", clock)._asdict()
        for what, case in (("whole command", whole), ("without start-up", net))
        for clock in Times._fields
    }


def less(turns: list[Times], starts: list[Times]) -> list[Times]:
    return [Times(*(a - b for a, b in zip(turn, start))) for turn, start in zip(turns, starts)]


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]


def megabytes_of(texts: list[str]) -> float:
    return round(sum(len(text.encode()) for text in texts) / 1e6, 2)


def make_corpus(folder: Path, is_quick: bool) -> tuple[Path, Path, Path]:
    """The small corpus, the large one, the tokenizer."""
    small, corpus, tokenizer = folder / "small.jsonl", folder / "corpus.jsonl", folder / "tokenizer.json"
    some = ["--input", str(Path(json.__file__).parent)] if is_quick else []
    tool("make_jsonl.py", *some, "--output", str(small))
    tool("train_tokenizer.py", "--input", str(small), "--vocab-size", "512" if is_quick else "8192", "--output", str(tokenizer))
    if is_quick:
        return small, small, tokenizer
    paths = sysconfig.get_paths()
    tool("make_jsonl.py", "--input", paths["stdlib"], paths["purelib"], "--include-tests", "--extensions", ".py", "--output", str(corpus))
    return small, corpus, tokenizer


def preprocess(corpus: Path, tokenizer: Path, *flags: str) -> str:
    words = ["--tokenizer-model", str(tokenizer), "--output-prefix", str(corpus.with_suffix(""))]
    return tool("preprocess_data.py", "--input", str(corpus), *words, *flags)


def tool(name: str, *words: str) -> str:
    return output_of(sys.executable, str(ROOT / "tools" / name), *words)


def megatron(corpus: Path, tokenizer: Path, workers: int) -> str:
    checkout = os.environ["MEGATRON_LM"]
    folder = tokenizer.with_name("hf")  # as transformers wants it
    if not folder.exists():
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--use-gigatoken", "--append-eod"]
    command = [sys.executable, "-c", WITH_OVERRIDE, checkout, f"{checkout}/tools/preprocess_data.py", "--input", str(corpus), *words]
    return output_of(*command, "--workers", str(workers), "--output-prefix", str(megatron_prefix(corpus)))


def megatron_prefix(corpus: Path) -> Path:
    return corpus.with_name(f"megatron-{corpus.stem}")


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ... ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


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
