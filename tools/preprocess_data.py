"""Turn text into a dataset of tokens: JSONL, Parquet or plain text -> PREFIX_KEY_document.bin, .idx and .meta.json.

  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.json --append-eod \\
      --output-prefix data/corpus --workers 2
  zcat *.gz | python tools/preprocess_data.py --input - --tokenizer-type ByteTokenizer --output-prefix data/bytes

Inputs may be several files, quoted globs, and '-' for standard input; gzip, zstd and Parquet are recognised by their contents.
JSONL is one object per line and one document per object, Parquet (with the package pyarrow) one document per row. Plain text is one
document per file (--input-format text).
With the package gigatoken, tokenizer.json and GPT-2's files are read by it, many times faster, after its ids equal those of the library
`tokenizers` on a sample of the input (--tokenizer-engine).
Documents without any token are left out and counted. Nothing appears under the final names before all of it is right.

Exit code 0: the dataset is there. 1: a worker process died. 2: the command or the data is wrong. 130: interrupted.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

import numpy as np
from tqdm import tqdm

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.corpus import BLOCK_BYTES, BadRecordError, Block, Input, expand_inputs, records_of, total_bytes
from megatron_moe.data.indexed_dataset import IndexedDatasetWriter, best_dtype, fit
from megatron_moe.tokenizers import Tokenizer, build_tokenizer
from megatron_moe.tokenizers.gigatoken import GigatokenTokenizer, first_difference, probes_for
from megatron_moe.utils.atomic import remove_if_there

PROG = "tools/preprocess_data.py"
HANDFUL = 8  # batches
WORK = ("reading", "parsing", "tokenizing", "writing")
SAMPLED_INPUTS, SAMPLED_DOCUMENTS, SAMPLED_CHARACTERS = 16, 32, 1 << 14  # that two engines are compared on
WORKERS_FROM = 64 << 20  # bytes of input below which gigatoken is done before another process has started


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing."""

    input: tuple[str, ...] = flag((), "files, quoted globs, or - for standard input", metavar="FILE")
    input_format: Literal["auto", "jsonl", "text"] = flag("auto", "auto goes by the name, then by the first character; "
                                                          "text is one document per file")  # fmt: skip
    json_keys: tuple[str, ...] = flag(
        ("text",), "keys of the texts in JSONL, columns in Parquet; each becomes a dataset of its own", metavar="KEY"
    )
    output_prefix: str | None = flag(None, "PREFIX of PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    append_eod: bool = flag(False, "end every document with the end-of-document token")
    vocab_size: int | None = flag(None, "for NullTokenizer: the number of different ids", minimum=1)
    tokenizer_engine: Literal["auto", "tokenizers", "gigatoken"] = flag(
        "auto", "what turns text into ids for tokenizer.json and GPT-2's files: gigatoken, where it is installed and its ids equal those of "
        "`tokenizers` on a sample of the input, or `tokenizers`")  # fmt: skip
    workers: int = flag(1, "processes that tokenize, beside the one that reads and writes (which helps them with gigatoken, and is alone "
                        "with less than 64 MB); 0: one process for everything", minimum=0)  # fmt: skip
    on_bad_line: Literal["error", "skip"] = flag("error", "stop at a line that is no document, or leave it out and report it in "
                                                 "PREFIX_bad_lines.txt")  # fmt: skip
    max_bad_fraction: float = flag(0.01, "with --on-bad-line skip: fail when a larger share of lines is bad", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.input:
            yield "--input FILE ... is required ('-' reads standard input)"
        if not self.output_prefix:
            yield "--output-prefix PREFIX is required"
        elif not os.path.isdir(os.path.dirname(self.output_prefix) or "."):
            yield f"--output-prefix {self.output_prefix}: there is no folder {os.path.dirname(self.output_prefix)}; make it first"
        if len(set(self.json_keys)) < len(self.json_keys):
            yield f"--json-keys names a key twice: {' '.join(self.json_keys)}"


# ---------------------------------------------------------------- in the worker


class Batch(NamedTuple):
    """Work for one worker."""

    block: Block
    input_bytes: int  # of the input as it lies on disk, for the progress bar


class Tokenized(NamedTuple):
    """What a worker makes of a batch."""

    tokens: list[np.ndarray]  # per key: the documents end to end, in the dtype of the dataset
    sizes: list[np.ndarray]  # per key: tokens of each document
    bad: list[str]  # "file:line: reason"
    empty: int  # documents without a token, left out
    records: int
    input_bytes: int
    seconds: dict[str, float]  # by kind of work


class Encoder:
    """Batch -> Tokenized. Made once in every worker."""

    def __init__(self, tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool, stop_at_bad: bool):
        self.tokenizer, self.keys, self.append_eod, self.stop_at_bad = tokenizer, keys, append_eod, stop_at_bad
        self.dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Tokenized:
        started = time.perf_counter()
        bad: list[str] = []
        numbers, records, seen = self._parsed(batch.block, bad)
        parsed = time.perf_counter()
        empty = 0
        tokens, sizes = [], []
        for ids, lengths in self._encoded(batch.block, numbers, records, bad):  # one turn per key
            has_tokens = lengths > 0
            empty += int(np.count_nonzero(~has_tokens))
            tokens.append(fit(self._ended(ids, lengths), self.dtype))
            sizes.append((lengths[has_tokens] + self.append_eod).astype(np.int32))
        seconds = {"parsing": parsed - started, "tokenizing": time.perf_counter() - parsed}
        return Tokenized(tokens, sizes, bad, empty, seen, batch.input_bytes, seconds)

    def _ended(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """With --append-eod the end-of-document token behind every document that has a token."""
        return np.insert(ids, np.cumsum(lengths)[lengths > 0], self.tokenizer.eod) if self.append_eod else ids

    def _parsed(self, block: Block, bad: list[str]) -> tuple[list[int], list[list[str]], int]:
        """Place in the block and texts of each good record, and how many were looked at; the bad ones are added to `bad`."""
        numbers, records, seen = [], [], 0
        for record in records_of(block, self.keys):
            if isinstance(record, BadRecordError):
                bad.append(f"{block.place(seen)}: {record}")
            else:
                numbers.append(seen)
                records.append(record)
            seen += 1
            if bad and self.stop_at_bad:
                break
        return numbers, records, seen

    def _encoded(self, block: Block, numbers: list[int], records: list[list[str]], bad: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per key: the ids of all documents end to end, and how many each has."""
        keys = range(len(self.keys))
        try:
            return [self.tokenizer.encode_flat([record[key] for record in records]) for key in keys]
        except (ValueError, TypeError, UnicodeError):
            good = list(self._encoded_singly(block, numbers, records, bad))  # slow, but finds out which one it was
        flat = [np.fromiter(itertools.chain.from_iterable(ids[key] for ids in good), np.int64) for key in keys]
        return [(ids, np.array([len(one[key]) for one in good], np.int64)) for key, ids in zip(keys, flat)]

    def _encoded_singly(self, block: Block, numbers: list[int], records: list[list[str]], bad: list[str]) -> Iterator[list[list[int]]]:
        for number, values in zip(numbers, records):
            try:
                yield [self.tokenizer.encode(text) for text in values]
            except (ValueError, TypeError, UnicodeError) as error:
                bad.append(f"{block.place(number)}: the tokenizer refuses it ({error})")


_encoder: Encoder | None = None  # of a worker process: an executor hands its tasks nothing else that lives on


def start_worker(tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes, not threads, share the cores here
    _encoder = make_encoder(tokenizer_config, config)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def make_encoder(tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> Encoder:
    tokenizer = build_tokenizer(tokenizer_config, config.vocab_size)
    if config.tokenizer_engine == "gigatoken":
        tokenizer = GigatokenTokenizer(tokenizer)
    return Encoder(tokenizer, config.json_keys, config.append_eod, config.on_bad_line == "error")


def encode_in_worker(batch: Batch) -> Tokenized:
    return _encoder(batch)


def encode_handful(batches: list[Batch]) -> list[Tokenized]:
    return [_encoder(batch) for batch in batches]


# ---------------------------------------------------------------- in the parent


def choose_engine(
    tokenizer: Tokenizer, config: PreprocessConfig, sample: Iterable[tuple[str, str]]
) -> tuple[Literal["tokenizers", "gigatoken"], str]:
    """Which engine it is to be, and a line that says why ("" where there was no choice).

    `sample`: (place, text), read only where there is something to compare. ValueError when gigatoken is asked for and cannot be had.
    """
    if config.tokenizer_engine == "tokenizers":
        return "tokenizers", ""
    is_asked = config.tokenizer_engine == "gigatoken"
    try:
        other = GigatokenTokenizer(tokenizer)
    except ValueError as error:
        if is_asked:
            raise ValueError(
                f"--tokenizer-engine gigatoken: {error}; or leave the engine to the tokenizer: --tokenizer-engine auto"
            ) from None
        return "tokenizers", "" if "not installed" in str(error) or "reads tokenizers of" in str(error) else f"not by gigatoken: {error}"
    texts = [*((f"the built-in text {text[:40]!r}", text) for text in probes_for(tokenizer)), *sample]
    place = first_difference(tokenizer, other, texts)
    if place is None:
        return (
            "gigatoken",
            f"gigatoken: its ids equal those of tokenizers on {len(texts)} texts, {sum(len(t) for _, t in texts)} characters",
        )
    if is_asked:
        raise ValueError(
            f"--tokenizer-engine gigatoken: its ids differ from those of tokenizers, first in {place}; use --tokenizer-engine tokenizers"
        )
    return "tokenizers", f"not by gigatoken: its ids differ from those of tokenizers, first in {place}"


def sample_of(first: Batch | None, paths: list[str], config: PreprocessConfig) -> Iterator[tuple[str, str]]:
    """(place, beginning of a text) of documents spread over the first batch, and at the beginning of some further inputs."""
    others = [path for path in paths[1:] if path != "-"]
    blocks = [first.block] if first else []
    for path in others[:: -(-len(others) // SAMPLED_INPUTS) or 1]:
        source = Input(path, config.input_format)
        blocks += itertools.islice(source.blocks(config.json_keys, BLOCK_BYTES // 8), 1)
        source.close()
    for block in blocks:
        good = [(i, texts) for i, texts in enumerate(records_of(block, config.json_keys)) if not isinstance(texts, BadRecordError)]
        for index, texts in good[:: -(-len(good) // SAMPLED_DOCUMENTS) or 1]:
            yield from ((block.place(index), text[:SAMPLED_CHARACTERS]) for text in texts)


def read_batches(paths: Iterable[str], config: PreprocessConfig) -> Iterator[Batch]:
    """All inputs, in order, in batches."""
    for path in paths:
        source = Input(path, config.input_format)
        if source.kind == "text" and config.json_keys != ("text",):
            raise ValueError(f"{source.name} is plain text, which has no keys; leave out --json-keys, or set --input-format jsonl")
        reported = 0
        for block in source.blocks(config.json_keys):
            yield Batch(block, source.bytes_read - reported)
            reported = source.bytes_read
        source.close()


def tokenize(batches: Iterator[Batch], tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> Iterator[Tokenized]:
    """Results in the order of the batches. A few are under way at a time, so memory does not grow with the corpus."""
    if config.workers == 0:
        yield from map(make_encoder(tokenizer_config, config), batches)
        return
    encoder = make_encoder(tokenizer_config, config) if config.tokenizer_engine == "gigatoken" else None
    # spawn: the same on every system, and no state or threads are inherited
    pool = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer_config, config))
    try:
        # All workers start before there is work: while a pool starts one, it does not take the death of another well.
        starting = [pool.submit(os.getpid) for _ in range(config.workers)]
        if encoder:
            yield from _shared_out(batches, pool, starting, encoder, 2 * config.workers + 1)
        else:
            for started in starting:
                started.result()
            yield from _handed_out(batches, pool, 2 * config.workers + 1)
    except BaseException:
        # NOTE: a pool that breaks while it is starting a worker forgets that one, and Python's exit would wait for it for
        # ever. What the workers are doing is not wanted any more in any case.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _handed_out(batches: Iterable[Batch], pool: ProcessPoolExecutor, most: int) -> Iterator[Tokenized]:
    """Every batch is a worker's."""
    under_way: deque = deque()
    for batch in batches:
        under_way.append(pool.submit(encode_in_worker, batch))
        if len(under_way) > most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _shared_out(
    batches: Iterator[Batch], pool: ProcessPoolExecutor, starting: list[Future], encoder: Encoder, most: int
) -> Iterator[Tokenized]:
    """This process takes the batches that no worker can take at once: all of them until the workers are there.

    Workers get a handful at a time: what a pool does for each task waits for this process's interpreter, which is busy.
    """
    under_way: deque[Future] = deque()
    for batch in batches:
        if sum(not f.done() for f in under_way) < most and all(f.done() for f in starting):
            under_way.append(pool.submit(encode_handful, [batch, *itertools.islice(batches, HANDFUL - 1)]))
        else:
            under_way.append(_done([encoder(batch)]))
        # A worker that falls behind is waited for, so that what is ready does not pile up behind it.
        while under_way and (under_way[0].done() or len(under_way) > 8 * HANDFUL * most):
            yield from under_way.popleft().result()
    while under_way:
        yield from under_way.popleft().result()
    for started in starting:  # there may have been too little to do
        started.result()


def _done(results: list[Tokenized]) -> Future:
    future: Future = Future()
    future.set_result(results)
    return future


@dataclass
class Totals:
    """What a run has seen so far."""

    records: int = 0
    bad: int = 0
    empty: int = 0
    tokens: int = 0
    input_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: Counter[str] = field(default_factory=Counter)  # of all processes, by kind of work

    def add(self, result: Tokenized) -> None:
        self.records += result.records
        self.bad += len(result.bad)
        self.empty += result.empty
        self.tokens += sum(len(t) for t in result.tokens)
        self.input_bytes += result.input_bytes
        self.seconds.update(result.seconds)

    @contextmanager
    def clock(self, work: str) -> Iterator[None]:
        """Counts the time inside as this kind of work."""
        started = time.perf_counter()
        yield
        self.seconds[work] += time.perf_counter() - started

    def shares(self) -> str:
        """The kinds of work, in percent of the time of all of them in all processes. What a process waited is not counted."""
        whole = max(sum(self.seconds.values()), 1e-9)
        return ", ".join(f"{work} {self.seconds[work] / whole:.0%}" for work in WORK)

    def rates(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.input_bytes / 1e6 / seconds:.1f} MB/s, {self.tokens / seconds:,.0f} tokens/s"


class BadLines:
    """The report of bad lines, a file that is made when the first one comes."""

    def __init__(self, config: PreprocessConfig):
        self.path = config.output_prefix + "_bad_lines.txt"
        self.stop = config.on_bad_line == "error"
        remove_if_there(self.path)

    def note(self, bad: list[str]) -> None:
        """ValueError when bad lines are to stop the run."""
        if bad and self.stop:
            raise ValueError(f"{bad[0]}; nothing was written. Correct it, or go on without such lines: --on-bad-line skip")
        if bad:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(line + "\n" for line in bad)


def preprocess(tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> tuple[list[IndexedDatasetWriter], Totals]:
    """The whole run: read, tokenize, write, check, publish. ValueError for what the user has to change."""
    tokenizer = build_tokenizer(tokenizer_config, config.vocab_size)
    paths = expand_inputs(config.input)
    totals, bad_lines = Totals(), BadLines(config)
    batches = timed_reading(read_batches(paths, config), totals)
    first = next(batches, None)
    engine, why = choose_engine(tokenizer, config, sample_of(first, paths, config))
    if why:
        print(why, flush=True)
    size = total_bytes(paths)
    is_small = engine == "gigatoken" and size is not None and size < WORKERS_FROM
    config = replace(config, tokenizer_engine=engine, workers=0 if is_small else config.workers)
    with ExitStack() as stack:
        writers = [make_writer(key, tokenizer, tokenizer_config, config) for key in config.json_keys]
        for writer in writers:
            stack.callback(writer.abort)  # after publishing there is nothing left to drop
        results = tokenize(itertools.chain([first] if first else [], batches), tokenizer_config, config)
        for result in with_progress(results, size, totals):
            bad_lines.note(result.bad)
            with totals.clock("writing"):
                for writer, tokens, sizes in zip(writers, result.tokens, result.sizes):
                    writer.add_documents(tokens, sizes)
        check_totals(writers, totals, bad_lines, config)
        with totals.clock("writing"):
            for writer in writers:
                writer.finish()
            for writer in writers:
                writer.publish()
    return writers, totals


def timed_reading(batches: Iterator[Batch], totals: Totals) -> Iterator[Batch]:
    """The same batches."""
    while True:
        with totals.clock("reading"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def make_writer(key: str, tokenizer: Tokenizer, tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> IndexedDatasetWriter:
    meta = {
        "tokenizer_type": tokenizer_config.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": config.append_eod,
    }
    return IndexedDatasetWriter(f"{config.output_prefix}_{key}_document", best_dtype(tokenizer.vocab_size), meta)


def with_progress(results: Iterator[Tokenized], total: int | None, totals: Totals) -> Iterator[Tokenized]:
    """Pass results on, counting them and showing MB/s, tokens/s and the time left; on a terminal only."""
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for result in results:
            totals.add(result)
            bar.update(result.input_bytes)
            bar.set_postfix_str(totals.rates(), refresh=False)
            yield result


def check_totals(writers: list[IndexedDatasetWriter], totals: Totals, bad_lines: BadLines, config: PreprocessConfig) -> None:
    """ValueError when too much was bad, or nothing was there: an empty dataset would only fail later, and elsewhere."""
    if totals.bad > config.max_bad_fraction * totals.records:
        raise ValueError(
            f"{totals.bad} of {totals.records} lines are bad, more than --max-bad-fraction {config.max_bad_fraction:g}; nothing was "
            f"written. They are listed in {bad_lines.path}; correct them or allow a larger share"
        )
    for writer in writers:
        if writer.num_documents == 0:
            raise ValueError(
                f"no document for {writer.prefix} in {', '.join(config.input)} ({totals.records} lines or files, {totals.empty} "
                f"without text); nothing was written. Check --input and --json-keys"
            )


def report(writers: list[IndexedDatasetWriter], totals: Totals, bad_lines: str) -> None:
    for writer in writers:
        print(f"{writer.prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens, {writer.dtype.name}")
    seconds = time.monotonic() - totals.started
    print(f"{totals.input_bytes / 1e6:.1f} MB in {seconds:.1f} s: {totals.rates()} ({totals.shares()})")
    if totals.empty:
        print(f"left out: {totals.empty} documents without text")
    if totals.bad:
        print(f"left out: {totals.bad} bad lines, listed in {bad_lines}")


def main(argv: list[str] | None = None) -> int:
    config, tokenizer_config = parse_tool((PreprocessConfig, TokenizerConfig), PROG, argv)
    with suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files go
    try:
        writers, totals = preprocess(tokenizer_config, config)
    except BrokenProcessPool:
        print(f"{PROG}: a worker process died (killed, or out of memory); nothing was written. "
              f"Run again, with fewer than --workers {config.workers} if memory is short", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    report(writers, totals, config.output_prefix + "_bad_lines.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
