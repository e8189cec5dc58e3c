"""The ids of a tokenizer of the `tokenizers` library from the optional package gigatoken, which takes a fraction of the time.

It is another implementation of the same algorithm, so nobody relies on it unseen: `first_difference` compares the two on texts of the
data at hand and on PROBES, which are hard for a tokenizer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import numpy as np

from megatron_moe.tokenizers.base import Tokenizer
from megatron_moe.tokenizers.huggingface import LibraryTokenizer

PROBES = (
    "", " ", "  \n\n \t\r\n x", "it's I'll WE'VE they'd 'twas don\u2019t", "0 12 345 6789 1,234.50 \u0663\u0664 \u00bd \u2162",
    "na\u00efve caf\u00e9 cafe\u0301 \u212b \ufb01n", "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f", "a\u00a0b\u2003c\u200bd\ufeffe\u2028f\x85g\x00h\x1fi", "def f(x):\n\treturn  x**2  # !!??...---\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 8, "<s></s><unk>[INST]<|im_start|>",
)  # fmt: skip


class GigatokenTokenizer(Tokenizer):
    """`base` with the ids made by gigatoken. ValueError with the reason when that cannot be."""

    def __init__(self, base: Tokenizer):
        if not isinstance(base, LibraryTokenizer):
            raise ValueError("it reads tokenizers of the library `tokenizers` (HFTokenizer, GPT2BPETokenizer) only")
        if base.changes_lengths:
            raise ValueError("the tokenizer's file asks for truncation or padding, which gigatoken leaves out")
        if importlib.util.find_spec("gigatoken") is None:
            raise ValueError("gigatoken is not installed; pip install gigatoken")
        try:
            import gigatoken

            self._backend = gigatoken.Tokenizer.from_json(base.to_json()).backend
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what it does not know it may refuse by a panic of Rust, which is no Exception
            raise ValueError(f"gigatoken cannot load this tokenizer ({(str(error) or type(error).__name__).splitlines()[0]})") from None
        self._base = base
        self.vocab_size, self.eod, self.fingerprint = base.vocab_size, base.eod, base.fingerprint

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).tolist()

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        # One call per text returns an array each; its own encode_batch returns an awkward array, whose import takes 0.3 s.
        arrays = [self._backend.encode(text) for text in texts]
        sizes = np.fromiter(map(len, arrays), np.int64, len(arrays))
        return np.concatenate([*arrays, np.zeros(0, np.uint32)]), sizes

    def decode(self, ids: list[int]) -> str:
        return self._base.decode(ids)


def probes_for(base: LibraryTokenizer) -> list[str]:
    """PROBES, and every added token within text."""
    return [*PROBES, *(text for token in base.added_tokens[:64] for text in (token, f"a {token} b", f"a{token}b"))]


def first_difference(base: Tokenizer, other: Tokenizer, texts: Iterable[tuple[str, str]]) -> str | None:
    """The name of the first of (name, text) for which the two make different ids; None when there is none."""
    for name, text in texts:
        try:
            if base.encode(text) != other.encode(text):
                return name
        except Exception:  # a text that one of them refuses: the run will tell, and the other one must do the same
            return name
    return None
