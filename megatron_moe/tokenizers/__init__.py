"""Tokenizers from files on disk, behind one small interface. Nothing is ever fetched from a network."""

from megatron_moe.tokenizers.base import Tokenizer
from megatron_moe.tokenizers.build import build_tokenizer

__all__ = ["Tokenizer", "build_tokenizer"]
