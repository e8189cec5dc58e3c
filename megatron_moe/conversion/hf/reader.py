"""A config.json of others: looked at value by value, with every mistake collected. Hostile until it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_REQUIRED = object()
LARGEST = 1 << 26  # of any width or count: what is beyond is a mistake, and would be allocated
MOST = 1 << 14  # layers, experts
FILE_LIMIT = 16 << 20  # bytes of a JSON that is read

# What says nothing about the forward pass, or what training decides.
HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "initializer_range", "output_router_logits", "pretraining_tp", "router_jitter_noise", "model_type", "_attn_implementation",
    "_attn_implementation_autoset", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "n_ctx", "reorder_and_upcast_attn", "seq_aux", "aux_loss_alpha", "ep_size", "max_window_layers", "sliding_window",
    "cache_implementation", "mlp_only_layers", "num_nextn_predict_layers", "output_attentions", "output_hidden_states", "return_dict",
    "gradient_checkpointing", "embd_pdrop", "attn_pdrop", "resid_pdrop", "is_decoder", "use_return_dict", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "unsloth_fixed", "decoder_start_token_id", "head_dim", "max_length", "_commit_hash",
}  # fmt: skip


def read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """(content, what is wrong with it)."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            return {}, f"{path}: {path.stat().st_size} bytes, and no such file has more than {FILE_LIMIT}"
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path}: missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path}: cut off or damaged ({type(error).__name__}: {error})"
    if not isinstance(content, dict):
        return {}, f"{path}: holds a {type(content).__name__}, not an object of settings"
    return content, None


class Settings:
    """The values of one object of a config.json. A value of the wrong type is a problem, and a stand-in comes back."""

    def __init__(self, content: dict[str, Any], where: str, problems: list[str] | None = None):
        self.content, self.where = content, where
        self.problems: list[str] = [] if problems is None else problems
        self.seen: set[str] = set()

    def has(self, name: str) -> bool:
        return self.content.get(name) is not None

    def whole(self, name: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = LARGEST) -> Any:
        fits = lambda v: type(v) is int and minimum <= v <= maximum  # noqa: E731
        return self._get(name, default, fits, f"a whole number from {minimum} to {maximum}", max(minimum, 1))

    def count(self, name: str, default: Any = _REQUIRED) -> Any:
        """Of layers or experts, each of which is built."""
        return self.whole(name, default, maximum=MOST)

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._get(name, default, lambda v: type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e30, "a finite number", 1.0)
        return float(value) if type(value) is int else value

    def truth(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._get(name, default, lambda v: type(v) is bool, "true or false", False)

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._get(name, default, lambda v: type(v) is str, "a text", "")

    def wholes(self, name: str, default: Any = _REQUIRED) -> Any:
        fits = lambda v: isinstance(v, list) and all(type(i) is int and 0 <= i <= LARGEST for i in v)  # noqa: E731
        return self._get(name, default, fits, "a list of whole numbers", [])

    def texts(self, name: str, default: Any = _REQUIRED) -> Any:
        return self._get(name, default, lambda v: isinstance(v, list) and all(type(i) is str for i in v), "a list of texts", [])

    def section(self, name: str) -> Settings | None:
        """An object inside; None when it is not there, or null."""
        value = self._get(name, None, lambda v: isinstance(v, dict), "an object", None)
        return None if value is None else Settings(value, f"{self.where}: {name}", self.problems)

    def must_be(self, name: str, *values: Any, because: str = "nothing else is built here") -> None:
        """A setting that may be left out, but not be anything else."""
        self.seen.add(name)
        value = self.content.get(name)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            self.problem(name, f"must be {' or '.join(map(json.dumps, values))}, not {_shown(value)}: {because}")

    def problem(self, name: str, text: str) -> None:
        self.problems.append(f"{self.where}: {name} {text}")

    def unknown(self) -> list[str]:
        """Settings that nobody has asked for."""
        return sorted(str(name) for name, value in self.content.items() if name not in self.seen | HARMLESS and value is not None)

    def _get(self, name: str, default: Any, fits: Any, what: str, stand_in: Any) -> Any:
        self.seen.add(name)
        value = self.content.get(name)
        if value is None:
            if default is not _REQUIRED:
                return default
            self.problem(name, f"is missing: {what}")
            return stand_in
        if not fits(value):
            self.problem(name, f"must be {what}, not {_shown(value)}")
            return stand_in
        return value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
