"""Add, duplicate, merge or prune the experts of a run directory, optimizer state included; the result trains on and generates.

  python tools/edit_experts.py prune     --load runs/a --save runs/b --keep 6            the least loaded of every layer go
  python tools/edit_experts.py prune     --load runs/a --save runs/b --experts 2:1,5 4:0
  python tools/edit_experts.py merge     --load runs/a --save runs/b --keep 4            the most similar become one, weighted by load
  python tools/edit_experts.py merge     --load runs/a --save runs/b --pairs 2:0+5,1+2
  python tools/edit_experts.py duplicate --load runs/a --save runs/b --experts all:0,1 --noise 0.01
  python tools/edit_experts.py add       --load runs/a --save runs/b --count 2

`edit_experts.py prune --help` lists the flags of prune; so do the others. Loads are those that the run has logged in metrics.jsonl, or are
measured with --text FILE or --data-prefix PREFIX. --dry-run prints the report and writes nothing. Layers may end with different
numbers of experts: the configuration that is written is a pyramid then. What becomes of moments, and when the logits stay: docs/upcycling.md.

Exit code 0: done. 1: what was written differs from what was meant. 2: the command or the checkpoint is wrong. 130: interrupted.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.flags import ConfigError, checked, flag, format_problems, parse_tool

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.config.run import RunConfig
    from megatron_moe.conversion.edit import EditedSource, Edits
    from megatron_moe.conversion.expert_load import Loads
    from megatron_moe.conversion.source import Source

PROG = "tools/edit_experts.py"
TEXT = Path(__file__).resolve().parents[1] / "README.md"  # read where no text is given
ALL = "all"


@dataclass(frozen=True)
class EditConfig:
    """Editing."""

    load: str | None = flag(None, "run directory, or one iter_ directory", metavar="DIR")
    save: str | None = flag(None, "new run directory to write", metavar="DIR")
    iteration: int | None = flag(None, "which checkpoint; the newest when not given", names=("ckpt-step",), minimum=0)
    text: str | None = flag(None, "measure the load, the logits and the loss on this text", metavar="FILE")
    data_prefix: str | None = flag(None, "measure them on this dataset (.bin and .idx) instead", metavar="PREFIX")
    measure_tokens: int = flag(8192, "tokens of --text or --data-prefix that are read", minimum=1)
    metrics: str | None = flag(None, "the log of the run, where its loads are; metrics.jsonl of --load when not given", metavar="FILE")
    topk: int | None = flag(None, "experts per token afterwards; as before when not given", names=("moe-router-topk",), minimum=1)
    seed: int = flag(1234, "of noise and new experts")
    report: bool = flag(True, "compare logits and loss before and after, which takes memory for the model; off: tensor by tensor alone")
    verify: bool = flag(False, "read everything again and compare it bit by bit before the new directory gets its name")
    dry_run: bool = flag(False, "print the report and write nothing")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.load:
            yield "--load DIR is missing: the run whose experts are edited"
        if not self.save and not self.dry_run:
            yield "--save DIR is missing: a new directory; or give --dry-run"
        if self.text and self.data_prefix:
            yield "give either --text or --data-prefix, not both"
        if not self.report and (self.text or self.data_prefix):
            yield "--no-report reads no text; drop --text and --data-prefix, or have the report"
        if self.text and not Path(self.text).is_file():
            yield f"--text {self.text}: there is no such file"


@dataclass(frozen=True)
class PruneConfig:
    """Pruning: give --keep or --experts."""

    keep: int | None = flag(None, "experts that stay in each layer; those with the least load go", minimum=2)
    experts: tuple[str, ...] | None = flag(None, "experts that go: 2:1,5 is 1 and 5 of layer 2; all:0 is 0 of every layer", metavar="L:E,E")
    layers: tuple[int, ...] | None = flag(None, "with --keep: of these layers only", minimum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        yield from _one_of("--keep", self.keep, "--experts", self.experts)
        yield from _spelling(self.experts, by_layer)
        if self.layers and self.experts:
            yield "--layers is about --keep; --experts names its layers"


@dataclass(frozen=True)
class MergeConfig:
    """Merging: give --keep or --pairs."""

    keep: int | None = flag(None, "experts that stay in each layer; the most similar (cosine of their weights) become one", minimum=2)
    pairs: tuple[str, ...] | None = flag(None, "experts that become one: 2:0+5,1+2 are two pairs of layer 2", metavar="L:E+E")
    layers: tuple[int, ...] | None = flag(None, "with --keep: of these layers only", minimum=1)
    equal_weights: bool = flag(False, "plain means instead of means weighted by the load")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        yield from _one_of("--keep", self.keep, "--pairs", self.pairs)
        yield from _spelling(self.pairs, clusters_by_layer)
        if self.layers and self.pairs:
            yield "--layers is about --keep; --pairs names its layers"


@dataclass(frozen=True)
class DuplicateConfig:
    """Duplicating."""

    experts: tuple[str, ...] | None = flag(None, "experts to copy: 2:1,5 is 1 and 5 of layer 2; all:0 is 0 of every layer", metavar="L:E,E")
    noise: float = flag(
        0.01, "noise on the copy's matrices and its row of the router, relative to their spread. With 0 both score alike, and it is "
        "up to rounding which of them gets a token", minimum=0)  # fmt: skip

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.experts:
            yield "--experts is missing: which to copy, such as 2:1,5 or all:0"
        yield from _spelling(self.experts, by_layer)


@dataclass(frozen=True)
class AddConfig:
    """Adding."""

    count: int | None = flag(None, "new experts in each layer, as in a new model", minimum=1)
    layers: tuple[int, ...] | None = flag(None, "in these layers only", minimum=1)

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.count is None:
            yield "--count is missing: how many experts to add to each layer"


ACTIONS: dict[str, type] = {"prune": PruneConfig, "merge": MergeConfig, "duplicate": DuplicateConfig, "add": AddConfig}


def _one_of(a: str, given_a: Any, b: str, given_b: Any) -> Iterator[str]:
    if (given_a is None) == (given_b is None):
        yield f"give either {a} or {b}" + ("" if given_a is None else ", not both")


def _spelling(words: Sequence[str] | None, read: Callable[[Sequence[str]], Any]) -> Iterator[str]:
    try:
        read(words or ())
    except ValueError as error:
        yield str(error)


def by_layer(words: Sequence[str]) -> dict[int | str, list[int]]:
    """2:1,5 all:0 -> {2: [1, 5], "all": [0]}"""
    found: dict[int | str, list[int]] = {}
    for word in words:
        match = re.fullmatch(rf"(\d+|{ALL}):(\d+(?:,\d+)*)", word)
        if match is None:
            raise ValueError(f"--experts wants LAYER:EXPERT,EXPERT such as 2:1,5 or {ALL}:0, not {word!r}")
        found.setdefault(match[1] if match[1] == ALL else int(match[1]), []).extend(map(int, match[2].split(",")))
    return found


def clusters_by_layer(words: Sequence[str]) -> dict[int | str, list[list[int]]]:
    """2:0+5,1+2 -> {2: [[0, 5], [1, 2]]}"""
    found: dict[int | str, list[list[int]]] = {}
    for word in words:
        match = re.fullmatch(rf"(\d+|{ALL}):(\d+(?:\+\d+)+(?:,\d+(?:\+\d+)+)*)", word)
        if match is None:
            raise ValueError(f"--pairs wants LAYER:EXPERT+EXPERT such as 2:0+5,1+2 or {ALL}:0+1, not {word!r}")
        clusters = [list(map(int, cluster.split("+"))) for cluster in match[2].split(",")]
        found.setdefault(match[1] if match[1] == ALL else int(match[1]), []).extend(clusters)
    return found


# ---------------------------------------------------------------- which experts


def of_layers(given: dict[int | str, list], counts: dict[int, int]) -> dict[int, list]:
    """`all` spelled out; ConfigError for layers and experts that are not there, or are named twice."""
    spelled: dict[int, list] = {}
    for layer, items in given.items():
        for one in counts if layer == ALL else [layer]:
            spelled.setdefault(one, []).extend(items)
    problems = [f"layer {layer} has no experts; these have: {_numbers(counts)}" for layer in spelled if layer not in counts]
    for layer, items in spelled.items():
        named = [i for item in items for i in (item if isinstance(item, list) else [item])]
        beyond = sorted({i for i in named if i >= counts.get(layer, i + 1)})
        problems += [f"layer {layer} has {counts[layer]} experts, from 0 on: there is no {_numbers(beyond)}"] if beyond else []
        twice = sorted({i for i in named if named.count(i) > 1})
        problems += [f"layer {layer}: {_numbers(twice)} named twice"] if twice else []
    if problems:
        raise ConfigError(problems)
    return spelled


def chosen_layers(layers: Sequence[int] | None, counts: dict[int, int]) -> list[int]:
    if wrong := [layer for layer in layers or () if layer not in counts]:
        raise ConfigError([f"--layers: {_numbers(wrong)} has no experts; these have: {_numbers(counts)}"])
    return sorted(layers or counts)


def _numbers(numbers: Any) -> str:
    return ", ".join(map(str, numbers))


def plan_prune(config: PruneConfig, counts: dict[int, int], loads: Callable[[], Loads]) -> Edits:
    from megatron_moe.conversion.edit import least_loaded, pruned

    if config.experts is not None:
        return {layer: pruned(counts[layer], gone) for layer, gone in of_layers(by_layer(config.experts), counts).items()}
    layers = [layer for layer in chosen_layers(config.layers, counts) if counts[layer] > config.keep]
    return {layer: pruned(counts[layer], least_loaded(loads()[layer], config.keep)) for layer in layers}


def plan_merge(config: MergeConfig, counts: dict[int, int], loads: Callable[[], Loads], source: Source) -> Edits:
    from megatron_moe.conversion.edit import closest, merged, similarities

    if config.pairs is not None:
        clusters = of_layers(clusters_by_layer(config.pairs), counts)
    else:
        layers = [layer for layer in chosen_layers(config.layers, counts) if counts[layer] > config.keep]
        clusters = {layer: closest(similarities(source, layer), config.keep) for layer in layers}
    return {layer: merged(counts[layer], some, None if config.equal_weights else loads()[layer]) for layer, some in clusters.items()}


def plan_duplicate(config: DuplicateConfig, counts: dict[int, int]) -> Edits:
    from megatron_moe.conversion.edit import duplicated

    chosen = of_layers(by_layer(config.experts), counts)
    return {layer: duplicated(counts[layer], experts, config.noise) for layer, experts in chosen.items()}


def plan_add(config: AddConfig, counts: dict[int, int]) -> Edits:
    from megatron_moe.conversion.edit import extended

    return {layer: extended(counts[layer], config.count) for layer in chosen_layers(config.layers, counts)}


# ---------------------------------------------------------------- the text


def tokens_to_read(config: EditConfig, source: Source, run: RunConfig) -> tuple[Tensor, str]:
    """[rows, length] of --text or --data-prefix, else two short rows of a text, or of drawn ids; and which."""
    import torch

    from megatron_moe.config.data import TokenizerConfig
    from megatron_moe.inference.load import restore_tokenizer

    vocab_size, length = source.meta["vocab_size"], min(run.training.seq_length, run.model.max_position_embeddings)
    wanted = max(config.measure_tokens, length)
    if config.data_prefix:
        from megatron_moe.data.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(config.data_prefix)
        ids = dataset.read(0, min(wanted, dataset.num_tokens)).astype("int64").tolist()
        return in_rows(ids, length, vocab_size, f"--data-prefix {config.data_prefix}"), config.data_prefix
    try:
        tokenizer = restore_tokenizer(source.meta["tokenizer"], TokenizerConfig(), run.model.vocab_size, vocab_size)
        text = Path(config.text or TEXT).read_text(encoding="utf-8")
        ids = tokenizer.encode(text) if tokenizer else []
    except (ValueError, OSError) as error:  # its files have moved, or it is the one for numbers
        if config.text:
            raise ConfigError([f"--text {config.text}: {error}; give --data-prefix PREFIX instead"]) from None
        ids = []
    if config.text:
        if not ids:
            raise ConfigError([f"--text {config.text}: there are no tokens in it, or the run has no tokenizer; give --data-prefix PREFIX"])
        return in_rows(ids[:wanted], length, vocab_size, f"--text {config.text}"), config.text
    length = min(length, 64)
    if len(ids) >= 2 * length:
        return torch.tensor(ids[: 2 * length]).view(2, length), TEXT.name
    drawn = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1234))
    return drawn, "token ids drawn with seed 1234 (give --text or --data-prefix for real ones)"


def in_rows(ids: list[int], length: int, vocab_size: int, where: str) -> Tensor:
    import torch

    if len(ids) < 2:
        raise ConfigError([f"{where}: has {len(ids)} tokens, and at least two are needed"])
    if max(ids) >= vocab_size:
        raise ConfigError([f"{where}: has the token {max(ids)}, and the model knows {vocab_size}; it was made with another tokenizer"])
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def recorded_loads(config: EditConfig, source: Source, counts: dict[int, int]) -> tuple[Loads | None, str]:
    from megatron_moe.checkpoint.files import run_directory
    from megatron_moe.conversion.expert_load import recorded

    path = Path(config.metrics) if config.metrics else run_directory(config.load, None)[0] / "metrics.jsonl"
    if config.metrics and not path.is_file():
        raise ConfigError([f"--metrics {path}: there is no such file"])
    found = recorded(path, source.iteration, counts)
    if found is None:
        return None, f"{path} has no expert_load of these layers up to iteration {source.iteration}"
    return found[0], f"the mean of {found[1]} logged steps"


# ---------------------------------------------------------------- the report


def layer_rows(before: dict[int, int], edits: Edits, loads: Loads | None) -> Iterator[tuple[str, ...]]:
    yield "layer", "before", "after", "changed (share of the load)"
    for layer, count in sorted(before.items()):
        experts = edits.get(layer)
        words = changes(count, experts, (loads or {}).get(layer)) if experts else ["-"]
        yield str(layer), str(count), str(len(experts) if experts else count), "  ".join(words)


def changes(count: int, experts: Sequence[Any], loads: Sequence[float] | None) -> list[str]:
    """-3 (0.4 %): gone; 0 (20 %) + 5 (9 %): one now; 2 (30 %) again: a copy; 2 new."""
    share = lambda i: f"{i} ({100 * loads[i]:.2g} %)" if loads else str(i)  # noqa: E731
    used = {i for e in experts for i, _ in e.parts}
    words = ["-" + share(i) for i in range(count) if i not in used]
    words += [" + ".join(share(i) for i, _ in e.parts) for e in experts if len(e.parts) > 1]
    seen: set[int] = set()
    for e in experts:
        if len(e.parts) == 1:
            words += [f"{share(e.parts[0][0])} again"] if e.parts[0][0] in seen else []
            seen.add(e.parts[0][0])
    new = sum(not e.parts for e in experts)
    return words + ([f"{new} new"] if new else [])


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, widths)), row[3]]))


# ---------------------------------------------------------------- the way


class Work(NamedTuple):
    """What is known before something is written."""

    source: Source
    edited: EditedSource
    before: dict[int, int]  # experts of the layers that have some
    loads: Loads | None
    lines: list[str]  # of the report, behind the table


def prepare(action: str, config: EditConfig, own: Any) -> Work:
    """Everything but writing; ConfigError with what is wrong."""
    from megatron_moe.conversion.convert import open_source, target_problems
    from megatron_moe.conversion.edit import EditedSource, edited_run
    from megatron_moe.conversion.fit import run_of, tensors_to_write
    from megatron_moe.conversion.source import total_size

    source = open_source("native", Path(config.load), config.iteration)
    if problems := source.file_problems("crc"):
        raise ConfigError(problems)
    tensors_to_write(source, has_optimizer(source))  # does it hold what it says?
    run = run_of(source)
    before = {i: n for i, n in enumerate(run.experts_of_blocks(), start=1) if n > 1}
    if not before:
        raise ConfigError([f"{source.path}: is a dense model, without experts; --moe-use-upcycling of pretrain_gpt_moe.py makes some"])
    reading = Reading.of_source(config, source, run) if config.report else None
    if reading is not None and (config.text or config.data_prefix):
        loads, of = reading.loads, f"measured on {reading.tokens.numel()} tokens of {reading.text}"
    else:
        loads, of = recorded_loads(config, source, before)
    edits = plan(action, own, before, loads, of, source)
    after, notes = edited_run(run, edits, config.topk)
    edited = EditedSource(source, after, edits, config.seed, action)
    if config.save and (problems := target_problems(Path(config.save), total_size(tensors_to_write(edited, has_optimizer(source))))):
        raise ConfigError(problems)
    lines = [f"load: {of}", *(reading.compared_with(edited, after) if reading else ()), *(f"note: {note}" for note in notes)]
    return Work(source, edited, before, loads, lines)


class Reading(NamedTuple):
    """What the model made of the text before it was edited."""

    tokens: Tensor
    text: str
    logits: Tensor  # of the first rows
    loss: float
    loads: Loads

    @classmethod
    def of_source(cls, config: EditConfig, source: Source, run: RunConfig) -> Reading:
        tokens, text = tokens_to_read(config, source, run)
        return cls(tokens, text, *read_with(source, run, tokens))

    def compared_with(self, edited: Source, run: RunConfig) -> Iterator[str]:
        logits, loss, _ = read_with(edited, run, self.tokens)
        difference = (logits - self.logits).abs().nan_to_num(float("inf")).max().item()
        yield f"logits of {logits.shape[0] * logits.shape[1]} tokens of {self.text}: up to {difference:.3g} apart"
        yield f"loss on {self.tokens.numel()} tokens of it: {self.loss:.4f} before, {loss:.4f} after, in nats per token"


def read_with(source: Source, run: RunConfig, tokens: Tensor) -> tuple[Tensor, float, Loads]:
    from megatron_moe.conversion.expert_load import measured, read_text
    from megatron_moe.model.plain import build_plain

    model = build_plain(run, source.meta["vocab_size"]).to_empty(device="cpu").eval()
    return *read_text(model, source, tokens), measured(model)


def has_optimizer(source: Source) -> bool:
    return any(name.startswith("optimizer.") for name in source.tensors)


def plan(action: str, own: Any, before: dict[int, int], loads: Loads | None, of: str, source: Source) -> Edits:
    def known_loads() -> Loads:
        if loads is None:
            raise ConfigError([f"the load of the experts is not known: {of}; give --text FILE or --data-prefix PREFIX to measure it"
                               + (", or --equal-weights" if action == "merge" else "")])  # fmt: skip
        if ahead := sorted(before.keys() - loads.keys()):
            raise ConfigError([f"layer {_numbers(ahead)}, of multi-token prediction, does not run on a text, so its load is not known; leave "
                               "--text and --data-prefix out where the run has logged it, or name experts by --experts or --pairs"])  # fmt: skip
        return loads

    if action == "prune":
        edits = plan_prune(own, before, known_loads)
    elif action == "merge":
        edits = plan_merge(own, before, known_loads, source)
    else:
        edits = plan_duplicate(own, before) if action == "duplicate" else plan_add(own, before)
    if not edits:
        raise ConfigError([f"nothing to {action}: the layers have {_numbers(before.values())} experts, and --keep is {own.keep}"])
    return edits


def run(action: str, config: EditConfig, own: Any) -> None:
    from tqdm import tqdm

    from megatron_moe.conversion import native
    from megatron_moe.conversion.convert import convert
    from megatron_moe.conversion.fit import tensors_to_write
    from megatron_moe.conversion.source import Selection, human_bytes, total_size
    from megatron_moe.conversion.verify import tensor_differences

    work = prepare(action, config, own)
    print(f"{work.source.path}, {action}:")
    print_table(list(layer_rows(work.before, work.edited.edits, work.loads)))
    print("\n".join(work.lines))
    if config.dry_run:
        print("nothing was written (--dry-run)")
        return
    tensors = tensors_to_write(work.edited, has_optimizer(work.source))
    with tqdm(total=total_size(tensors), unit="B", unit_scale=True, desc="editing", disable=not sys.stderr.isatty(), leave=False) as bar:
        selection = Selection(work.edited, tensors, bar.update)
        check = lambda written: tensor_differences(Selection(work.edited, tensors), written) if config.verify else []  # noqa: E731
        written = convert(selection, Path(config.save), native.write, native.open_source, check)
    print(f"{config.save}: iteration {written.iteration}, {len(tensors)} tensors, {human_bytes(total_size(tensors))}, each written once"
          f"{', compared bit by bit' if config.verify else ''}")  # fmt: skip
    print(next_command(config, work.edited.run))


def next_command(config: EditConfig, after: RunConfig) -> str:
    m = after.moe
    flags = f"--num-experts {' '.join(map(str, m.num_experts))}" + (f" --topk {m.topk}" if config.topk else "")
    return (f"Next: the training command with --load {config.save} --save {config.save} {flags}; "
            f"or python tools/generate_text.py --load {config.save}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if argv else 2
    action, *rest = argv
    if action not in ACTIONS:
        print(format_problems(PROG, [f"the first word says what to do, one of {', '.join(ACTIONS)}, not {action!r}"]), file=sys.stderr)
        return 2
    config, own = parse_tool((EditConfig, ACTIONS[action]), f"{PROG} {action}", rest)
    from megatron_moe.checkpoint.files import CheckpointError
    from megatron_moe.conversion.convert import ConversionError

    try:
        run(action, config, own)
    except ConversionError as fault:
        print("\n".join([f"{PROG}: what was written differs from what was meant; it was deleted", *fault.lines[:10]]), file=sys.stderr)
        return 1
    except ConfigError as error:
        print(format_problems(PROG, error.problems), file=sys.stderr)
        return 2
    except (ValueError, OSError, CheckpointError) as error:
        print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; nothing was written to {config.save}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    sys.exit(main())
