"""Plan a run: every valid layout of a model on a number of devices, what it needs in memory, how long a step takes, fastest first.

  python tools/plan.py --machine cpu --devices 2 --preset tiny --mock-data                          a laptop with 2 processes
  python tools/plan.py --machine h100-sxm --devices 64 --preset gpt-350m-moe-128 --top 5            64 H100 on 8 nodes
  python tools/plan.py --machine h100-sxm --devices 64 --fixed zero micro-batch-size -- torchrun ... pretrain_gpt_moe.py FLAGS

The model is given by the flags of pretrain_gpt_moe.py, a preset among them, or by a whole launch command behind `--`. Its own flags
about layout (--tensor-model-parallel-size and so on, --micro-batch-size, --zero-stage, --recompute-granularity) are where the search
may go elsewhere, except for those that --fixed names. The global batch stays: without --global-batch-size it is what the command
would have on these devices. Printed are the best layouts, the flags of each (to be put behind the command, where the last word
counts), and how many others were left out, and why. docs/planning.md says how the prediction is made, and how far off it was.

Exit code 0: there is a layout that fits. 1: none fits, and what would have to change. 2: the command is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, without an install

from megatron_moe.arguments import build_parser, parse_args
from megatron_moe.config.data import MOCK_VOCAB_SIZE
from megatron_moe.config.flags import ConfigError, checked, fields_of, flag, given_options, parse_tool
from megatron_moe.config.run import RunConfig
from megatron_moe.training.planning.layout import SETTINGS
from megatron_moe.training.planning.machines import MACHINES, Assumptions, Machine
from megatron_moe.training.planning.report import as_json, as_text
from megatron_moe.training.planning.search import axis_of, search

PROG = "tools/plan.py"
DEFAULTS = Assumptions()


@dataclass(frozen=True)
class PlanConfig:
    """The machine, and what to show.

    Figures of a named machine that are given here replace those of the table in megatron_moe/training/planning/machines.py.
    """

    devices: int | None = flag(None, "ranks to lay the model out over", minimum=1, maximum=16384)
    machine: str = flag("h100-sxm", f"figures of a known machine: {', '.join(MACHINES)}", metavar="NAME")
    device_memory_gb: float | None = flag(None, "memory of a device in GB (10^9 bytes)", above=0)
    peak_tflops: float | None = flag(None, "its dense matrix products in the compute type, TFLOP/s", above=0)
    memory_bandwidth: float | None = flag(None, "its memory bandwidth, GB/s", above=0)
    intra_node_bandwidth: float | None = flag(None, "between devices of a node, GB/s each way", above=0)
    inter_node_bandwidth: float | None = flag(None, "from a device to those of other nodes, GB/s each way", above=0)
    devices_per_node: int | None = flag(None, "devices of a node; tensor parallelism stays within one", minimum=1)
    load_skew: float = flag(
        DEFAULTS.load_skew, "rows of the busiest expert-parallel rank over the mean: 1 is balanced, 2 is a bad day", minimum=1
    )
    memory_reserve: float = flag(
        DEFAULTS.memory_reserve, "share of the memory that tensors do not get: context, NCCL, what the allocator cannot use", minimum=0,
        maximum=0.9)  # fmt: skip
    matmul_efficiency: float = flag(DEFAULTS.matmul_efficiency, "of the peak, in matrix products", above=0, maximum=1)
    attention_efficiency: float = flag(DEFAULTS.attention_efficiency, "of the peak, in fused attention", above=0, maximum=1)
    network_efficiency: float = flag(DEFAULTS.network_efficiency, "of the bandwidths, in collectives", above=0, maximum=1)
    memory_efficiency: float = flag(DEFAULTS.memory_efficiency, "of the memory bandwidth, elsewhere", above=0, maximum=1)
    collective_latency_us: float = flag(DEFAULTS.collective_latency_us, "microseconds of a collective without content", minimum=0)
    launch_us: float = flag(DEFAULTS.launch_us, "microseconds of the host per operator", minimum=0)
    host_wait_us: float = flag(
        DEFAULTS.host_wait_us,
        "microseconds that the device idles after the host has waited for it: once a layer where rows are counted",
        minimum=0,
    )
    fixed: tuple[str, ...] = flag(
        (), f"flags about layout that stay as the command has them, by name or short: {' '.join(SETTINGS)}", metavar="FLAG"
    )
    top: int = flag(5, "layouts to print", minimum=1, maximum=1000)
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.devices is None:
            yield "--devices N is missing: the number of ranks to plan for, such as 8"
        if self.machine not in MACHINES:
            yield f"--machine {self.machine!r} is not known; use one of {', '.join(MACHINES)}{_near(self.machine, list(MACHINES))}"
        for name in self.fixed:
            if axis_of(name) is None:
                yield f"--fixed {name!r} is no flag about layout; use some of {' '.join(SETTINGS)}{_near(name, list(SETTINGS))}"

    def described(self) -> Machine:
        given = {
            "memory_gb": self.device_memory_gb, "peak_tflops": self.peak_tflops, "memory_bandwidth": self.memory_bandwidth,
            "intra_node_bandwidth": self.intra_node_bandwidth, "inter_node_bandwidth": self.inter_node_bandwidth,
            "devices_per_node": self.devices_per_node,
        }  # fmt: skip
        return dataclasses.replace(MACHINES[self.machine], **{name: value for name, value in given.items() if value is not None})

    def assumed(self) -> Assumptions:
        return Assumptions(
            self.matmul_efficiency, self.attention_efficiency, self.network_efficiency, self.memory_efficiency, self.collective_latency_us,
            self.launch_us, self.host_wait_us, self.load_skew, self.memory_reserve,
        )  # fmt: skip


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def of_launch(words: list[str]) -> list[str]:
    """A launch command without its launcher: what stands behind the training script."""
    scripts = [i for i, word in enumerate(words) if re.search(r"pretrain\w*\.py$", word)]
    return words[scripts[0] + 1 :] if scripts else words


def split_words(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(ours, the model's, problems): every flag goes to who knows it; a flag that nobody knows is looked for in both."""
    before, _, behind = (argv, "", []) if "--" not in argv else (argv[: argv.index("--")], "", argv[argv.index("--") + 1 :])
    own = {option for spec in fields_of(PlanConfig) for option in (*spec.options, *(spec.negative_options if spec.kind is bool else ()))}
    theirs = {option for action in build_parser(PROG)._actions for option in action.option_strings}
    ours, model, problems = [], [], []
    for given in given_options(build_parser(PROG), before):
        words = [given.spelled, *given.words]
        if given.option in own or given.option in ("--help", "-h"):
            ours += words
        elif given.option in theirs or not given.option:
            model += words if given.option else of_launch(list(given.words))
        else:
            problems.append(f"unknown flag {given.spelled}{_near(given.option, sorted(own | theirs))}")
    return ours, [*model, *of_launch(behind)], problems


def read_command(argv: list[str]) -> tuple[PlanConfig, RunConfig]:
    """All mistakes at once, those about the model too."""
    ours, words, problems = split_words(argv)
    run = None
    try:
        if "--help" not in ours and "-h" not in ours:
            parsed = parse_args(words, PROG)
            run, problems = parsed.run, [*problems, *map(str, parsed.missing)]
    except ConfigError as error:
        problems += error.problems
    config = parse_tool(PlanConfig, PROG, ours, problems, usage="FLAGS [FLAGS OF pretrain_gpt_moe.py] [-- LAUNCH COMMAND]")
    assert run is not None
    return config, run


def vocabulary_of(run: RunConfig) -> int:
    """As --dry-run finds it: the tokenizer's, or GPT-2's where that is not here."""
    if run.model.vocab_size:
        return run.model.vocab_size
    if run.data.mock_data and not run.tokenizer.kind:
        return MOCK_VOCAB_SIZE
    from megatron_moe.training.plan import look_here  # and torch with it: only where a tokenizer has to be looked at

    return look_here(run).vocab_size


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config, run = read_command(argv)
    vocab_size = vocabulary_of(run)
    machine, assumed = config.described(), config.assumed()
    fixed = frozenset(axis for axis in map(axis_of, config.fixed) if axis)
    from tqdm import tqdm

    try:
        with tqdm(unit=" layouts", disable=config.json or not sys.stderr.isatty(), leave=False) as bar:
            found = search(run, vocab_size, machine, config.devices, assumed, config.top, fixed, lambda n: bar.update() and None)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    if config.json:
        print(json.dumps(as_json(found, run, vocab_size, machine, config.devices, assumed)))
    else:
        print(as_text(found, run, vocab_size, machine, config.devices, assumed))
    return 0 if found.best else 1


if __name__ == "__main__":
    sys.exit(main())
