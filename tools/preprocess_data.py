"""Turn text into a dataset of tokens: JSONL or plain text -> PREFIX_KEY_document.bin, .idx and .meta.json.

  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.json --append-eod \\
      --output-prefix data/corpus --workers 2
  zcat *.gz | python tools/preprocess_data.py --input - --tokenizer-type ByteTokenizer --output-prefix data/bytes

Inputs may be several files, quoted globs, and '-' for standard input; gzip and zstd are recognised by their contents.
JSONL is one object per line and one document per object. Plain text is one document per file (--input-format text).
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
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

import numpy as np
from tqdm import tqdm

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.corpus import BadRecordError, Input, Piece, decode, expand_inputs, parse_record, total_bytes
from megatron_moe.data.indexed_dataset import IndexedDatasetWriter, best_dtype, fit
from megatron_moe.tokenizers import Tokenizer, build_tokenizer
from megatron_moe.utils.atomic import remove_if_there

PROG = "tools/preprocess_data.py"
# A batch is what one worker takes at a time: large enough to hide the passing around, small enough to share the end evenly.
BATCH_BYTES, BATCH_PIECES = 1 << 19, 2048


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing."""

    input: tuple[str, ...] = flag((), "files, quoted globs, or - for standard input", metavar="FILE")
    input_format: Literal["auto", "jsonl", "text"] = flag("auto", "auto goes by the name, then by the first character; "
                                                          "text is one document per file")  # fmt: skip
    json_keys: tuple[str, ...] = flag(("text",), "keys of the texts in JSONL; each becomes a dataset of its own", metavar="KEY")
    output_prefix: str | None = flag(None, "PREFIX of PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    append_eod: bool = flag(False, "end every document with the end-of-document token")
    vocab_size: int | None = flag(None, "for NullTokenizer: the number of different ids", minimum=1)
    workers: int = flag(1, "processes that tokenize, beside the one that reads and writes; 0: one process for everything", minimum=0)
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

    pieces: list[Piece]
    is_jsonl: bool
    input_bytes: int  # of the input as it lies on disk, for the progress bar


class Tokenized(NamedTuple):
    """What a worker makes of a batch."""

    tokens: list[np.ndarray]  # per key: the documents end to end, in the dtype of the dataset
    sizes: list[np.ndarray]  # per key: tokens of each document
    bad: list[str]  # "file:line: reason"
    empty: int  # documents without a token, left out
    pieces: int
    input_bytes: int


class Encoder:
    """Batch -> Tokenized. Made once in every worker."""

    def __init__(self, tokenizer: Tokenizer, keys: tuple[str, ...], append_eod: bool, stop_at_bad: bool):
        self.tokenizer, self.keys, self.stop_at_bad = tokenizer, keys, stop_at_bad
        self.ending = [tokenizer.eod] if append_eod else []
        self.dtype = best_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Tokenized:
        bad: list[str] = []
        records = list(self._parsed(batch, bad))
        encoded = self._encoded(records, bad)
        empty = 0
        tokens, sizes = [], []
        for documents in zip(*encoded) if encoded else [()] * len(self.keys):  # one turn per key
            kept = [ids + self.ending for ids in documents if ids]
            empty += len(documents) - len(kept)
            flat = np.fromiter(itertools.chain.from_iterable(kept), np.int64)
            tokens.append(fit(flat, self.dtype))
            sizes.append(np.array([len(ids) for ids in kept], np.int32))
        return Tokenized(tokens, sizes, bad, empty, len(batch.pieces), batch.input_bytes)

    def _parsed(self, batch: Batch, bad: list[str]) -> Iterator[tuple[str, list[str]]]:
        """(place, text per key) of the good pieces; the others are added to `bad`."""
        for place, content in batch.pieces:
            try:
                yield place, parse_record(content, self.keys) if batch.is_jsonl else [decode(content)]
            except BadRecordError as error:
                bad.append(f"{place}: {error}")
                if self.stop_at_bad:
                    return

    def _encoded(self, records: list[tuple[str, list[str]]], bad: list[str]) -> list[list[list[int]]]:
        """Token ids per record and key."""
        texts = [text for _, values in records for text in values]
        try:
            flat = self.tokenizer.encode_batch(texts)
        except (ValueError, TypeError, UnicodeError):
            return list(self._encoded_singly(records, bad))  # slow, but finds out which one it was
        keys = len(self.keys)
        return [flat[i : i + keys] for i in range(0, len(flat), keys)]

    def _encoded_singly(self, records: list[tuple[str, list[str]]], bad: list[str]) -> Iterator[list[list[int]]]:
        for place, values in records:
            try:
                yield [self.tokenizer.encode(text) for text in values]
            except (ValueError, TypeError, UnicodeError) as error:
                bad.append(f"{place}: the tokenizer refuses it ({error})")


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
    return Encoder(tokenizer, config.json_keys, config.append_eod, config.on_bad_line == "error")


def encode_in_worker(batch: Batch) -> Tokenized:
    return _encoder(batch)


# ---------------------------------------------------------------- in the parent


def read_batches(paths: Iterable[str], config: PreprocessConfig) -> Iterator[Batch]:
    """Pieces of all inputs, in order, packed into batches."""
    for path in paths:
        source = Input(path, config.input_format)
        if not source.is_jsonl and config.json_keys != ("text",):
            raise ValueError(f"{source.name} is plain text, which has no keys; leave out --json-keys, or set --input-format jsonl")
        pieces: list[Piece] = []
        size = reported = 0
        for piece in source.pieces():
            pieces.append(piece)
            size += len(piece.content)
            if size >= BATCH_BYTES or len(pieces) >= BATCH_PIECES:
                yield Batch(pieces, source.is_jsonl, source.bytes_read - reported)
                pieces, size, reported = [], 0, source.bytes_read
        yield Batch(pieces, source.is_jsonl, source.bytes_read - reported)
        source.close()


def tokenize(batches: Iterable[Batch], tokenizer_config: TokenizerConfig, config: PreprocessConfig) -> Iterator[Tokenized]:
    """Results in the order of the batches. A few are under way at a time, so memory does not grow with the corpus."""
    if config.workers == 0:
        yield from map(make_encoder(tokenizer_config, config), batches)
        return
    # spawn: the same on every system, and no state or threads are inherited
    pool = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer_config, config))
    try:
        # All workers start before there is work: while a pool starts one, it does not take the death of another well.
        for started in [pool.submit(os.getpid) for _ in range(config.workers)]:
            started.result()
        under_way: deque = deque()
        for batch in batches:
            under_way.append(pool.submit(encode_in_worker, batch))
            if len(under_way) > 2 * config.workers + 1:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BaseException:
        # NOTE: a pool that breaks while it is starting a worker forgets that one, and Python's exit would wait for it for
        # ever. What the workers are doing is not wanted any more in any case.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Totals:
    """What a run has seen so far."""

    pieces: int = 0
    bad: int = 0
    empty: int = 0
    tokens: int = 0
    input_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, result: Tokenized) -> None:
        self.pieces += result.pieces
        self.bad += len(result.bad)
        self.empty += result.empty
        self.tokens += sum(len(t) for t in result.tokens)
        self.input_bytes += result.input_bytes

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
    with ExitStack() as stack:
        writers = [make_writer(key, tokenizer, tokenizer_config, config) for key in config.json_keys]
        for writer in writers:
            stack.callback(writer.abort)  # after publishing there is nothing left to drop
        results = tokenize(read_batches(paths, config), tokenizer_config, config)
        for result in with_progress(results, total_bytes(paths), totals):
            bad_lines.note(result.bad)
            for writer, tokens, sizes in zip(writers, result.tokens, result.sizes):
                writer.add_documents(tokens, sizes)
        check_totals(writers, totals, bad_lines, config)
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    return writers, totals


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
    if totals.bad > config.max_bad_fraction * totals.pieces:
        raise ValueError(
            f"{totals.bad} of {totals.pieces} lines are bad, more than --max-bad-fraction {config.max_bad_fraction:g}; nothing was "
            f"written. They are listed in {bad_lines.path}; correct them or allow a larger share"
        )
    for writer in writers:
        if writer.num_documents == 0:
            raise ValueError(
                f"no document for {writer.prefix} in {', '.join(config.input)} ({totals.pieces} lines or files, {totals.empty} "
                f"without text); nothing was written. Check --input and --json-keys"
            )


def report(writers: list[IndexedDatasetWriter], totals: Totals, bad_lines: str) -> None:
    for writer in writers:
        print(f"{writer.prefix}: {writer.num_documents} documents, {writer.num_tokens} tokens, {writer.dtype.name}")
    print(f"{totals.input_bytes / 1e6:.1f} MB in {time.monotonic() - totals.started:.1f} s: {totals.rates()}")
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
