"""TokenizerConfig -> Tokenizer."""

from __future__ import annotations

from megatron_moe.config.data import TokenizerConfig
from megatron_moe.tokenizers.base import Tokenizer
from megatron_moe.tokenizers.huggingface import GPT2BPETokenizer, HFTokenizer
from megatron_moe.tokenizers.plain import ByteTokenizer, NullTokenizer
from megatron_moe.tokenizers.sentence_piece import SentencePieceTokenizer


def build_tokenizer(config: TokenizerConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that the flags describe. `vocab_size` is used by NullTokenizer alone: the others know theirs.

    Raises ValueError when no type is given or implied, or a file is missing or of another kind.
    """
    if config.kind == "GPT2BPETokenizer":
        return GPT2BPETokenizer(config.vocab_file, config.merge_file)
    if config.kind == "HFTokenizer":
        return HFTokenizer(config.tokenizer_model)
    if config.kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(config.tokenizer_model)
    if config.kind == "ByteTokenizer":
        return ByteTokenizer()
    if config.kind == "NullTokenizer":
        return NullTokenizer(vocab_size)
    raise ValueError("no tokenizer is given: --tokenizer-type ByteTokenizer needs no file, --tokenizer-model tokenizer.json takes one")
