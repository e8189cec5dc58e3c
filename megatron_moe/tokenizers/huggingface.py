"""Tokenizers of the `tokenizers` library: GPT-2's vocab.json with merges.txt, and any tokenizer.json."""

from __future__ import annotations

from typing import Any

from megatron_moe.tokenizers.base import Tokenizer, fingerprint_of, foreign, library, read_file

EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")  # the last is DeepSeek's


class LibraryTokenizer(Tokenizer):
    """A loaded `tokenizers.Tokenizer` behind our interface."""

    def __init__(self, backend: Any, eod_names: tuple[str, ...], source: str, fingerprint: str):
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._backend = backend
        # Not the number of entries: ids may have holes, and the model needs a row for the highest.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = fingerprint
        eod = next((name for name in eod_names if name in vocabulary), None)
        if eod is None:
            raise ValueError(
                f"{source} has no end-of-document token: one of {', '.join(eod_names)} must be in its vocabulary; "
                f"add one of them as a special token, or train one with tools/train_tokenizer.py"
            )
        self.eod = vocabulary[eod]

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # "fast" leaves out the character offsets, which nobody here reads
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Contents of a tokenizer.json that makes the same ids."""
        return self._backend.to_str()

    @property
    def added_tokens(self) -> list[str]:
        """What is recognised in text before anything else is."""
        return [token.content for token in self._backend.get_added_tokens_decoder().values()]

    @property
    def changes_lengths(self) -> bool:
        """Whether the file asks for truncation or padding."""
        return self._backend.truncation is not None or self._backend.padding is not None


class GPT2BPETokenizer(LibraryTokenizer):
    """Byte-level BPE from vocab.json and merges.txt; eod is <|endoftext|>, and only `eod` makes it: in text it is characters."""

    def __init__(self, vocab_file: str, merge_file: str):
        contents = read_file(vocab_file, "--vocab-file"), read_file(merge_file, "--merge-file")
        parts = library("tokenizers")
        try:
            backend = parts.Tokenizer(parts.models.BPE.from_file(vocab_file, merge_file))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            files = f"{vocab_file} with --merge-file {merge_file}"
            raise foreign(files, "--vocab-file", "a pair of GPT-2 BPE files (vocab.json, merges.txt)", error) from None
        backend.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = parts.decoders.ByteLevel()
        super().__init__(backend, EOD_NAMES[:1], vocab_file, fingerprint_of("GPT2BPETokenizer", *contents))


class HFTokenizer(LibraryTokenizer):
    """Any tokenizer.json. Its special tokens are recognised in text, as the library does."""

    def __init__(self, path: str):
        content = read_file(path, "--tokenizer-model")
        parts = library("tokenizers")
        try:
            backend = parts.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise foreign(path, "--tokenizer-model", "a tokenizer.json", error) from None
        super().__init__(backend, EOD_NAMES, path, fingerprint_of("HFTokenizer", content))
