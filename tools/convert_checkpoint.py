"""Checkpoints of any layout -> safetensors, a transformers folder or Megatron-DeepSpeed's files, and back to a run directory that loads under any
layout.

  python tools/convert_checkpoint.py --from hf --to native --load Mixtral-8x7B-v0.1 --save runs/mixtral --verify
  python tools/convert_checkpoint.py --from native --to hf --load runs/a --save exports/a --verify
  python tools/convert_checkpoint.py --from native --to safetensors --load runs/a --save exports/a --verify
  python tools/convert_checkpoint.py --from native --to safetensors --load runs/a --save exports/a --iteration 100 --dtype bfloat16
  python tools/convert_checkpoint.py --from safetensors --to native --load exports/a --save runs/b --include-optimizer
  python tools/convert_checkpoint.py --from megatron-deepspeed --to native --load old/run --save runs/c --verify
  python tools/convert_checkpoint.py --from native --to megatron-deepspeed --load runs/a --save exports/b --target-tensor-parallel-size 2

Without --include-optimizer only the weights are taken; training then goes on with --no-load-optim (same iteration and place in
the data, fresh optimizer) or --finetune (from the start). With it, training goes on as if nothing had been converted.

A folder of transformers has no optimizer and no iteration: training starts from it with --finetune, or without any conversion with
pretrain_gpt_moe.py --load-hf DIR. What it cannot say is refused with the reason, or left out with --allow-lossy.

The target appears when it is complete, with --verify when it also equals the source, or not at all. After an interruption the same
command goes on where it was.
Exit code 0: converted. 1: what was written differs from the source. 2: the command or the checkpoint is wrong. 130: interrupted.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.flags import ConfigError, checked, flag, format_problems, parse_tool
from megatron_moe.conversion.source import Source

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.conversion.source import Selection

PROG = "tools/convert_checkpoint.py"
TEXT = Path(__file__).resolve().parents[1] / "README.md"  # read by the models that --verify compares
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHOWN = 10  # tensors that are left out, by name
# Flags that only some formats have, by what they do with them: (formats of --from, formats of --to, why the others have no use for it).
ONLY_FOR = {
    "max_shard_size": ((), ("safetensors", "hf"), "other formats are not cut"),
    "dtype": ((), ("safetensors", "hf", "megatron-deepspeed"), "a run directory keeps the types of training"),
    "hf_model_type": ((), ("hf",), "it names an architecture of transformers"),
    "make_vocab_size_divisible_by": (("hf",), (), "other formats have their padding already"),
    "true_vocab_size": (("megatron-deepspeed",), (), "other formats say it"),
    "model_flags": (("megatron-deepspeed",), (), "other formats say it"),
    "target_tensor_parallel_size": ((), ("megatron-deepspeed",), "other formats have no layout"),
    "target_expert_parallel_size": ((), ("megatron-deepspeed",), "other formats have no layout"),
    "target_expert_tensor_parallel_size": ((), ("megatron-deepspeed",), "other formats have no layout"),
}


def byte_count(words: list[str]) -> int:
    """5GB, 500 MB, 2GiB, 1000000 -> bytes."""
    text = "".join(words)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?I?B?)", text.upper())
    unit = match and ({"": 1, "B": 1} | UNITS).get(match[2])
    if not unit or float(match[1]) * unit < 1:
        raise ValueError(f"wants a size such as 5GB, 500MB or 2GiB, not {text!r}")
    return int(float(match[1]) * unit)


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion."""

    from_: Literal["native", "hf", "safetensors", "megatron-deepspeed"] | None = flag(
        None, "format of --load: native is a run directory, hf a folder of Hugging Face transformers, safetensors our own flat folder; "
        "megatron-deepspeed has files for each expert and each tensor-parallel rank")  # fmt: skip
    to: Literal["native", "hf", "safetensors", "megatron-deepspeed"] | None = flag(None, "format to write")
    load: str | None = flag(None, "run directory (or one iter_ directory), or folder", metavar="DIR")
    save: str | None = flag(None, "new directory to write", metavar="DIR")
    iteration: int | None = flag(None, "which checkpoint of a run directory; the newest when not given", names=("ckpt-step",), minimum=0)
    max_shard_size: int | None = flag(
        None, "safetensors, hf: cut into files of at most this size; a larger tensor gets a file of its own (default: 5GB)",
        parse=byte_count, metavar="SIZE")  # fmt: skip
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "safetensors, hf, megatron-deepspeed: round the weights to this type; when not given, safetensors keep that of training, hf gets "
        "bfloat16 of a run with --bf16, megatron-deepspeed that of the computation (--fp16, --bf16) or the one in which they were imported; "
        "float16 is for megatron-deepspeed")  # fmt: skip
    include_optimizer: bool = flag(False, "convert the optimizer state too")
    true_vocab_size: int | None = flag(
        None, "from megatron-deepspeed: words of the vocabulary without padding, where the files do not say it; all rows when not given", minimum=1)  # fmt: skip
    model_flags: str | None = flag(
        None, "from megatron-deepspeed: flags of the training, in quotes, in place of the arguments in the files", metavar="FLAGS")  # fmt: skip
    target_tensor_parallel_size: int | None = flag(
        None, "to megatron-deepspeed: tensor-parallel degree to write for; that of the run when not given",
        names=("target-tensor-model-parallel-size",), minimum=1)  # fmt: skip
    target_expert_parallel_size: int | None = flag(
        None, "to megatron-deepspeed: expert-parallel degree, which the names of its files depend on; that of the run when not given",
        names=("target-expert-model-parallel-size",), minimum=1)  # fmt: skip
    target_expert_tensor_parallel_size: int | None = flag(
        None, "to megatron-deepspeed: 1, or the tensor-parallel degree for --enable-expert-tensor-parallelism; as the run when not given",
        minimum=1)  # fmt: skip
    hf_model_type: Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2",
                           "deepseek_v3", "megatron_moe_gpt"] | None = flag(
        None, "hf: the architecture to write, by its model_type; the first that can say the whole model when not given. megatron_moe_gpt "
        "brings its own modelling file (trust_remote_code), for what transformers has no architecture for: residual layers, pyramids")  # fmt: skip
    make_vocab_size_divisible_by: int | None = flag(
        None, "from hf: pad the vocabulary to a multiple of this, with zeros (default: 128, as in training)", minimum=1
    )
    allow_lossy: bool = flag(False, "leave out what the target cannot hold, instead of refusing, and list it")
    verify: bool = flag(False, "compare every tensor bit by bit, and the logits of both, before the target gets its name")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        for name, what in (("from_", "format of --load"), ("to", "format to write"), ("load", "what to convert"), ("save", "where to")):
            if not getattr(self, name):
                yield f"--{name.rstrip('_')} is missing: {what}"
        if self.from_ and self.from_ == self.to:
            yield f"--from and --to are both {self.to}: nothing to convert"
        for name, (sources, targets, why) in ONLY_FOR.items():
            if getattr(self, name) is not None and self.from_ not in sources and self.to not in targets:
                where = " or ".join([f"--from {f}" for f in sources] + [f"--to {f}" for f in targets])
                yield f"--{name.replace('_', '-')} is for {where}: {why}"
        if self.dtype == "float16" and self.to != "megatron-deepspeed":
            yield "--dtype float16 is for --to megatron-deepspeed; its numbers end at 65504"
        if self.include_optimizer and "megatron-deepspeed" in (self.from_, self.to):
            yield "--include-optimizer: DeepSpeed's optimizer files belong to one layout and are not converted; leave it out"
        if self.include_optimizer and self.dtype:
            yield f"--dtype {self.dtype} rounds the weights that --include-optimizer wants to train on exactly; drop one of them"
        if self.include_optimizer and "hf" in (self.from_, self.to):
            yield "--include-optimizer: a transformers folder has no optimizer state; leave it out"

    def options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of a format's options that were given."""
        given = {
            "max_shard_size": self.max_shard_size,
            "hf_model_type": self.hf_model_type,
            "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
            "true_vocab_size": self.true_vocab_size,
            "model_args": args_of_flags(self.model_flags) if self.model_flags and "model_args" in names else None,
            "target_tensor_parallel_size": self.target_tensor_parallel_size,
            "target_expert_parallel_size": self.target_expert_parallel_size,
            "target_expert_tensor_parallel_size": self.target_expert_tensor_parallel_size,
        }
        return {name: given[name] for name in names if given[name] is not None}


def args_of_flags(text: str) -> dict[str, Any]:
    """--model-flags -> the arguments that a file of Megatron would hold. ConfigError for what is no flag."""
    import shlex

    from megatron_moe.arguments import parse_args
    from megatron_moe.conversion.megatron_args import args_of_run

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError([f"--model-flags: {error}"]) from None
    try:
        run = parse_args(words).run
    except ConfigError as error:
        raise ConfigError([f"--model-flags: {problem}" for problem in error.problems]) from None
    return vars(args_of_run(run, run.model.vocab_size, None, {}, {}))


@dataclass(frozen=True)
class Plan:
    """What is converted: names, shapes and types of the target, and what of the source it does not hold, in words."""

    source: Source
    tensors: dict
    losses: list[str]
    left_out: list[str]


def checked_source(config: ConvertConfig) -> Plan:
    """The opened source and the tensors to write; ConfigError with everything that is wrong with the source."""
    from megatron_moe.conversion.convert import FORMATS, open_source

    options = config.options(FORMATS[config.from_].SOURCE_OPTIONS)
    source = open_source(config.from_, Path(config.load), config.iteration, **options)
    problems = source.file_problems("crc")
    if problems:
        if config.from_ == "native":
            from megatron_moe.conversion.native import other_iterations

            problems[-1] += other_iterations(source.path)
        raise ConfigError(problems)
    return fitted(config, source)


def fitted(config: ConvertConfig, source: Source) -> Plan:
    """What the target holds of the source. ConfigError for what it cannot hold, unless --allow-lossy."""
    from megatron_moe.conversion.convert import FORMATS
    from megatron_moe.conversion.fit import run_of, tensors_to_write  # imports torch

    target = FORMATS[config.to]
    run, vocab_size, dtype = run_of(source), source.meta.get("vocab_size"), config.dtype
    if dtype is None and hasattr(target, "stored_dtypes"):
        dtype = target.stored_dtypes(source)
    tensors = tensors_to_write(source, config.include_optimizer, dtype)
    if not hasattr(target, "losses"):
        return Plan(source, tensors, [], [])
    options = {name: value for name, value in config.options(target.TARGET_OPTIONS).items() if name != "max_shard_size"}
    losses = target.losses(run, vocab_size, **options)
    if losses and not (config.allow_lossy and hasattr(target, "kept")):
        remedy = "; --allow-lossy leaves it out" if hasattr(target, "kept") else ""
        raise ConfigError([f"--to {config.to} cannot hold {loss}{remedy}" for loss in losses])
    if not hasattr(target, "kept"):
        return Plan(source, tensors, [], [])
    kept = target.kept(run, vocab_size, tensors, **options)
    return Plan(source, kept, losses, [name for name in tensors if name not in kept])


def prepare(config: ConvertConfig) -> Plan:
    """All that is wrong with source and target, together."""
    from megatron_moe.conversion.convert import target_problems
    from megatron_moe.conversion.source import total_size

    problems: list[str] = []
    plan = None
    try:
        plan = checked_source(config)
    except ConfigError as error:
        problems += error.problems
    problems += target_problems(Path(config.save), total_size(plan.tensors) if plan else 0)
    if problems:
        raise ConfigError(problems)
    return plan


def notes(config: ConvertConfig, plan: Plan) -> Iterator[str]:
    """What a person should know before it starts."""
    from megatron_moe.conversion.convert import unfinished

    source, tensors = plan.source, plan.tensors
    yield from source.notes
    for loss in plan.losses:
        yield f"lost: {loss}"
    if plan.left_out:
        more = f" and {len(plan.left_out) - SHOWN} more" if len(plan.left_out) > SHOWN else ""
        yield f"{len(plan.left_out)} tensors are left out: {', '.join(plan.left_out[:SHOWN])}{more}"
    if not source.has_checksums:
        yield f"{source.path} has no checksums.json: a flipped bit would not be noticed"
    if (partial := unfinished(Path(config.save))) is not None:
        yield f"{partial} is left of a conversion that was interrupted: what is finished there is not written again"
    optimizer = [name for name in source.tensors if name.startswith("optimizer.")]
    if optimizer and not config.include_optimizer:
        yield f"{len(optimizer)} tensors of optimizer state are left out" + (
            "" if config.to == "hf" else "; --include-optimizer takes them along"
        )
    changed = {(source.tensors[n]["dtype"], e["dtype"]) for n, e in tensors.items() if source.tensors[n]["dtype"] != e["dtype"]}
    for before, after in sorted(changed):
        how = "rounded" if after in ("bfloat16", "float16") else "widened, which is exact; what an earlier rounding lost stays lost"
        yield f"weights go from {before} to {after}: {how}"


def tokens_to_compare(source: Source) -> tuple[Tensor, str]:
    """Two rows of a real text where the tokenizer can be found, else ids drawn from a seed; and which of the two."""
    import torch

    from megatron_moe.config.data import TokenizerConfig
    from megatron_moe.conversion.fit import run_of
    from megatron_moe.inference.load import restore_tokenizer

    run, vocab_size = run_of(source), source.meta["vocab_size"]
    length = min(run.training.seq_length, run.model.max_position_embeddings, 64)
    try:
        tokenizer = restore_tokenizer(source.meta["tokenizer"], TokenizerConfig(), run.model.vocab_size, vocab_size)
        ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")) if tokenizer else []
    except (ValueError, OSError):  # its files have moved, or it is the one for numbers
        ids = []
    if len(ids) >= 2 * length:
        return torch.tensor(ids[: 2 * length]).view(2, length), f"2 x {length} tokens of {TEXT.name}"
    drawn = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1234))
    return drawn, f"2 x {length} token ids drawn with seed 1234 (the tokenizer of training is not there)"


def verify(plan: Plan, selection: Selection, target: Source) -> list[str]:
    """The differences; prints a table when there are none."""
    from tqdm import tqdm

    from megatron_moe.conversion.source import human_bytes, total_size
    from megatron_moe.conversion.verify import logits_difference, tensor_differences

    size = total_size(selection.tensors)
    selection.on_bytes = lambda _: None
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", disable=not sys.stderr.isatty(), leave=False) as bar:
        if lines := tensor_differences(selection, target, bar.update):
            return lines
    tokens, text = tokens_to_compare(selection.source)
    difference = logits_difference(selection, target, tokens)
    if difference and not plan.losses:  # a loss need not be a tensor: a window, a factor
        return [f"logits   of {text}: up to {difference:g} apart"]
    is_rounded = any(entry["dtype"] != selection.source.tensors[name]["dtype"] for name, entry in selection.tensors.items())
    narrow = sorted({entry["dtype"] for entry in selection.tensors.values()} & {"bfloat16", "float16"})
    against = f"the source rounded to {' and '.join(narrow)}" if narrow and is_rounded else "the source"
    print(f"verified against {against}:")
    print(f"  tensors  {len(target.tensors)} of {len(selection.tensors)}, {human_bytes(size)}: equal in every bit")
    print(f"  logits   of {text}: " + (f"up to {difference:g} apart, by what was left out" if difference else "equal in every bit"))
    return []


def run(config: ConvertConfig) -> None:
    """Raises ConfigError for what the user has to change, ConversionError when the result differs."""
    from tqdm import tqdm

    from megatron_moe.conversion.convert import FORMATS, convert
    from megatron_moe.conversion.fit import run_of
    from megatron_moe.conversion.source import Selection, human_bytes, total_size

    plan = prepare(config)
    source, tensors = plan.source, plan.tensors
    for note in notes(config, plan):
        print(f"note: {note}", file=sys.stderr)
    target, express = FORMATS[config.to], {}
    if hasattr(target, "expressed"):
        express["express"] = partial(target.expressed, vocab_size=source.meta["vocab_size"])
    options = config.options(target.TARGET_OPTIONS)
    reopen = partial(target.open_source, **(target.reading_options(run_of(source)) if hasattr(target, "reading_options") else {}))
    conversion = {
        "from": config.from_, "to": config.to, "source": str(source.path.resolve()), "iteration": source.iteration, "options": options,
        "files": {name: [size, (source.path / name).stat().st_mtime_ns] for name, size in source.files().items()}, "tensors": tensors,
    }  # fmt: skip
    with tqdm(total=total_size(tensors), unit="B", unit_scale=True, desc="converting", disable=not sys.stderr.isatty(), leave=False) as bar:
        selection = Selection(source, tensors, bar.update, **express)
        resume = lambda journal: {"journal": journal} if target.RESUMES else {}  # noqa: E731
        write = lambda chosen, building, journal: target.write(chosen, building, **options, **resume(journal))  # noqa: E731
        check: Callable[[Source], list[str]] = lambda written: verify(plan, selection, written) if config.verify else []  # noqa: E731
        written = convert(selection, Path(config.save), write, reopen, check, conversion)
    print(f"{source.path} -> {config.save}: iteration {source.iteration}, {len(tensors)} of {len(source.tensors)} tensors, each read and "
          f"written once; {len(written.files())} files, {human_bytes(sum(written.files().values()))}")  # fmt: skip
    for note in written.notes if config.to == "hf" else ():
        print(f"  {note}")
    print(next_command(config))


def next_command(config: ConvertConfig) -> str:
    if config.to == "native":
        resume = f"--load {config.save} --no-load-optim (or --finetune)"
        if config.include_optimizer:
            resume = f"--load {config.save}"
        elif config.from_ == "hf":
            resume = f"--load {config.save} --finetune"
        return f"Next: python tools/generate_text.py --load {config.save} --prompt ...; or train on with {resume}"
    if config.to == "hf":
        load = "Next: transformers.AutoModelForCausalLM.from_pretrained"
        if any(Path(config.save).glob("modeling_*.py")):
            return f"transformers has no architecture for this model: the folder brings a modelling file.\n{load}({config.save!r}, trust_remote_code=True)"
        return f"{load}({config.save!r}), or vllm serve {config.save}"
    return f"Next: python tools/inspect_checkpoint.py --load {config.save}"


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(ConvertConfig, PROG, argv)
    from megatron_moe.checkpoint.files import CheckpointError
    from megatron_moe.conversion.convert import ConversionError

    try:
        run(config)
    except ConversionError as fault:
        more = [f"  ... and {len(fault.lines) - 10} more"] if len(fault.lines) > 10 else []
        print("\n".join([f"{PROG}: what was written differs from the source; it was deleted",
                         *(f"  {line}" for line in fault.lines[:10]), *more]), file=sys.stderr)  # fmt: skip
        return 1
    except ConfigError as error:
        print(format_problems(PROG, error.problems), file=sys.stderr)
        return 2
    except (ValueError, OSError, CheckpointError) as error:
        print(format_problems(PROG, str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        from megatron_moe.conversion.convert import unfinished

        again = "; the same command goes on where this one was" if unfinished(Path(config.save)) else ""
        print(f"{PROG}: interrupted; nothing was written to {config.save}{again}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    sys.exit(main())
