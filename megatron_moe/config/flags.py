"""A flag is one field: typed dataclass fields become argparse options, and parsed options become dataclasses.

Flow: `flag(...)` declares a field -> `add_config_group` shows it in `--help` -> `given_options` reads the command line
without stopping at the first mistake -> `build` makes the frozen dataclass and reports every problem at once.

Worked example: the field `topk: int = flag(1, help="experts per token (k)", minimum=1)` is `--topk 2` (also
`--topk=2`) on the command line, `topk: 2` in a YAML file, and `MoEConfig(topk=2)` in Python.
Dashes and underscores are the same in flag names. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_FLAG = "flag"
_MISSING = "\0missing"  # an option that wants a value and got none


class ConfigError(ValueError):
    """One or more user mistakes. `problems` holds one sentence each: rule, values, remedy."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return ConfigError, (self.problems,)  # pickled by its problems, not by the text that was made of them


@dataclasses.dataclass(frozen=True)
class FlagInfo:
    """What a field knows about itself beyond its type and default."""

    help: str
    names: tuple[str, ...] = ()  # further spellings, without the leading dashes
    negative: tuple[str, ...] = ()  # further spellings that set a boolean to False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None  # exclusive lower bound
    parse: Callable[[list[str]], Any] | None = None  # words of the command line -> value
    metavar: str | None = None
    hidden: bool = False


def flag(default: Any, help: str, **info: Any) -> Any:
    """Declare a dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={_FLAG: FlagInfo(help=help, **info)})


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """One field of a config class, with its type resolved."""

    name: str
    kind: type  # int, float, str or bool
    default: Any
    info: FlagInfo
    optional: bool = False
    many: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def option(self) -> str:
        return "--" + self.name.rstrip("_").replace("_", "-")  # the field of --from is called from_

    @property
    def options(self) -> list[str]:
        return [self.option, *("--" + n for n in self.info.names)]

    @property
    def negative_options(self) -> list[str]:
        name = self.option[2:]
        opposite = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
        return [f"--{opposite}", *("--" + n for n in self.info.negative)]

    def problems(self, value: Any) -> Iterator[str]:
        """Bounds and choices of a value that already has the right type."""
        if value is None:
            return
        for v in value if self.many else (value,):
            if self.choices and v not in self.choices:
                near = difflib.get_close_matches(str(v), [str(c) for c in self.choices], 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                yield f"{self.option} must be one of {', '.join(map(str, self.choices))}, not {v!r}{hint}"
            if isinstance(v, float) and not math.isfinite(v):
                yield f"{self.option} must be a finite number, not {v}"
                continue
            if self.info.minimum is not None and v < self.info.minimum:
                yield f"{self.option} must be at least {self.info.minimum}, not {v}"
            if self.info.maximum is not None and v > self.info.maximum:
                yield f"{self.option} must be at most {self.info.maximum}, not {v}"
            if self.info.above is not None and not v > self.info.above:
                yield f"{self.option} must be greater than {self.info.above}, not {v}"


@functools.cache  # types are resolved from text, and a plan asks thousands of times
def fields_of(cls: type) -> list[FieldSpec]:
    """The flags of a config class, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return [_spec(f, hints[f.name]) for f in dataclasses.fields(cls) if _FLAG in f.metadata]


def _spec(field: dataclasses.Field, hint: Any) -> FieldSpec:
    optional = many = False
    choices: tuple[Any, ...] = ()
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [a for a in typing.get_args(hint) if a is not type(None)]
        assert len(members) == 1, f"{field.name}: only X | None is supported, not {hint}"
        optional, hint = True, members[0]
    if typing.get_origin(hint) is tuple:
        many, hint = True, typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    return FieldSpec(field.name, hint, field.default, field.metadata[_FLAG], optional, many, choices)


# ---------------------------------------------------------------- command line -> values


def add_config_group(parser: argparse.ArgumentParser, cls: type) -> None:
    """Show the flags of `cls` in `--help` as one group, titled by the first line of its docstring."""
    title, _, text = (cls.__doc__ or cls.__name__).strip().partition("\n")
    group = parser.add_argument_group(title.rstrip("."), " ".join(text.split()) or None)
    for spec in fields_of(cls):
        _add_option(group, spec)


def _add_option(group: argparse._ArgumentGroup, spec: FieldSpec) -> None:
    text = argparse.SUPPRESS if spec.info.hidden else _help_text(spec)
    if spec.kind is bool:
        shown, other = (spec.options, spec.negative_options) if not spec.default else (spec.negative_options, spec.options)
        group.add_argument(*shown, dest=spec.name, action="store_const", const=not spec.default, default=argparse.SUPPRESS, help=text)
        group.add_argument(
            *other, dest=spec.name, action="store_const", const=bool(spec.default), default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        return
    metavar = spec.info.metavar or ("{" + ",".join(map(str, spec.choices)) + "}" if spec.choices else spec.kind.__name__.upper())
    # Everything is read as text and converted later, so that one run reports every mistake and not only the first.
    shape = {"nargs": "*"} if spec.many or spec.info.parse else {"nargs": "?", "const": _MISSING}
    group.add_argument(*spec.options, dest=spec.name, default=argparse.SUPPRESS, metavar=metavar, help=text, **shape)


def _help_text(spec: FieldSpec) -> str:
    notes = []
    if spec.kind is bool:
        if spec.default:
            notes.append("default: on")
    elif spec.default is not None and spec.default != ():
        shown = " ".join(map(str, spec.default)) if spec.many else spec.default
        notes.append(f"default: {shown}")
    text = spec.info.help + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def normalise(argv: Iterable[str]) -> list[str]:
    """`--micro_batch_size=4` -> `--micro-batch-size=4`; values are left alone."""
    out = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    return out


def convert(spec: FieldSpec, raw: Any) -> Any:
    """Text from the command line, or a value from YAML/JSON, to the field's type. Raises ValueError."""
    if raw is None and spec.optional:
        return None
    if raw is None or raw == _MISSING or (spec.many and raw == [] and not spec.optional):
        raise ValueError(f"{spec.option} wants a value")
    if spec.info.parse:
        words = [str(w) for w in raw] if isinstance(raw, list | tuple) else [str(raw)]
        try:
            return spec.info.parse(words)
        except ValueError as error:
            raise ValueError(f"{spec.option}: {error}") from None
    if spec.many:
        items = raw if isinstance(raw, list | tuple) else [raw]
        return tuple(_scalar(spec, item) for item in items)
    return _scalar(spec, raw)


def _scalar(spec: FieldSpec, raw: Any) -> Any:
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[spec.kind]
    error = ValueError(f"{spec.option} wants {what}, not {raw!r}")
    if spec.kind is bool:
        if isinstance(raw, bool):
            return raw
        raise error
    if isinstance(raw, (bool, dict, list)):
        raise error
    if spec.kind is str:
        if spec.choices:  # Megatron-LM and Megatron-DeepSpeed disagree on capitals (RMSNorm, rmsnorm)
            return {str(c).lower(): c for c in spec.choices}.get(str(raw).lower(), str(raw))
        return str(raw)
    try:
        number = float(raw)
        if spec.kind is float:
            return number
        if number != int(number):
            raise error
        return int(raw) if re.fullmatch(r"[+-]?\d+", str(raw)) else int(number)
    except (ValueError, OverflowError, TypeError):
        raise error from None


def int_list(words: list[str]) -> tuple[int, ...]:
    """`8`, `4 4 8 8`, `4,4,8,8` and `[4, 4, 8, 8]` -> a tuple of integers."""
    text = " ".join(words).strip()
    try:
        items = json.loads(text) if text.startswith("[") else [w for w in re.split(r"[\s,]+", text) if w]
        numbers = tuple(int(str(item)) for item in items)
    except (ValueError, TypeError):
        raise ValueError(f"wants whole numbers such as 8, 4 4 8 8 or [4, 4, 8, 8], not {text!r}") from None
    if not numbers:
        raise ValueError("wants at least one number")
    return numbers


def layer_pattern(words: list[str]) -> tuple[int, ...]:
    """What `int_list` reads, and Megatron's expressions: `([1]*3+[0])*2` -> (1, 1, 1, 0, 1, 1, 1, 0)."""
    text = " ".join(words).strip()
    if "*" not in text and "+" not in text:
        return int_list(words)
    try:
        return tuple(_repeated(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, RecursionError):
        raise ValueError(
            f"wants whole numbers such as 4 or 1 1 0, or lists that are repeated and joined such as ([1]*3+[0])*2, not {text!r}"
        ) from None


def _repeated(node: ast.expr) -> list[int]:
    """The value of an expression of lists, + and *; nothing else is evaluated."""
    match node:
        case ast.List(elts=elements) if all(isinstance(e, ast.Constant) and type(e.value) is int for e in elements):
            return [e.value for e in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _repeated(left) + _repeated(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))) if times <= 10_000:  # layers, not bytes
            numbers = _repeated(left) * times
            if len(numbers) <= 10_000:
                return numbers
    raise ValueError


_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$|-nan$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class GivenOption:
    """One flag of a command line with the words behind it."""

    spelled: str
    option: str  # the same with dashes
    words: tuple[str, ...]
    dest: str | None  # None: no such flag

    def __str__(self) -> str:
        return " ".join([self.spelled, *self.words])


def given_options(parser: argparse.ArgumentParser, argv: Iterable[str]) -> list[GivenOption]:
    """The command line cut at its flags, in order. Words before the first flag have no flag: an option of ''."""
    actions = {s: a for a in parser._actions for s in a.option_strings}
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    named = [(spelled, normalise([spelled])[0], tuple(words)) for spelled, words in found]
    return [GivenOption(s, option, words, actions[option].dest if option in actions else None) for s, option, words in named]


def repeated_options(parser: argparse.ArgumentParser, argv: Iterable[str]) -> list[str]:
    """One warning for each setting that was given several times with different values: the last one counts."""
    spellings: dict[str, list[str]] = {}
    meanings: dict[str, set[Any]] = {}
    actions = {s: a for a in parser._actions for s in a.option_strings}
    for given in given_options(parser, argv):
        if given.dest is not None:
            spellings.setdefault(given.dest, []).append(str(given))
            meanings.setdefault(given.dest, set()).add(given.words or actions[given.option].const)
    return [f"{' and '.join(spellings[dest])} are both given: the last one counts" for dest, values in meanings.items() if len(values) > 1]


def words_of(spec: FieldSpec, value: Any) -> list[str]:
    """A typed value as words of a command line: the inverse of `convert`, for every value but None."""
    if spec.kind is bool:
        return [spec.option if value else (f"--{spec.info.negative[0]}" if spec.info.negative else spec.negative_options[0])]
    return [spec.option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]


def read_options(parser: argparse.ArgumentParser, argv: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Options that were given (dest -> text) and the problems found; unknown flags get a near miss."""
    actions = {s: a for a in parser._actions for s in a.option_strings}
    known, words, problems = list(actions), [], []
    for word in normalise(argv):
        name, equals, _ = word.partition("=")
        if equals and name in actions and actions[name].nargs == 0:  # argparse would end the program here
            problems.append(f"{name} is a switch and takes no value, not {word!r}")
            word = name
        words.append(word)
    parser._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e-3 and -inf for flags
    namespace, rest = parser.parse_known_args(words)
    for word in rest:
        if re.match(r"--?[A-Za-z]", word):
            name = word.partition("=")[0]
            near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
            problems.append(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists them all"))
        elif not problems or not problems[-1].startswith("unknown flag"):  # the value of an unknown flag is not a second mistake
            problems.append(f"unexpected word {word!r} on the command line: every setting is a --flag")
    return vars(namespace), problems


def convert_all(classes: Iterable[type], raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Convert every given value to its field's type; mistakes are appended to `problems`."""
    values = {}
    for cls in classes:
        for spec in fields_of(cls):
            if spec.name in raw:
                try:
                    values[spec.name] = convert(spec, raw[spec.name])
                except ValueError as error:
                    problems.append(str(error))
    return values


def bound_problems(cls: type, values: dict[str, Any]) -> list[str]:
    """Range and choice mistakes among `values`, for the fields of `cls`."""
    return [p for spec in fields_of(cls) if spec.name in values for p in spec.problems(values[spec.name])]


def checked(config: Any) -> None:
    """For `__post_init__`: bounds, choices, then the class's own `problems()`; raises ConfigError with all of them."""
    cls = type(config)
    problems = bound_problems(cls, {s.name: getattr(config, s.name) for s in fields_of(cls)})
    if not problems:
        problems = list(config.problems())
    if problems:
        raise ConfigError(problems)


def parse_tool(
    groups: type | tuple[type, ...], prog: str, argv: Iterable[str] | None = None, found: Iterable[str] = (), usage: str = "FLAGS"
) -> Any:
    """The command line of a tool: all mistakes at once, exit code 2. `found`: mistakes of a part that the tool has read itself.

    One config class gives its instance, several give a tuple of instances. The help text is that of the first one's file.
    """
    import sys

    classes = groups if isinstance(groups, tuple) else (groups,)
    parser = argparse.ArgumentParser(prog=prog, usage=f"{prog} {usage}", allow_abbrev=False, formatter_class=HelpFormatter,
                                     description=(sys.modules[classes[0].__module__].__doc__ or "").strip() or None)  # fmt: skip
    for cls in classes:
        add_config_group(parser, cls)
    argv = sys.argv[1:] if argv is None else list(argv)
    raw, problems = read_options(parser, argv)
    problems += found
    for warning in repeated_options(parser, argv):
        print(f"{prog}: {warning}", file=sys.stderr)
    values = convert_all(classes, raw, problems)
    configs = _build_groups(classes, values, problems)
    if problems:
        print(format_problems(prog, problems), file=sys.stderr)
        raise SystemExit(2)
    return configs if isinstance(groups, tuple) else configs[0]


def _build_groups(classes: tuple[type, ...], values: dict[str, Any], problems: list[str]) -> tuple[Any, ...]:
    """Instances of all classes; mistakes are appended to `problems`."""
    complete = not problems  # a flag that could not be read would make the others look wrong too
    configs = []
    for cls in classes:
        own = {s.name: values[s.name] for s in fields_of(cls) if s.name in values}
        try:
            if complete:
                configs.append(cls(**own))
            else:
                problems += bound_problems(cls, own)
        except ConfigError as error:
            problems += error.problems
    return tuple(configs)


def format_problems(prog: str, problems: Iterable[str]) -> str:
    """One clear message for the terminal."""
    problems = list(dict.fromkeys(problems))
    head = f"{prog}: {len(problems)} problem{'s' if len(problems) > 1 else ''} with this command"
    return "\n".join([head, *(f"  - {p}" for p in problems)])


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wide first column, and the file's docstring as it was written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44, width=120)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """`--lr FLOAT`, not `--lr [FLOAT]`: values are optional to argparse only so that their absence is our message."""
        metavar = self._metavar_formatter(action, default_metavar)(1)[0]
        return (
            f"{metavar} ..." if action.nargs == "*" else metavar if action.nargs == "?" else super()._format_args(action, default_metavar)
        )
