"""SentencePiece .model files."""

from __future__ import annotations

from megatron_moe.tokenizers.base import Tokenizer, fingerprint_of, foreign, library, read_file


class SentencePieceTokenizer(Tokenizer):
    """A .model as sentencepiece writes it; eod is its eos piece."""

    def __init__(self, path: str):
        content = read_file(path, "--tokenizer-model")
        processor = library("sentencepiece").SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except Exception as error:  # the library has several kinds of error for a file that is none of its own
            raise foreign(path, "--tokenizer-model", "a SentencePiece .model", error) from None
        if processor.eos_id() < 0:
            raise ValueError(f"--tokenizer-model {path} has no eos piece, and documents need an end; train it with eos_id=2, say")
        self._processor = processor
        self.vocab_size = processor.get_piece_size()
        self.eod = processor.eos_id()
        self.fingerprint = fingerprint_of("SentencePieceTokenizer", content)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(i) for i in ids])
