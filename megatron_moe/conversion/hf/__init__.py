"""Folders of Hugging Face transformers: config.json, safetensors and the tokenizer's files. transformers itself is not needed.

    reader.py      a config.json of others, value by value
    families.py    config.json <-> the settings of a run, per architecture
    names.py       where a tensor of ours lies there, per architecture
    choice.py      which architecture can say a model, and what would be lost in one
    source.py      reading
    folder.py      writing
    tokenizer.py   the tokenizer's files
    start.py       training from a folder
    standalone/    configuration and model that an export brings along when transformers has no such architecture

A new architecture is a name map in names.py and a pair of functions in families.py.
"""

from megatron_moe.conversion.hf.folder import expressed, kept, losses, reading_options, stored_dtypes, write
from megatron_moe.conversion.hf.source import looks_like, open_source

SOURCE_OPTIONS = ("make_vocab_size_divisible_by",)
TARGET_OPTIONS = ("max_shard_size", "hf_model_type")

RESUMES = True

__all__ = ["expressed", "kept", "looks_like", "losses", "open_source", "reading_options", "stored_dtypes", "write"]
