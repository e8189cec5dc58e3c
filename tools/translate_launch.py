"""Translate a launch line of Megatron-DeepSpeed, with its DeepSpeed JSON, into ours.

  python tools/translate_launch.py -- deepspeed --num_gpus 8 pretrain_gpt.py --num-layers 24 ... --deepspeed_config ds.json
  python tools/translate_launch.py --file launch.txt > launch.sh && bash launch.sh
  echo 'deepspeed pretrain_gpt.py ...' | python tools/translate_launch.py --run

The line starts with deepspeed, torchrun or python; environment assignments in front, line continuations, quotes and redirections
behind are understood. Printed is a shell script: as comments a table of what became of each flag and each key of the JSON and where
the two disagree, then the command. The JSON is needed no more: its keys have become flags, so that there is one source of settings.
The command is to be started where paths in the line are right; it names pretrain_gpt_moe.py, which is in the folder above this file.

Exit code 0: translated, and the same run; features that are not built yet are in the notes. Exit code 2: a part of the line cannot
be translated, which the messages name; no command is printed. With --run exit code 2 also for what is not built yet.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

from megatron_moe.arguments import Disagreement, Parsed, build_parser, check_to_train, parse_args
from megatron_moe.config.deepspeed_json import DeepSpeedJson, read_deepspeed
from megatron_moe.config.flags import ConfigError, GivenOption, checked, flag, format_problems, given_options, parse_tool, words_of
from megatron_moe.config.leftovers import LEFTOVERS, NOT_YET, asks_for_nothing
from megatron_moe.config.run import FIELDS

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "pretrain_gpt_moe.py"
NAME = "tools/translate_launch.py"


@dataclass(frozen=True)
class TranslateConfig:
    """Translating a launch line.

    The line stands behind `--`, in --file, or on the standard input.
    """

    file: str | None = flag(None, "read the line from here")
    json: str | None = flag(None, "where the DeepSpeed JSON is, if it is not where the line says", metavar="FILE")
    run: bool = flag(False, "start the translated command; on one machine it listens on the loopback interface only")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        for name in ("file", "json"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                yield f"--{name} {path}: there is no such file"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was given, what it became, and why."""

    given: str
    became: str = ""
    note: str = ""


class Shell(str):
    """A word for the shell to expand: printed without further quotes."""


@dataclass
class Translation:
    """What has been found out so far."""

    environment: list[str] = field(default_factory=list)
    launcher: list[list[str]] = field(default_factory=list)  # [torchrun] or [python], then an option with its words each
    flags: list[list[str]] = field(default_factory=list)  # of ours, likewise
    tail: str = ""
    rows: list[Row] = field(default_factory=list)
    json_rows: list[Row] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parsed: Parsed | None = None
    json_name: str = ""
    num_nodes: int = 1
    ranks_per_node: str = "1"

    def words(self) -> list[str]:
        return [word for words in self.flags for word in words]


# ---------------------------------------------------------------- text -> words

# What a shell takes as it stands: everything but variables, substitutions, and what ends a command.
_PLAIN = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\$`])*"|\\.|[^'"\\$`|&;<>])*""", re.DOTALL)


def line_of(text: str) -> str:
    """The one command in a text: continuations joined, comments and other commands left out. ValueError for none or several."""
    lines = [line.strip() for line in re.sub(r"\\\r?\n", " ", text).splitlines()]
    launches = [line for line in lines if not line.startswith("#") and re.search(r"\b(deepspeed|torchrun|python[\d.]*)\s", line)]
    if len(launches) != 1:
        raise ValueError(f"wants one line with deepspeed, torchrun or python, not {len(launches)}; give that line alone")
    return launches[0]


def split_line(line: str) -> tuple[list[str], str]:
    """(words, redirections and pipes behind them). ValueError for what only a shell can know."""
    end = _PLAIN.match(line).end()
    words, tail = line[:end], line[end:]
    if tail and tail[0] not in "|&;<>":
        if unknown := re.search(r"\$\{?\w+\}?|\$\(|`", tail):
            raise ValueError(f"{unknown[0]} is for a shell to fill in; give the line with its value, as `echo` prints it")
        raise ValueError(f"a quote is not closed: {tail[:40]}")
    if tail[:1] in ("<", ">") and (number := re.search(r"(?<=\s)\d$", words)):  # the 2 of 2>&1
        words, tail = words[: number.start()], number[0] + tail
    return [os.path.expanduser(w) if w.startswith("~/") else w for w in shlex.split(words)], tail.strip()


# ---------------------------------------------------------------- the launcher

_NODES = "deepspeed goes to the other nodes by itself, torchrun is started on each"
# deepspeed option -> (number of values, torchrun's name)
RENAMED = {
    "num_gpus": (1, "--nproc-per-node"), "num_accelerators": (1, "--nproc-per-node"), "num_nodes": (1, "--nnodes"),
    "master_addr": (1, "--master-addr"), "master_port": (1, "--master-port"), "node_rank": (1, "--node-rank"),
}  # fmt: skip
# deepspeed option -> (number of values, why it can go)
DROPPED = {
    "no_local_rank": (0, "the rank comes from the environment"), "module": (0, "ours is a file"), "save_pid": (0, "not needed"),
    "no_ssh": (0, _NODES), "no_ssh_check": (0, _NODES), "force_multi": (0, _NODES), "launcher": (1, _NODES), "launcher_args": (1, _NODES),
    "ssh_port": (1, _NODES), "venv_script": (1, "activate the environment before"), "log_level": (1, "about the launcher's own messages"),
    "quiet": (0, "about the launcher's own messages"), "bind_cores_to_rank": (0, "speed only; numactl in front of torchrun does it"),
    "bind_core_list": (1, "speed only; numactl in front of torchrun does it"),
    "enable_each_rank_log": (1, "torchrun's --log-dir DIR --redirects 3 does it"),
}  # fmt: skip
# deepspeed option -> (number of values, what to do instead)
IMPOSSIBLE = {
    "autotuning": (1, "nothing here tunes settings; leave it out"),
    "elastic_training": (0, "a run has a fixed number of ranks; leave it out"),
    "min_elastic_nodes": (1, "a run has a fixed number of ranks; give --num_nodes"),
    "max_elastic_nodes": (1, "a run has a fixed number of ranks; give --num_nodes"),
    "no_python": (0, "the program is a Python file here; leave it out"),
    "exclude": (1, "which GPUs that leaves is not known here; put CUDA_VISIBLE_DEVICES=... in front and --num_gpus behind deepspeed"),
}
SHORT = {"H": "hostfile", "i": "include", "e": "exclude", "q": "quiet"}
TORCHRUN_SWITCHES = {"standalone", "no_python", "module", "m", "run_path", "use_env", "virtual_local_rank"}
PYTHON_OPTIONS_WITH_VALUE = {"X", "W"}


def take_launcher(words: list[str], result: Translation) -> list[str]:
    """Translate everything in front of the flags. Returns the flags. ValueError when there is no launcher."""
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        result.environment.append(f"{name}={shlex.quote(value)}")
        result.rows.append(Row(result.environment[-1], result.environment[-1]))
    launcher = Path(words[0]).name if words else ""
    if launcher == "deepspeed":
        return take_deepspeed(words[1:], result)
    if launcher == "torchrun":
        result.rows.append(Row(words[0], "torchrun"))
        return take_torchrun(words[1:], result)
    if re.fullmatch(r"python[\d.]*", launcher):
        return take_python(words, result)
    raise ValueError(f"the line begins with {words[0]!r}, not with deepspeed, torchrun or python" if words else "the line is empty")


def take_options(words: list[str], values_of) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Leading options as (name with underscores, values), and what comes behind them."""
    options = []
    while words and words[0].startswith("-"):
        name, equals, value = words[0].partition("=")
        name = name.lstrip("-").replace("-", "_")
        count = 0 if equals else values_of(name)
        if count is None:  # of an unknown option: what is no program is its value
            count = int(len(words) > 1 and not words[1].startswith("-") and not words[1].endswith(".py"))
        options.append((name, [value] if equals else words[1 : 1 + count]))
        words = words[1 + count :]
    return options, words


def take_deepspeed(words: list[str], result: Translation) -> list[str]:
    known = RENAMED | DROPPED | IMPOSSIBLE | {"hostfile": (1, ""), "include": (1, "")}
    options, rest = take_options(words, lambda name: known.get(SHORT.get(name, name), (None,))[0])
    given = {SHORT.get(name, name): " ".join(values) for name, values in options}
    result.rows.append(Row("deepspeed", "torchrun"))
    chosen: dict[str, str] = {}
    for name, value in given.items():
        shown = f"--{name} {value}".strip()
        if name in RENAMED:
            chosen[RENAMED[name][1]] = value
            result.rows.append(Row(shown, f"{RENAMED[name][1]} {value}"))
        elif name in DROPPED:
            result.rows.append(Row(shown, "", DROPPED[name][1]))
        elif name == "hostfile":
            chosen |= take_hostfile(value, given, result)
        elif name == "include":
            chosen |= take_include(value, result)
        else:
            near = difflib.get_close_matches(name, known, 1)
            unknown = "there is no such option" + (f"; did you mean --{near[0]}?" if near else "")
            result.problems.append(f"{shown} of deepspeed: {IMPOSSIBLE[name][1] if name in IMPOSSIBLE else unknown}")
    set_nodes(chosen, result)
    result.launcher = [["torchrun"], *map(list, chosen.items())]
    return take_program(rest, result)


def set_nodes(chosen: dict[str, str], result: Translation) -> None:
    """Number of nodes and ranks; what differs from node to node comes from the environment."""
    if "--nproc-per-node" not in chosen:
        chosen["--nproc-per-node"] = "auto"
        note = "a rank for each GPU of this machine, without GPUs for each core; other machines: --num_nodes"
        result.rows.append(Row("(no --num_gpus)", "--nproc-per-node auto", note))
    for option in ("--nnodes", "--nproc-per-node"):
        if not re.fullmatch(r"[1-9]\d*|auto|gpu|cpu", chosen.get(option, "1")):
            result.problems.append(f"{option} wants a whole number, not {chosen[option]!r}")
            return
    result.ranks_per_node, result.num_nodes = chosen["--nproc-per-node"], int(chosen.get("--nnodes", "1"))
    if result.num_nodes > 1:
        chosen.setdefault("--node-rank", Shell('"${NODE_RANK:?}"'))
        chosen.setdefault("--master-addr", Shell('"${MASTER_ADDR:?}"'))
        note = f"{_NODES}: set NODE_RANK to 0 ... {result.num_nodes - 1} there, and MASTER_ADDR to the first node"
        became = f"--node-rank {chosen['--node-rank']} --master-addr {chosen['--master-addr']}"
        result.rows.append(Row(f"({result.num_nodes} nodes)", became, note))


def take_hostfile(path: str, given: dict[str, str], result: Translation) -> dict[str, str]:
    """`host slots=8` lines -> nodes and ranks per node, for what the line does not say itself."""
    shown = f"--hostfile {path}"
    if {"num_nodes", "num_gpus"} <= given.keys():
        result.rows.append(Row(shown, "", f"--num_nodes and --num_gpus say enough; {_NODES}"))
        return {}
    try:
        lines = [line.split("#")[0].split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        hosts = {words[0]: int(words[1].removeprefix("slots=")) for words in lines if words}
    except (OSError, ValueError, IndexError) as error:
        result.problems.append(f"{shown} of deepspeed: cannot be read here ({error}); give --num_nodes and --num_gpus instead")
        return {}
    if len(set(hosts.values())) != 1:
        result.problems.append(f"{shown} of deepspeed: its hosts have {sorted(set(hosts.values()))} slots; torchrun wants the same on each")
        return {}
    found = {
        "--nnodes": given.get("num_nodes", str(len(hosts))),
        "--nproc-per-node": given.get("num_gpus", str(next(iter(hosts.values())))),
    }
    found |= {"--master-addr": given.get("master_addr", next(iter(hosts)))} if len(hosts) > 1 else {}
    result.rows.append(Row(shown, " ".join(f"{k} {v}" for k, v in found.items()), "from its lines"))
    return found


def take_include(value: str, result: Translation) -> dict[str, str]:
    """localhost:0,1 -> two ranks that see these two GPUs."""
    local = re.fullmatch(r"(?:localhost|127\.0\.0\.1):(\d+(?:,\d+)*)", value)
    if not local:
        result.problems.append(f"--include {value} of deepspeed: only GPUs of this machine (localhost:0,1) can be named; on several nodes put "
                               "CUDA_VISIBLE_DEVICES=... in front and give --num_gpus and --num_nodes")  # fmt: skip
        return {}
    result.environment.append(f"CUDA_VISIBLE_DEVICES={local[1]}")
    found = {"--nproc-per-node": str(local[1].count(",") + 1)}
    result.rows.append(Row(f"--include {value}", f"CUDA_VISIBLE_DEVICES={local[1]} --nproc-per-node {found['--nproc-per-node']}"))
    return found


def take_torchrun(words: list[str], result: Translation) -> list[str]:
    """torchrun and its older names: the options stay."""
    options, rest = take_options(words, lambda name: 0 if name in TORCHRUN_SWITCHES else 1)
    chosen: dict[str, list[str]] = {}
    for name, values in options:
        option = "--" + name.replace("_", "-")
        shown = " ".join([option, *values])
        if name in ("module", "m", "use_env"):
            result.rows.append(Row(shown, "", DROPPED["module"][1] if name != "use_env" else DROPPED["no_local_rank"][1]))
        elif name in ("no_python", "run_path"):
            result.problems.append(f"{shown} of torchrun: {IMPOSSIBLE['no_python'][1]}")
        else:
            chosen[option] = values
            result.rows.append(Row(shown, shown))
    result.ranks_per_node, nodes = ("".join(chosen.get(option, ["1"])) for option in ("--nproc-per-node", "--nnodes"))
    result.num_nodes = int(nodes) if nodes.isdigit() else 0  # 0: a range, which torchrun settles
    result.launcher = [["torchrun"], *([option, *values] for option, values in chosen.items())]
    return take_program(rest, result)


def take_python(words: list[str], result: Translation) -> list[str]:
    """python -m torch.distributed.launch OPTIONS program, or python program."""
    kept, rest = [words[0]], words[1:]
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        count = 2 if rest[0].lstrip("-") in PYTHON_OPTIONS_WITH_VALUE else 1
        kept, rest = kept + rest[:count], rest[count:]
    if rest[:1] == ["-m"]:
        module, rest = rest[1] if len(rest) > 1 else "", rest[2:]
        if module in ("torch.distributed.launch", "torch.distributed.run"):
            result.rows.append(Row(" ".join([*kept, "-m", module]), "torchrun"))
            return take_torchrun(rest, result)
        if module in ("deepspeed", "deepspeed.launcher.runner"):
            return take_deepspeed(rest, result)
        rest = [module, *rest]
    result.rows.append(Row(" ".join(kept), " ".join(kept), "one process"))
    result.launcher = [[word] for word in kept]
    return take_program(rest, result)


def take_program(rest: list[str], result: Translation) -> list[str]:
    if not rest:
        raise ValueError("the line names no program behind the launcher and its options")
    stem = rest[0].rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
    if re.fullmatch(r"pretrain_(gpt|moe)\w*", stem):
        result.rows.append(Row(rest[0], PROGRAM))
    else:
        result.problems.append(f"the program {rest[0]}: only GPT pretraining (pretrain_gpt.py, pretrain_moe.py) has its like here")
    return rest[1:]


# ---------------------------------------------------------------- the flags and the JSON


def take_flags(words: list[str], json_path: str | None, result: Translation) -> None:
    """Each flag to a row and, unless it goes, to a flag of ours; then the same for the JSON."""
    parser = build_parser(PROGRAM)
    options = given_options(parser, words)
    path = json_path_of(options, json_path, result)
    deepspeed = read_deepspeed(path) if path else None
    plain = [w for o in options if o.dest != "deepspeed_config" for w in (o.option, *o.words) if w]
    try:
        result.parsed = parse_args([*plain, *(("--deepspeed-config", path) if path else ())], PROGRAM)
        told = result.parsed.warnings
        result.notes = [*result.parsed.not_yet, *result.parsed.run.train_problems()]
        result.problems += map(str, result.parsed.missing)
    except ConfigError as error:
        told = error.problems
        result.problems += told
    result.disagreements = [text for text in told if isinstance(text, Disagreement)]
    others = {o.dest.removeprefix("_other_"): list(o.words) for o in options if o.dest and o.dest.startswith("_other_")}
    consts = {s: a.const for a in parser._actions for s in a.option_strings}
    last = {o.dest: o for o in options}
    for option in options:
        became, note = became_of(option, others, consts.get(option.option))
        if option.dest is not None and last[option.dest] is not option:
            became, note = [], f"said again by {last[option.dest].spelled}"
        result.rows.append(Row(str(option), " ".join(became), note))
        result.flags += [became] if became else []
    if deepspeed is not None:
        result.json_name = path
        take_json(deepspeed, plain, set(last), result)


def json_path_of(options: list[GivenOption], instead: str | None, result: Translation) -> str | None:
    """Where the DeepSpeed JSON is; None when there is none, or not here, which is a problem."""
    named = next((" ".join(o.words) for o in reversed(options) if o.dest == "deepspeed_config"), None)
    if instead and named is None:
        result.problems.append(f"--json {instead}: the line has no --deepspeed_config whose place it could take")
    path = instead or named
    if path and not Path(path).exists():
        result.problems.append(f"--deepspeed_config {path}: the file is not here; say where it is with --json FILE")
    elif path == "":
        result.problems.append("--deepspeed_config wants a value")
    return path if path and Path(path).exists() else None


def became_of(option: GivenOption, others: dict[str, list[str]], const: object) -> tuple[list[str], str]:
    """(words of ours, note) for one flag of the line."""
    dest = option.dest
    if dest is None:
        return [], "unknown"
    if dest == "deepspeed_config":
        return [], "its keys are below"
    if dest.startswith("_other_"):
        name = dest.removeprefix("_other_")
        why = LEFTOVERS[name][1] if name in LEFTOVERS else asks_for_nothing(name, others)
        return ([], why) if why else ([f"--{name}", *option.words], f"{NOT_YET[name][1]}: not built yet")
    if dest not in FIELDS:  # --preset, --config
        return [option.option, *option.words], ""
    spec = FIELDS[dest]
    words = words_of(spec, const) if spec.kind is bool else [spec.option, *option.words]
    return words, ""


def take_json(deepspeed: DeepSpeedJson, flags_alone: list[str], given: set[str], result: Translation) -> None:
    """The keys that the flags do not say already become flags. What only the JSON can ask for cannot be translated."""
    try:
        without = parse_args(flags_alone, PROGRAM).run
    except ConfigError:
        without = None
    have = {name: value for group in without.to_dict().values() for name, value in group.items()} if without else {}
    for entry in deepspeed.entries:
        became, notes = [], [entry.note] if entry.note else []
        for name in entry.fields:
            words = words_of(FIELDS[name], deepspeed.values[name])
            if name in given:
                notes.append(f"{FIELDS[name].option} is on the command line")
            elif name in have and have[name] == deepspeed.values[name]:
                notes.append(f"{' '.join(words)} is the default")
            else:
                became.append(words)
        result.json_rows.append(Row(str(entry), " ".join(w for words in became for w in words), "; ".join(notes)))
        result.flags += [words for words in became if words not in result.flags]
    result.problems += deepspeed.not_yet


def translate(words: list[str], tail: str, json_path: str | None) -> Translation:
    result = Translation(tail=tail)
    try:
        flags = take_launcher(list(words), result)
    except ValueError as error:
        result.problems.append(str(error))
        return result
    take_flags(flags, json_path, result)
    if not result.problems:
        again = parse_args(result.words(), PROGRAM)
        assert again.run == result.parsed.run, f"translated to another run: {result.words()}"
    return result


# ---------------------------------------------------------------- printing and starting


def table(rows: list[Row], head: Row) -> Iterator[str]:
    cells = [[_one_line(row.given), _one_line(row.became), _one_line(row.note, 1000)] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    for given, became, note in cells:
        yield f"# {given:<{widths[0]}} | {became:<{widths[1]}} | {note}".rstrip(" |")


def _one_line(text: str, longest: int = 70) -> str:
    """For a comment: a line break in a value must not end it."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def comments(result: Translation) -> Iterator[str]:
    yield from table(result.rows, Row("given", "became", "note"))
    if result.json_rows:
        yield "#"
        yield from table(result.json_rows, Row(f"key of {Path(result.json_name).name}", "became", "note"))
    yield "#"
    yield f"# Where the command line and the JSON disagree: {'nowhere' if not result.disagreements else ''}".rstrip()
    yield from (f"#   {' '.join(text.split())}" for text in result.disagreements)
    if result.notes:
        yield "# In the way of training:"
        yield from (f"#   {' '.join(text.split())}" for text in result.notes)


def command(result: Translation) -> str:
    """One option per line, quoted for the shell."""
    head = " ".join([*result.environment, *result.launcher[0]])
    lines = [head, *map(_quoted, result.launcher[1:]), PROGRAM, *map(_quoted, result.flags)]
    return " \\\n  ".join(lines) + (f" {result.tail}" if result.tail else "")


def _quoted(words: list[str]) -> str:
    return " ".join(word if isinstance(word, Shell) else shlex.quote(word) for word in words)


def start(result: Translation) -> int:
    """Run the translated command to its end. On one machine the ranks meet over a file: torchrun's own store listens on every interface."""
    if result.tail:
        raise ConfigError([f"{result.tail!r} is for a shell; leave it out with --run, or start the printed command"])
    ranks = int(result.ranks_per_node) if result.ranks_per_node.isdigit() else None
    check_to_train(result.parsed, ranks * result.num_nodes if ranks and result.num_nodes else None)
    environment = os.environ | dict(shlex.split(a)[0].split("=", 1) for a in result.environment)
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    program = [str(ROOT / PROGRAM), *result.words()]
    with tempfile.TemporaryDirectory() as meeting:
        child = subprocess.Popen([sys.executable, *launcher_words(result, meeting), *program], env=environment)
        signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal has sent it to the child too
        status = child.wait()
    return status if status >= 0 else 128 - status


def launcher_words(result: Translation, meeting: str) -> list[str]:
    """What stands between the interpreter and the program."""
    (launcher,), options = result.launcher[0], result.launcher[1:]
    own = ["-m", "torch.distributed.run"] if launcher == "torchrun" else []
    if own and result.num_nodes == 1:
        own += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting}/store", "--rdzv-conf", "store_type=file"]
        own += ["--local-addr", "127.0.0.1"]
        options = [o for o in options if not re.match("--(rdzv|master|node|local-addr|standalone)", o[0])]  # other ways to meet
    return [*own, *(from_environment(word) for option in options for word in option)]


def from_environment(word: str) -> str:
    if not isinstance(word, Shell):
        return word
    name = re.search(r"\w+", word)[0]
    if name not in os.environ:
        raise ConfigError([f"{name} is not set: on several nodes it says which one this is"])
    return os.environ[name]


def cut_argv(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """(flags of this tool, the launch line or None). The line stands behind `--`, or begins with the launcher's name."""
    for i, word in enumerate(argv):
        if word == "--":
            return argv[:i], argv[i + 1 :]
        if word in ("deepspeed", "torchrun") and argv[i - 1 : i] not in (["--file"], ["--json"]):
            return argv[:i], argv[i:]
    return argv, None


def main(argv: list[str] | None = None) -> int:
    own, words = cut_argv(sys.argv[1:] if argv is None else argv)
    config = parse_tool(TranslateConfig, NAME, own)
    try:
        tail = ""
        if words is None:
            words, tail = split_line(line_of(Path(config.file).read_text(encoding="utf-8") if config.file else sys.stdin.read()))
        result = translate(words, tail, config.json)
        print("\n".join(comments(result)))
        if result.problems:
            raise ConfigError(result.problems)
        print(command(result), flush=True)
        if config.run:
            return start(result)
    except (ValueError, OSError) as error:
        print(format_problems(NAME, getattr(error, "problems", [str(error)])), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
