"""The tokenizer's files of a transformers folder: found in one, written into one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.files import write_through
from megatron_moe.config.data import TokenizerConfig
from megatron_moe.config.flags import ConfigError
from megatron_moe.conversion.hf.reader import read_json
from megatron_moe.tokenizers import Tokenizer, build_tokenizer

# Beside tokenizer.json; only JSON and text: no code of others is carried on.
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class FoundTokenizer:
    """`config`: how to build it again; without a kind when there is none that can be used, and `notes` say why."""

    config: TokenizerConfig
    fingerprint: str | None
    eod: int | None
    notes: list[str]


def find_tokenizer(directory: Path, vocab_size: int) -> FoundTokenizer:
    """Of a folder. ConfigError when it has more tokens than the model has rows."""
    config = tokenizer_config(directory)
    if config.kind is None:
        return FoundTokenizer(config, None, None, [f"{directory} holds no tokenizer"])
    try:
        tokenizer = build_tokenizer(config)
    except ValueError as error:
        return FoundTokenizer(TokenizerConfig(), None, None, [f"its tokenizer is left out: {error}"])
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError([
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, and config.json gives the model {vocab_size} rows; it belongs to "
            "another model, or the embedding has to be made larger first"
        ])  # fmt: skip
    return FoundTokenizer(config, tokenizer.fingerprint, tokenizer.eod, [])


def tokenizer_config(directory: Path) -> TokenizerConfig:
    """How to build the tokenizer of a folder; without a kind when there is none."""
    directory = directory.resolve()
    if (directory / "tokenizer.json").is_file():
        return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(directory / "tokenizer.json"))
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return TokenizerConfig(vocab_file=str(directory / "vocab.json"), merge_file=str(directory / "merges.txt"))
    if (directory / "tokenizer.model").is_file():
        return TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(directory / "tokenizer.model"))
    return TokenizerConfig()


def write_tokenizer(directory: Path, saved: dict[str, Any], longest: int) -> str | None:
    """Copy the files that the run of `saved` (its meta's tokenizer) had; a sentence when there are none to copy."""
    config = TokenizerConfig(**{name: saved.get(name) for name in TokenizerConfig.__dataclass_fields__})
    if config.kind in (None, "ByteTokenizer", "NullTokenizer"):
        return f"no tokenizer is written: {'the run had none' if config.kind is None else f'the {config.kind} has no files'}"
    try:
        tokenizer = build_tokenizer(config)
    except ValueError as error:
        return f"no tokenizer is written: {error}"
    if saved.get("fingerprint") not in (None, tokenizer.fingerprint):
        return "no tokenizer is written: its files have changed since training"
    if config.kind == "SentencePieceTokenizer":
        shutil.copyfile(config.tokenizer_model, directory / "tokenizer.model")
        return None
    beside = Path(config.tokenizer_model or config.vocab_file).parent
    if config.kind == "HFTokenizer":
        shutil.copyfile(config.tokenizer_model, directory / "tokenizer.json")
    else:
        tokenizer._backend.save(str(directory / "tokenizer.json"))
    described, problem = read_json(beside / "tokenizer_config.json")
    is_folder = config.kind == "HFTokenizer" and Path(config.tokenizer_model).name == "tokenizer.json" and not problem
    if is_folder:
        for name in (n for n in _BESIDE if (beside / n).is_file()):
            shutil.copyfile(beside / name, directory / name)
        described.pop("auto_map", None)
    else:
        described = _described(tokenizer, longest)
    write_through(directory / "tokenizer_config.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    return None


def _described(tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    end = tokenizer._backend.id_to_token(tokenizer.eod)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": end, "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
