"""Train a tokenizer on a corpus: byte-level BPE (tokenizer.json) or SentencePiece (.model).

  python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output tokenizer.json
  python tools/train_tokenizer.py --input corpus.jsonl --model-type sentencepiece --output corpus.model

Inputs are JSONL or plain text, plain or compressed (.gz, .zst), or Parquet, as for tools/preprocess_data.py. A bad line stops it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

from tqdm import tqdm

from megatron_moe.config.flags import checked, flag, parse_tool
from megatron_moe.data.corpus import BadRecordError, Input, expand_inputs, records_of, total_bytes
from megatron_moe.tokenizers.base import library
from megatron_moe.utils.atomic import atomic_write

END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class TrainTokenizerConfig:
    """Training a tokenizer."""

    input: tuple[str, ...] = flag((), "files or quoted globs: JSONL or plain text, plain or compressed, and Parquet", metavar="FILE")
    output: str | None = flag(None, "tokenizer.json, or a .model for sentencepiece", metavar="FILE")
    model_type: Literal["bpe", "sentencepiece"] = flag("bpe", "byte-level BPE as GPT-2 has it, or SentencePiece BPE with byte fallback")
    vocab_size: int = flag(8192, "number of tokens, special ones included", minimum=258)
    json_key: str = flag("text", "the key of the text in JSONL, the column in Parquet")
    input_format: Literal["auto", "jsonl", "text"] = flag("auto", "auto goes by the name, then by the first character")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.input:
            yield "--input FILE ... is required"
        if not self.output:
            yield "--output FILE is required"
        if self.model_type == "sentencepiece" and self.vocab_size < 300:
            yield f"--vocab-size {self.vocab_size} is too small for sentencepiece: 256 bytes and the special tokens come first; use 300 or more"


def texts(config: TrainTokenizerConfig) -> Iterator[str]:
    """The documents. ValueError, naming file and line, for a bad one."""
    paths = expand_inputs(config.input)
    with tqdm(total=total_bytes(paths), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        done = 0
        for path in paths:
            source = Input(path, config.input_format)
            for block in source.blocks((config.json_key,)):
                for i, record in enumerate(records_of(block, (config.json_key,))):
                    if isinstance(record, BadRecordError):
                        raise ValueError(f"{block.place(i)}: {record}; correct the line, or make the corpus again")
                    yield record[0]
                bar.update(done + source.bytes_read - bar.n)
            done += source.bytes_read
            source.close()


def train_bpe(config: TrainTokenizerConfig) -> bytes:
    """Contents of a tokenizer.json."""
    parts = library("tokenizers")
    tokenizer = parts.Tokenizer(parts.models.BPE())
    tokenizer.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = parts.decoders.ByteLevel()
    trainer = parts.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=parts.pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(config), trainer)
    return tokenizer.to_str(pretty=True).encode("utf-8")


def train_sentencepiece(config: TrainTokenizerConfig) -> bytes:
    """Contents of a SentencePiece .model."""
    model = io.BytesIO()
    lines = (line for text in texts(config) for line in text.splitlines() if line.strip())
    try:
        library("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=config.vocab_size, hard_vocab_limit=False,
            byte_fallback=True, character_coverage=0.9995, max_sentence_length=1 << 16, minloglevel=2, remove_extra_whitespaces=False,
            normalization_rule_name="identity", allow_whitespace_only_pieces=True, input_sentence_size=2_000_000,
            num_threads=os.cpu_count() or 1)  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"sentencepiece refused to train: {error}; a smaller --vocab-size or more text may help") from None
    return model.getvalue()


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(TrainTokenizerConfig, "tools/train_tokenizer.py", argv)
    try:
        content = train_bpe(config) if config.model_type == "bpe" else train_sentencepiece(config)
        with atomic_write(config.output) as output:
            output.write(content)
    except (ValueError, OSError) as error:
        print(f"tools/train_tokenizer.py: {error}", file=sys.stderr)
        return 2
    print(f"{config.output}: {config.model_type}, {len(content)} bytes; use it with --tokenizer-model {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
