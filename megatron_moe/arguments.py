"""Command line (and --config FILE.yaml, --deepspeed-config FILE.json, --preset NAME) -> RunConfig.

Precedence, lowest first: defaults, preset, folder of --load-hf (which the following must not contradict), YAML file, command line. A DeepSpeed JSON overrides defaults and preset, and must agree
with the file and the command line. Nothing here imports torch, so `--help` and every
mistake are answered at once. Mistakes are collected and reported together, exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_moe.config.command import CommandConfig
from megatron_moe.config.deepspeed_json import WEAK_FIELDS, DeepSpeedJson, read_deepspeed
from megatron_moe.config.flags import (
    ConfigError,
    HelpFormatter,
    add_config_group,
    convert_all,
    fields_of,
    format_problems,
    read_options,
    repeated_options,
    words_of,
)
from megatron_moe.config.leftovers import LEFTOVERS, NOT_YET, notes_on
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import FIELDS, GROUPS, RunConfig
from megatron_moe.config.training import DECAY_LENGTHS, RUN_LENGTHS, WARMUP_LENGTHS

DESCRIPTION = """\
Pretrain a GPT with Mixture-of-Experts layers. Start with

  python pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20
  torchrun --nproc-per-node 2 pretrain_gpt_moe.py --preset tiny --mock-data --moe-expert-parallel-size 2

Dashes and underscores are the same in flag names. Megatron-DeepSpeed's flags keep their names; docs/flags.md lists them all.
"""


class MissingFile(NamedTuple):
    """A file of settings that the command names and that is not here."""

    flag: str
    path: str

    def __str__(self) -> str:
        return f"{self.flag} {self.path}: cannot be read: there is no such file"


class Disagreement(str):
    """A problem or a warning about two sources of settings that differ."""


class Parsed:
    """A run, what to do with it, and what its command line said that has no effect.

    `missing` are the files of settings that are not here, `given` the names of the settings that some source gave, and
    `deepspeed` the JSON, None without one.
    """

    def __init__(
        self,
        run: RunConfig,
        warnings: list[str],
        not_yet: list[str],
        missing: list[MissingFile],
        command: CommandConfig,
        given: Iterable[str],
        deepspeed: DeepSpeedJson | None,
    ):
        self.run, self.warnings, self.not_yet, self.missing = run, warnings, not_yet, missing
        self.command, self.given, self.deepspeed = command, frozenset(given), deepspeed


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, usage=f"{prog} FLAGS", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    start = parser.add_argument_group("Where settings come from")
    start.add_argument("--preset", "--model-preset", default=argparse.SUPPRESS, nargs="?", const="", metavar="NAME",
                       help=f"named settings, overridden by everything else: {', '.join(PRESETS)}")  # fmt: skip
    start.add_argument("--config", default=argparse.SUPPRESS, nargs="?", const="", metavar="FILE.yaml",
                       help="YAML with the same names as the flags; the command line wins")  # fmt: skip
    start.add_argument("--deepspeed-config", "--deepscale-config", default=argparse.SUPPRESS, nargs="?", const="", metavar="FILE.json",
                       help="DeepSpeed JSON, read with or without --deepspeed; must agree with what is given here")  # fmt: skip
    for group in (CommandConfig, *GROUPS.values()):
        add_config_group(parser, group)
    for name, (count, _) in (LEFTOVERS | NOT_YET).items():
        nargs: Any = {0: None, 1: "?", "*": "*"}[count]
        action = {"action": "store_true"} if count == 0 else {"nargs": nargs}
        parser.add_argument(f"--{name}", dest=f"_other_{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **action)
    return parser


def parse_args(argv: Sequence[str] | None = None, prog: str = "pretrain_gpt_moe.py") -> Parsed:
    """Raises ConfigError with every problem of the command line."""
    parser = build_parser(prog)
    argv = sys.argv[1:] if argv is None else argv
    given, problems = read_options(parser, argv)
    others = {k.removeprefix("_other_"): _words(v) for k, v in given.items() if k.startswith("_other_")}
    preset, config_file = given.pop("preset", None), given.pop("config", None)
    missing: list[MissingFile] = []
    classes = list(GROUPS.values())
    values: dict[str, Any] = {}
    command = _command(given, problems)
    if preset is not None:
        if preset in PRESETS:
            values = dict(PRESETS[preset].settings)
        else:
            problems.append(_unknown_preset(preset))
    if config_file is not None:
        from_file, more = _read_yaml(config_file, problems, missing)
        others = more | others
        given.setdefault("deepspeed_config", from_file.pop("deepspeed_config", None))
        from_file = convert_all(classes, from_file, problems)
    else:
        from_file = {}
    from_flags = convert_all(classes, given, problems)
    stated = _overridden(from_file, from_flags)
    if folder := stated.get("load_hf"):
        values = _overridden(values, _read_folder(folder, stated, from_flags, config_file, problems))
    deepspeed = _read_deepspeed(given.get("deepspeed_config"), problems, missing)
    if deepspeed is not None:
        problems += [*deepspeed.problems, *_contradictions(deepspeed, stated, from_flags, config_file)]
        values = _overridden(values, deepspeed.values)
    values = _overridden(values, stated)
    try:
        run = RunConfig.from_values(values)
    except ConfigError as error:
        problems += _with_origins(error.problems, deepspeed)
    else:
        if folder and not problems:
            from megatron_moe.conversion.hf.start import other_model

            problems += other_model(Path(folder), run)
    if problems:
        raise ConfigError([*problems, *([] if command.dry_run else map(str, missing))])
    warnings, not_yet = notes_on(others)
    if deepspeed is not None:
        warnings = [*deepspeed.warnings, *_differences(deepspeed, values), *warnings]
        not_yet += deepspeed.not_yet
    warnings = [*run.warnings(values), *repeated_options(parser, argv), *warnings]
    return Parsed(run, warnings, not_yet, missing, command, values, deepspeed)


def _command(given: dict[str, Any], problems: list[str]) -> CommandConfig:
    values = convert_all([CommandConfig], given, problems)
    try:
        return CommandConfig(**values)
    except ConfigError as error:
        problems += error.problems
        return CommandConfig()


def _unknown_preset(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), PRESETS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"--preset {name!r} is not known; {hint}use one of {', '.join(PRESETS)} (--list-presets says what they are)"


def _words(value: Any) -> list[str]:
    """What argparse keeps of a flag, as words: none for a switch."""
    return [] if value is None or value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _read_deepspeed(path: Any, problems: list[str], missing: list[MissingFile]) -> DeepSpeedJson | None:
    if path is None:
        return None
    if path == "":
        problems.append("--deepspeed-config wants a value")
        return None
    try:
        return read_deepspeed(str(path))
    except FileNotFoundError:
        missing.append(MissingFile("--deepspeed-config", str(path)))
        return None


def _read_folder(folder: str, stated: dict[str, Any], from_flags: dict[str, Any], yaml: str | None, problems: list[str]) -> dict[str, Any]:
    """What the folder of --load-hf says of a run. Nothing of it gives way: a model of other sizes would not hold its weights."""
    from megatron_moe.conversion.hf.start import contradictions, starting_values

    try:
        values = starting_values(Path(folder), stated)
    except ConfigError as error:
        problems += error.problems
        return {}
    where = lambda name: "on the command line" if name in from_flags else f"in {yaml}"  # noqa: E731
    problems += map(Disagreement, contradictions(Path(folder), values, stated, where))
    return values


def _contradictions(deepspeed: DeepSpeedJson, stated: dict[str, Any], from_flags: dict[str, Any], yaml: str | None) -> Iterator[str]:
    """Where the JSON and what the user wrote elsewhere differ. Neither wins: DeepSpeed and Megatron-DeepSpeed let one win in silence."""
    for name, value in deepspeed.values.items():
        if name in WEAK_FIELDS:
            continue
        units = next((units for units in (DECAY_LENGTHS, WARMUP_LENGTHS) if name in units), (name,))
        for other in (n for n in units if n in stated and (n != name or stated[n] != value)):
            where = "on the command line" if other in from_flags else f"in {yaml}"
            said = " ".join(words_of(FIELDS[other], stated[other]))
            yield Disagreement(f"{said} {where} contradicts {deepspeed.origin(name)} in {deepspeed.name}; make them equal or drop one")


def _differences(deepspeed: DeepSpeedJson, values: dict[str, Any]) -> Iterator[str]:
    """Where a run does not do what DeepSpeed would with this JSON, and no one is wrong."""
    for name in WEAK_FIELDS:
        if name in deepspeed.values and values[name] != deepspeed.values[name]:
            said = " ".join(words_of(FIELDS[name], values[name]))
            yield Disagreement(f"{deepspeed.origin(name)} in {deepspeed.name} gives way to {said}")
    if "global_batch_size" in deepspeed.values and "micro_batch_size" not in values:
        yield (f"{deepspeed.name}: train_batch_size without train_micro_batch_size_per_gpu: --micro-batch-size is "
               f"{FIELDS['micro_batch_size'].default}; DeepSpeed would take the whole share of a rank at once")  # fmt: skip


def _with_origins(problems: Iterable[str], deepspeed: DeepSpeedJson | None) -> Iterator[str]:
    """Names the key of the JSON behind each flag that a problem is about and that nobody typed."""
    for problem in problems:
        keys = [
            f"{FIELDS[name].option} is {deepspeed.origin(name)} in {deepspeed.name}"
            for name in (deepspeed.values if deepspeed else ())
            if re.search(rf"{FIELDS[name].option}(?![\w-])", problem)
        ]
        yield f"{problem} ({', '.join(keys)})" if keys else problem


def _overridden(weaker: dict[str, Any], stronger: dict[str, Any]) -> dict[str, Any]:
    """Later sources win, also over the same length in another unit: --lr-warmup-tokens replaces a preset's lr_warmup_fraction."""
    replaced = {n for lengths in (RUN_LENGTHS, DECAY_LENGTHS, WARMUP_LENGTHS) if stronger.keys() & set(lengths) for n in lengths}
    return {n: v for n, v in weaker.items() if n not in replaced} | stronger


def _read_yaml(path: str, problems: list[str], missing: list[MissingFile]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Settings of a YAML file by field name; leftovers apart. Aliases work as on the command line. A file that is not there
    goes to `missing`: a plan can do without, training cannot."""
    if not path:
        problems.append("--config wants a value")
        return {}, {}
    import yaml

    try:
        with open(path, encoding="utf-8") as f:
            loaded = yaml.safe_load(f) or {}
    except FileNotFoundError:
        missing.append(MissingFile("--config", path))
        return {}, {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8
        problems.append(f"--config {path}: cannot be read: {error}")
        return {}, {}
    if not isinstance(loaded, dict):
        problems.append(f"--config {path}: wants NAME: VALUE lines, not {type(loaded).__name__}")
        return {}, {}
    positive = {o[2:]: s for g in GROUPS.values() for s in fields_of(g) for o in s.options}
    negative = {o[2:]: s for g in GROUPS.values() for s in fields_of(g) if s.kind is bool for o in s.negative_options}
    values: dict[str, Any] = {}
    others: dict[str, list[str]] = {}
    for key, value in loaded.items():
        name = str(key).replace("_", "-")
        if name in positive:
            values[positive[name].name] = value
        elif name in negative:
            values[negative[name].name] = not value if isinstance(value, bool) else value
        elif name in ("deepspeed-config", "deepscale-config"):
            values["deepspeed_config"] = value
        elif name in LEFTOVERS or name in NOT_YET:
            others |= {name: _words(value)} if value is not False else {}
        else:
            near = difflib.get_close_matches(name, [*positive, *negative], 1)
            problems.append(f"--config {path}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return values, others


def check_to_train(parsed: Parsed, world_size: int | None) -> None:
    """Raises ConfigError with all that keeps this command from training on `world_size` ranks; None: on any number."""
    settings = [*parsed.run.train_problems(), *(parsed.run.world_problems(world_size) if world_size else ())]
    problems = [*map(str, parsed.missing), *parsed.not_yet, *_with_origins(settings, parsed.deepspeed)]
    if problems:
        raise ConfigError(problems)


def report_and_exit(problems: Iterable[str], rank: int, prog: str = "pretrain_gpt_moe.py") -> None:
    """One message from rank 0, exit code 2 everywhere. Other ranks wait a moment: the launcher ends all at the first exit."""
    if rank == 0:
        print(format_problems(prog, problems), file=sys.stderr, flush=True)
    else:
        import time

        time.sleep(2)
    raise SystemExit(2)
