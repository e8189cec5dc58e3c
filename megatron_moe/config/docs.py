"""Writes docs/flags.md from the config classes, so that the page cannot disagree with the command line.

python -m megatron_moe.config.docs > docs/flags.md
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator

from megatron_moe.config.command import CommandConfig
from megatron_moe.config.flags import FieldSpec, fields_of, words_of
from megatron_moe.config.leftovers import LEFTOVERS, NEUTRAL, NOT_YET, SWITCHES
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import FIELDS, GROUPS

HEAD = """\
# Flags

<!-- Generated: python -m megatron_moe.config.docs > docs/flags.md -->

Every setting of `pretrain_gpt_moe.py`, under the spelling of Megatron-LM or Megatron-DeepSpeed where they have it.
Dashes and underscores are the same in flag names. A YAML file given by `--config FILE.yaml` uses the same names without the
leading dashes. Precedence, lowest first: defaults, `--preset NAME`, `--config FILE.yaml`, command line. `--deepspeed-config FILE.json`
must agree with the last two ([from_megatron_deepspeed.md](from_megatron_deepspeed.md)); it overrides the first two.
"""


def flags_page() -> str:
    return "\n".join([HEAD, *_settings(), *_presets(), *_other_flags()])


def _settings() -> Iterator[str]:
    for cls in (CommandConfig, *GROUPS.values()):
        title, _, text = (cls.__doc__ or cls.__name__).strip().partition("\n")
        yield f"## {title.rstrip('.')}\n"
        if text.strip():
            yield " ".join(text.split()) + "\n"
        specs = [s for s in fields_of(cls) if not s.info.hidden]
        yield from _table(("flag", "value", "default", "meaning"), map(_setting_row, specs))


def _setting_row(spec: FieldSpec) -> tuple[str, ...]:
    # The spelling that changes the default comes first, as in --help.
    options = [*spec.options, *spec.negative_options] if spec.kind is bool else spec.options
    if spec.kind is bool and spec.default:
        options = [*spec.negative_options, *spec.options]
    return " ".join(f"`{o}`" for o in options), _value_of(spec), _default_of(spec), spec.info.help


def _value_of(spec: FieldSpec) -> str:
    if spec.kind is bool:
        return "switch"
    what = " ".join(f"`{c}`" for c in spec.choices) or {int: "whole number", float: "number", str: "text"}[spec.kind]
    if spec.many or spec.info.parse:
        what += ", one or more"
    info = spec.info
    limits = (("at least", info.minimum), ("at most", info.maximum), ("above", info.above))
    return ", ".join([what, *(f"{word} {limit:g}" for word, limit in limits if limit is not None)])


def _default_of(spec: FieldSpec) -> str:
    if spec.kind is bool:
        return "on" if spec.default else "off"
    if spec.default is None or spec.default == ():
        return ""
    return f"`{_plain(spec.default)}`"


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "A named set of flags to start from; `--list-presets` prints their sizes.\n"
    for name, preset in PRESETS.items():
        yield f"`--preset {name}`: {preset.what}. The same as\n"
        # a flag and its value stay on one line
        flags = ["\0".join(words_of(FIELDS[field], value)) for field, value in preset.settings.items()]
        lines = textwrap.wrap(" ".join(flags), 120, break_long_words=False, break_on_hyphens=False)
        yield "```\n" + "\n".join(lines).replace("\0", " ") + "\n```\n"


def _other_flags() -> Iterator[str]:
    yield "## Not built yet\n"
    yield "These are understood, and refused when they are used to train, unless their value asks for nothing.\n"
    yield from _table(("flag", "feature"), ((f"`--{name}`", _feature(name)) for name in NOT_YET))
    yield "## Accepted without effect\n"
    yield "Upstream launch scripts pass these. They are accepted with a warning.\n"
    yield from _table(("flag", "why it has no effect"), ((f"`--{name}`", why) for name, (_, why) in LEFTOVERS.items()))


def _feature(name: str) -> str:
    neutral = f"{NEUTRAL[name]} asks for nothing" if name in NEUTRAL else ""
    needless = f"asks for nothing without {' or '.join(f'`--{s}`' for s in SWITCHES[name])}" if name in SWITCHES else ""
    return NOT_YET[name][1] + (f"; {neutral or needless}" if neutral or needless else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.stdout.write(flags_page())
