"""Where tokens come from: datasets, tokenizer, loading."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, flag

MOCK_VOCAB_SIZE = 512  # of made-up tokens, unless a flag says otherwise


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: Literal["GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "ByteTokenizer",
                            "NullTokenizer"] | None = flag(
        None, "GPT2BPETokenizer needs --vocab-file and --merge-file; HFTokenizer (tokenizer.json) and SentencePieceTokenizer (also "
        "called GPTSentencePieceTokenizer) need --tokenizer-model; NullTokenizer reads numbers and needs --vocab-size; ByteTokenizer "
        "needs nothing. Guessed from the files when not given")  # fmt: skip
    vocab_file: str | None = flag(None, "vocab.json of a GPT-2 BPE")
    merge_file: str | None = flag(None, "merges.txt of a GPT-2 BPE")
    tokenizer_model: str | None = flag(None, "tokenizer.json, or a SentencePiece .model")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        kind = self.kind
        if kind == "GPT2BPETokenizer" and not (self.vocab_file and self.merge_file):
            yield "GPT2BPETokenizer needs both --vocab-file and --merge-file"
        if kind in ("HFTokenizer", "SentencePieceTokenizer") and not self.tokenizer_model:
            yield f"{kind} needs --tokenizer-model"

    @property
    def kind(self) -> str | None:
        """The tokenizer type, from the flag or else from the files that were given."""
        if self.tokenizer_type:
            return self.tokenizer_type.replace("GPTSentence", "Sentence")
        if self.vocab_file or self.merge_file:
            return "GPT2BPETokenizer"
        if self.tokenizer_model:
            return "HFTokenizer" if self.tokenizer_model.endswith(".json") else "SentencePieceTokenizer"
        return None


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    data_path: tuple[str, ...] = flag(
        (), "one .bin/.idx prefix, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...; cut by --split", metavar="PREFIX"
    )
    train_data_path: tuple[str, ...] = flag((), "the same for training alone", metavar="PREFIX")
    valid_data_path: tuple[str, ...] = flag((), "the same for validation alone", metavar="PREFIX")
    test_data_path: tuple[str, ...] = flag((), "the same for testing alone", metavar="PREFIX")
    split: str = flag("969,30,1", "shares of training, validation and test, cut in file order by documents")
    data_order: Literal["stable", "megatron"] = flag(
        "stable", "order of the samples: stable does not depend on the length of the run; megatron is Megatron's own, drawn for "
        "the number of samples the first run wants and kept in its checkpoints")  # fmt: skip
    train_data_exact_num_epochs: int | None = flag(
        None, "build Megatron's order over exactly this many epochs of the training data, not as many as the samples take", minimum=1)  # fmt: skip
    mock_data: bool = flag(False, "made-up text-like tokens: nothing is read from disk")
    data_cache_path: str | None = flag(None, "where dataset indices are cached; beside the data when not given")
    num_workers: int = flag(2, "processes that read data ahead; 0 reads in the training process", minimum=0)
    reset_position_ids: bool = flag(False, "positions start again after each end-of-document token")
    reset_attention_mask: bool = flag(False, "no attention across documents")
    eod_mask_loss: bool = flag(False, "no loss on predicting what follows an end-of-document token")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        separate = self.train_data_path or self.valid_data_path or self.test_data_path
        if self.data_path and separate:
            yield "give either --data-path (with --split) or --train-data-path/--valid-data-path/--test-data-path, not both"
        if self.mock_data and (self.data_path or separate):
            yield "--mock-data and a data path exclude each other; drop one"
        if self.mock_data and self.data_order == "megatron":
            yield "--data-order megatron orders the documents of a data path and --mock-data has none; drop one"
        if self.train_data_exact_num_epochs and self.data_order != "megatron":
            yield (f"--train-data-exact-num-epochs ({self.train_data_exact_num_epochs}) is about Megatron's data order, and "
                   f"--data-order is {self.data_order}; add --data-order megatron or leave it out")  # fmt: skip
        if separate and not self.train_data_path:
            yield "--valid-data-path and --test-data-path need --train-data-path beside them"
        try:
            split_shares(self.split)
        except ValueError as error:
            yield str(error)
        for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
            try:
                blend_of(getattr(self, name))
            except ValueError as error:
                yield f"--{name.replace('_', '-')}: {error}"

    @property
    def is_given(self) -> bool:
        return bool(self.mock_data or self.data_path or self.train_data_path)


def split_shares(text: str) -> tuple[float, float, float]:
    """'969, 30, 1' -> shares that sum to one; missing entries are zero, '/' separates too."""
    try:
        parts = [float(p) for p in text.replace("/", ",").split(",") if p.strip()]
    except ValueError:
        parts = []
    total = plain_sum(parts)
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not 0 < total < math.inf:
        raise ValueError(f"--split wants up to three numbers, none below zero, such as 969,30,1, not {text!r}")
    parts += [0.0] * (3 - len(parts))
    return tuple(p / total for p in parts)  # type: ignore[return-value]


def blend_of(words: tuple[str, ...]) -> list[tuple[float, str]]:
    """('0.7', 'a', '0.3', 'b') -> [(0.7, 'a'), (0.3, 'b')]; a single prefix has weight 1. Weights are normalised."""
    if len(words) == 1:
        return [(1.0, words[0])]
    if len(words) % 2:
        raise ValueError(f"wants one prefix or pairs WEIGHT PREFIX, not {len(words)} words")
    try:
        pairs = [(float(w), p) for w, p in zip(words[::2], words[1::2])]
    except ValueError:
        raise ValueError(f"wants pairs WEIGHT PREFIX, and a weight is not a number: {' '.join(words)}") from None
    total = plain_sum(w for w, _ in pairs)
    if pairs and (min(w for w, _ in pairs) < 0 or not 0 < total < math.inf):
        raise ValueError(f"weights must be finite, not negative and not all zero: {[w for w, _ in pairs]}")
    return [(w / total, p) for w, p in pairs]


def plain_sum(numbers: Iterable[float]) -> float:
    """Sum from left to right. From Python 3.12 on `sum` compensates for rounding: another last bit can move a boundary of a
    split or the choices of a blend, and a run that is resumed must not depend on the Python that it runs on."""
    return functools.reduce(operator.add, numbers, 0.0)
