"""How well a trained model predicts: perplexity of texts, last words, multiple choice. One checkpoint, any number of data sets.

  python tools/evaluate.py --load runs/a --text book.txt notes.txt --window 512 --stride 256
  cat book.txt | python tools/evaluate.py --load runs/a --text -
  python tools/evaluate.py --load runs/a --data-path corpus_text_document --output scores.json
  python tools/evaluate.py --load runs/a --last-word lambada.jsonl --multiple-choice questions.jsonl
  torchrun --nproc-per-node 2 tools/evaluate.py --load runs/a --moe-expert-parallel-size 2 --text book.txt

--text, --data-path: windows of --window tokens, each --stride further than the one before. Every token is scored once, given at
  least window - stride tokens (those near the beginning: all there are, behind a token that begins a document).
--last-word: JSON lines {"text": "..."}. Right when every token of the last word is the likeliest one.
--multiple-choice: JSON lines {"context": "...", "choices": ["...", "..."], "answer": 0}; the answer is a number from 0, or the text of a
  choice. Chosen is the likeliest continuation: by log-probability, and by log-probability per character. A blank joins context and
  choice where neither has one.

Exit code 0: all was evaluated. 2: the command, the checkpoint or a line is wrong. 130: interrupted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import checked, flag, format_problems, parse_tool
from megatron_moe.config.inference import InferenceConfig, is_first_rank

if TYPE_CHECKING:
    from megatron_moe.inference.engine import Engine
    from megatron_moe.inference.scoring import Row, Score

PROG = "tools/evaluate.py"
MOST_SHOWN = 20  # lines that are wrong


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation."""

    text: tuple[str, ...] = flag((), "perplexity of these files, each a document; - is standard input", metavar="FILE")
    data_path: tuple[str, ...] = flag((), "perplexity of these .bin/.idx pairs", metavar="PREFIX")
    last_word: tuple[str, ...] = flag((), "accuracy of the last words of these texts", metavar="FILE.jsonl")
    multiple_choice: tuple[str, ...] = flag((), "accuracy of these questions", metavar="FILE.jsonl")
    window: int | None = flag(None, "tokens that a prediction sees at most; as in training when not given", minimum=1)
    stride: int | None = flag(None, "tokens from one window to the next; half a window when not given", minimum=1)
    batch_size: int = flag(8, "windows, or texts, at a time", minimum=1)
    output: str | None = flag(None, "write the results here too", metavar="FILE.json")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not (self.text or self.data_path or self.last_word or self.multiple_choice):
            yield "nothing to evaluate: give --text, --data-path, --last-word or --multiple-choice"
        if self.text.count("-") > 1:
            yield "--text: standard input (-) can be read once"
        if self.window and self.stride and self.stride > self.window:
            yield f"--stride ({self.stride}) must be at most --window ({self.window}): tokens between two windows would not be scored"
        if self.output and not Path(self.output).parent.is_dir():
            yield f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first"


@dataclass(frozen=True)
class Document:
    """Tokens behind the one that begins a document, if there is one; `bytes`: of its text as UTF-8, None where it has none."""

    name: str
    tokens: Sequence[int]
    has_start: bool
    bytes: int | None


class Question(NamedTuple):
    rows: list[Row]
    lengths: list[int]  # characters of the choices
    answer: int


# ---------------------------------------------------------------- reading


def read_text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def text_document(engine: Engine, name: str, text: str) -> Document:
    if not text:
        raise ValueError(f"{name} is empty: there is nothing to score")
    start, has_text = engine.loaded.eod, engine.loaded.tokenizer is not None
    tokens = engine.tokenizer.encode(text)
    return Document(name, tokens if start is None else [start, *tokens], start is not None, len(text.encode()) if has_text else None)


def data_document(engine: Engine, prefix: str) -> Document:
    """All sequences of a data set, laid end to end as training sees them."""
    import numpy as np

    from megatron_moe.data.indexed_dataset import IndexedDataset

    dataset, start, tokenizer = IndexedDataset(prefix), engine.loaded.eod, engine.loaded.tokenizer
    if not dataset.num_tokens:
        raise ValueError(f"{prefix} has no tokens: there is nothing to score")
    tokens = dataset.read(0, dataset.num_tokens).astype(np.int64)
    size = None
    if tokenizer is not None:
        texts = (tokenizer.decode([i for i in dataset[n].tolist() if i != start]) for n in range(len(dataset)))
        size = sum(len(text.encode()) for text in texts)
    tokens = tokens if start is None else np.concatenate([[start], tokens])
    return Document(prefix, tokens, start is not None, size)


def read_lines(path: str, understand: Callable[[Any], Any]) -> list[Any]:
    """`understand` of each JSON line. ValueError with all lines that are wrong, and their numbers."""
    results, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("wants a JSON object")
                results.append(understand(record))
            except ValueError as error:
                problems.append(f"{path} line {number}: {error}")
    if problems:
        more = [f"... and {len(problems) - MOST_SHOWN} lines more"] if len(problems) > MOST_SHOWN else []
        raise ValueError("\n".join(problems[:MOST_SHOWN] + more))
    if not results:
        raise ValueError(f"{path} has no line with an example")
    return results


def text_of(record: dict[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f'"{key}" must be text, and is {json.dumps(record.get(key))}')
    return record[key]


def last_word_row(engine: Engine, window: int, record: dict[str, Any]) -> Row:
    from megatron_moe.inference.scoring import encode_pair, pair_row

    text = text_of(record, "text").rstrip()
    context, _, word = text.rpartition(" ")
    if not context.strip():
        raise ValueError(f'"text" has no word before the last one: {text!r}')
    return pair_row(*encode_pair(engine.tokenizer, context, f" {word}", engine.loaded.eod), window)


def choice_of(engine: Engine, window: int, record: dict[str, Any]) -> Question:
    from megatron_moe.inference.scoring import encode_pair, pair_row

    context, choices, answer = text_of(record, "context"), record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f'"choices" must be a list of two or more texts, and is {json.dumps(choices)}')
    answer = choices.index(answer) if isinstance(answer, str) and answer in choices else answer
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f'"answer" must be from 0 to {len(choices) - 1}, or the text of a choice, and is {json.dumps(answer)}')
    has_border = not context or context[-1].isspace()
    joined = [c if has_border or c[0].isspace() else f" {c}" for c in choices]
    rows = [pair_row(*encode_pair(engine.tokenizer, context, c, engine.loaded.eod), window) for c in joined]
    return Question(rows, [len(c) for c in choices], answer)


# ---------------------------------------------------------------- scoring


def scored(engine: Engine, rows: Sequence[Row], batch_size: int, name: str) -> list[Score]:
    """In the order of the rows; computed in that of their lengths, so that little is padding."""
    from tqdm import tqdm

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    scores: dict[int, Score] = {}
    with tqdm(total=sum(row.scored for row in rows), unit="tok", desc=name, disable=not sys.stderr.isatty(), leave=False) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            scores |= zip(batch, engine.score([rows[i] for i in batch]))
            bar.update(sum(rows[i].scored for i in batch))
    return [scores[i] for i in range(len(rows))]


def perplexity(engine: Engine, document: Document, window: int, stride: int, batch_size: int) -> dict[str, Any]:
    from megatron_moe.inference.scoring import windows

    rows = list(windows(document.tokens, window, stride))
    if not rows:
        raise ValueError(f"{document.name} has one token, and nothing before it: there is nothing to score")
    scores = scored(engine, rows, batch_size, document.name)
    nats, tokens = -sum(score.log_prob for score in scores), sum(score.tokens for score in scores)
    assert tokens == len(document.tokens) - 1, f"{tokens} of {len(document.tokens) - 1} tokens scored"
    result = {
        "name": document.name,
        "tokens": len(document.tokens) - document.has_start,
        "scored_tokens": tokens,
        "windows": len(rows),
        "nats": nats,
    }
    return with_means(result | {"bytes": document.bytes})


def with_means(sums: dict[str, Any]) -> dict[str, Any]:
    loss = sums["nats"] / sums["scored_tokens"]
    bits = sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else None
    return sums | {"loss": loss, "perplexity": exp(loss), "bits_per_byte": bits}


def exp(x: float) -> float | None:
    """None where no number is large enough: JSON has no infinity."""
    return math.exp(x) if x < 700 else None


def all_documents(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all tokens together."""
    sums: dict[str, Any] = {key: sum(r[key] for r in results) for key in ("tokens", "scored_tokens", "windows", "nats")}
    sums["bytes"] = None if any(r["bytes"] is None for r in results) else sum(r["bytes"] for r in results)
    return with_means(sums)


def last_words(engine: Engine, name: str, rows: list[Row], batch_size: int) -> dict[str, Any]:
    scores = scored(engine, rows, batch_size, name)
    mean = sum(score.log_prob for score in scores) / len(scores)
    return {"name": name, "examples": len(rows), "accuracy": sum(s.is_greedy for s in scores) / len(rows), "perplexity": exp(-mean)}


def multiple_choice(engine: Engine, name: str, questions: list[Question], batch_size: int) -> dict[str, Any]:
    scores = iter(scored(engine, [row for q in questions for row in q.rows], batch_size, name))
    right = right_per_character = 0
    for question in questions:
        sums = [next(scores).log_prob for _ in question.rows]
        right += largest(sums) == question.answer
        right_per_character += largest([s / n for s, n in zip(sums, question.lengths)]) == question.answer
    n = len(questions)
    return {"name": name, "examples": n, "accuracy": right / n, "accuracy_per_character": right_per_character / n}


def largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


# ---------------------------------------------------------------- all of it


def evaluate(engine: Engine, config: EvaluateConfig) -> dict[str, Any]:
    """Everything is read and checked before the first forward."""
    window = config.window or engine.loaded.run.training.seq_length
    stride = config.stride or max(window // 2, 1)
    if stride > window:
        raise ValueError(
            f"--stride ({stride}) must be at most the window, {window} as in training; give a smaller one, or a larger --window"
        )
    documents = [text_document(engine, name, read_text(name)) for name in config.text]
    documents += [data_document(engine, prefix) for prefix in config.data_path]
    words = {path: read_lines(path, lambda r: last_word_row(engine, window, r)) for path in config.last_word}
    questions = {path: read_lines(path, lambda r: choice_of(engine, window, r)) for path in config.multiple_choice}
    result: dict[str, Any] = {"checkpoint": str(engine.loaded.path), "window": window}
    if documents:
        results = [perplexity(engine, document, window, stride, config.batch_size) for document in documents]
        result["perplexity"] = {"stride": stride, "documents": results, "all": all_documents(results)}
    if words:
        result["last_word"] = [last_words(engine, path, rows, config.batch_size) for path, rows in words.items()]
    if questions:
        result["multiple_choice"] = [multiple_choice(engine, path, some, config.batch_size) for path, some in questions.items()]
    return result


def report(result: dict[str, Any]) -> Iterator[str]:
    for entry in result.get("perplexity", {}).get("documents", []):
        bits = "" if entry["bits_per_byte"] is None else f", {entry['bits_per_byte']:.4f} bits per byte"
        yield (
            f"{entry['name']}: perplexity {shown(entry['perplexity'])} over {entry['scored_tokens']} tokens (loss {entry['loss']:.4f}{bits})"
        )
    for entry in result.get("last_word", []):
        yield (f"{entry['name']}: last word right in {entry['accuracy']:.2%} of {entry['examples']} texts, its perplexity "
               f"{shown(entry['perplexity'])}")  # fmt: skip
    for entry in result.get("multiple_choice", []):
        yield (f"{entry['name']}: {entry['accuracy']:.2%} of {entry['examples']} questions right, {entry['accuracy_per_character']:.2%} by "
               f"log-probability per character")  # fmt: skip


def shown(value: float | None) -> str:
    return "too large for a number" if value is None else f"{value:.4f}"


def run(config: EvaluateConfig, model: InferenceConfig, tokenizer: TokenizerConfig) -> None:
    """Raises ValueError or CheckpointError for what the user has to change."""
    from megatron_moe.inference.engine import open_engine
    from megatron_moe.training.distributed import init_distributed

    with open_engine(model, tokenizer, init_distributed) as engine:
        if not engine.is_leader:
            engine.follow()
            return
        for note in engine.loaded.notes:
            print(note, file=sys.stderr)
        result = evaluate(engine, config)
        for line in report(result):
            print(line)
        if config.output:
            Path(config.output).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if engine.loaded.expert_cache:
            print(engine.loaded.expert_cache.report(), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    config, model, tokenizer = parse_tool((EvaluateConfig, InferenceConfig, TokenizerConfig), PROG, argv)
    from megatron_moe.checkpoint.files import CheckpointError

    try:
        run(config, model, tokenizer)
    except (ValueError, OSError, CheckpointError) as error:
        if is_first_rank():
            print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first_rank():
            print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
