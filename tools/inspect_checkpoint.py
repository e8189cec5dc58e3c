"""Say what is in a checkpoint: names, shapes, types, sizes; where the run was, how it was laid out, whether files are whole.

  python tools/inspect_checkpoint.py --load runs/a
  python tools/inspect_checkpoint.py --load runs/a --iteration 100 --filter "layers.3.*experts" --norms
  python tools/inspect_checkpoint.py --load exports/a --verify --json
  python tools/inspect_checkpoint.py --load runs/a --layer 3 --expert 17 --norms
  python tools/inspect_checkpoint.py --diff runs/a exports/a

Reads a run directory (its newest checkpoint), one iter_ directory, or a folder of any other format that convert_checkpoint.py knows.
Only names and shapes are read, so size does not matter; --norms and --diff read the tensors, --verify every byte.

--layer L --expert E shows that expert's part of each tensor; with --norms also the cosine of its weights to the mean of the layer's
experts and to the expert that is most similar. --diff A B compares two checkpoints of any formats and layouts: which tensors are in
one alone, or differ in shape, type or values.

Exit code 0: fine, or no difference. 1: files are damaged or missing, or a difference. 2: the command is wrong, or there is nothing to
look at.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.flags import ConfigError, checked, flag, format_problems, parse_tool
from megatron_moe.conversion.convert import FORMATS, format_of, open_source
from megatron_moe.conversion.source import Source, Tensors, count_of, human_bytes, size_of, total_size

PROG = "tools/inspect_checkpoint.py"
SHOWN = 20  # tensors of a kind of difference
NAME = re.compile(r"(model|optimizer\.[a-z_]+)\.(?:((?:layers|mtp)\.\d+)\.)?(.+)")


@dataclass(frozen=True)
class InspectConfig:
    """Inspecting a checkpoint."""

    load: str | None = flag(None, "run directory, one iter_ directory, or folder of another format", metavar="DIR")
    diff: tuple[str, ...] | None = flag(None, "two checkpoints to compare, in place of --load", metavar="DIR")
    iteration: int | None = flag(None, "which checkpoint of a run directory; the newest when not given", names=("ckpt-step",), minimum=0)
    filter: str | None = flag(None, "only tensors whose name matches anywhere, such as layers.3 or experts.w1$", metavar="REGEX")
    layer: int | None = flag(None, "with --expert: the layer, counted from 1", minimum=1)
    expert: int | None = flag(None, "show this expert of --layer, counted from 0: its part of every tensor", minimum=0)
    norms: bool = flag(
        False, "read the tensors too, and show the norm of each (root of the sum of squares); of an expert also how similar it is to others"
    )
    verify: bool = flag(False, "compare the checksum of every file, not only its size")
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if not self.load and not self.diff:
            yield "--load DIR is missing: the directory to look at (or --diff A B, to compare two)"
        if self.diff and len(self.diff) != 2:
            yield f"--diff wants two directories, not {len(self.diff)}"
        if (self.expert is None) != (self.layer is None):
            yield "--expert and --layer belong together; a whole layer is shown by --filter 'layers\\.3\\.'"
        if self.expert is not None and self.filter:
            yield "--filter and --expert both choose tensors; drop one"
        if self.diff:
            for name in ("load", "expert", "norms", "verify"):
                if getattr(self, name) not in (None, False):
                    yield f"--{name} is about one checkpoint, --diff compares two; drop one of them"
        try:
            re.compile(self.filter or "")
        except re.error as error:
            yield f"--filter {self.filter!r} is not a regular expression: {error}"


def opened(config: InspectConfig, directory: Path) -> Source:
    """In whichever format it is."""
    found = format_of(directory)
    if found is None and directory.is_dir():
        looked = ("iter_0000100 or alike (run directory), manifest.json (one checkpoint of it), model.safetensors or its index, "
                  "global_step100/mp_rank_00_model_states.pt")  # fmt: skip
        raise ConfigError([f"{directory}: no checkpoint of a known format ({', '.join(FORMATS)}); looked for {looked}"])
    return open_source(found or "native", directory, config.iteration)


def summary(source: Source, config: InspectConfig) -> dict[str, Any]:
    """Everything that is shown, ready for JSON."""
    meta, how = source.meta, "crc" if config.verify else "size"
    settings = meta.get("config", {})
    chosen = {name: entry for name, entry in source.tensors.items() if re.search(config.filter or "", name)}
    norms, similar = {}, {}
    if config.expert is not None:
        chosen, norms, similar = one_expert(source, config)
    elif config.norms:
        norms = norms_of(source, list(chosen))
    return {
        "path": str(source.path),
        "format": format_of(source.path),
        "iteration": source.iteration,
        "progress": meta.get("progress"),
        "versions": meta.get("versions"),
        "layout": {
            "world_size": meta.get("world_size"),
            "tensor_parallel": settings.get("parallel", {}).get("tensor_model_parallel_size"),
            "expert_parallel": settings.get("moe", {}).get("moe_expert_parallel_size"),
            "zero_stage": settings.get("parallel", {}).get("zero_stage"),
        },
        "architecture": meta.get("architecture"),
        "tokenizer": meta.get("tokenizer"),
        "optimizer": sorted({name.split(".")[1] for name in source.tensors if name.startswith("optimizer.")}),
        "files": {
            "count": len(source.files()),
            "bytes": sum(source.files().values()),
            "verified": how if source.has_checksums else None,
            "problems": source.file_problems(how),
        },
        "expert": None if config.expert is None else {"layer": config.layer, "expert": config.expert} | similar,
        "notes": list(source.notes),
        "parameters": sum(count_of(entry) for name, entry in source.tensors.items() if name.startswith("model.")),
        "tensors": {
            name: entry | {"bytes": size_of(entry)} | ({"norm": norms[name]} if name in norms else {}) for name, entry in chosen.items()
        },
    }  # fmt: skip


def one_expert(source: Source, config: InspectConfig) -> tuple[Tensors, dict[str, float], dict[str, Any]]:
    """Its tensors, and when asked for their norms and its likeness to the others."""
    from megatron_moe.conversion.differences import expert_figures, expert_tensors

    chosen = expert_tensors(source, config.layer, config.expert)
    if not config.norms:
        return chosen, {}, {}
    figures = expert_figures(source, config.layer, config.expert)
    return chosen, figures.pop("tensors"), figures


def norms_of(source: Source, names: list[str]) -> dict[str, float]:
    """One tensor in memory at a time; NaN and infinity show in the norm."""
    import torch

    return {name: float(torch.linalg.vector_norm(tensor.double())) for name, tensor in source.read(names)}


def head_lines(figures: dict[str, Any]) -> Iterator[str]:
    yield f"{figures['path']} ({figures['format']})"
    progress, layout, files = figures["progress"] or {}, figures["layout"], figures["files"]
    consumed = f", after {progress['consumed_samples']:,} samples, {progress['consumed_tokens']:,} tokens" if progress else ""
    yield f"  iteration     {figures['iteration']}{consumed}"
    degrees = [("TP", "tensor_parallel"), ("EP", "expert_parallel"), ("ZeRO", "zero_stage")]
    shown = ", ".join(f"{short} {layout[key]}" for short, key in degrees if layout[key] is not None)
    yield f"  trained on    {layout['world_size']} rank(s)" + (f": {shown}" if shown else "")
    if figures["versions"]:
        yield "  written by    " + ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    if a := figures["architecture"]:
        yield (f"  architecture  {a['num_layers']} layers, hidden {a['hidden_size']}, {a['num_attention_heads']} heads, MLP {a['ffn_hidden_size']}, "
               f"vocabulary {a['vocab_size']} (padded to {a['padded_vocab_size']})")  # fmt: skip
        yield f"  experts       {' '.join(map(str, a['experts_per_layer']))} by layer, {a['mlp_type']}"
    if t := figures["tokenizer"]:
        names = [str(t[key]) for key in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file") if t.get(key)]
        yield f"  tokenizer     {', '.join(names) or 'none'}" + (f" (fingerprint {t['fingerprint']})" if t.get("fingerprint") else "")
    yield f"  optimizer     {', '.join(figures['optimizer']) or 'no state: weights only'}"
    state = {None: "no checksums beside them", "size": "sizes are right (--verify reads their contents)", "crc": "checksums are right"}
    damage = f"{len(files['problems'])} problem(s)" if files["problems"] else state[files["verified"]]
    yield f"  files         {files['count']}, {human_bytes(files['bytes'])}: {damage}"
    yield from (f"    {problem}" for problem in files["problems"])
    yield from (f"  note          {note}" for note in figures["notes"])
    if e := figures["expert"]:
        yield f"  expert        {e['expert']} of layer {e['layer']}"
        if "cosine_to_mean" in e:
            yield (f"  similarity    cosine {e['cosine_to_mean']:.4f} to the mean expert, {e['cosine_to_most_similar']:.4f} to expert "
                   f"{e['most_similar']}, the most similar one")  # fmt: skip


def tree_rows(tensors: Tensors, whole: bool) -> Iterator[tuple[str, ...]]:
    """(name, shape or count, type, size, norm). Layers have totals; optimizer slots are one row each unless `whole`."""
    sections: dict[str, dict[str, Tensors]] = {}
    for name, entry in tensors.items():
        match = NAME.fullmatch(name)
        section, layer, rest = match.groups() if match else ("other", None, name)
        sections.setdefault(section, {}).setdefault(layer or "", {})[rest] = entry
    for section, layers in sections.items():
        members = [entry for group in layers.values() for entry in group.values()]
        yield total_row(section, members)
        if section.startswith("optimizer.") and not whole:
            continue
        for layer in sorted(layers, key=lambda name: [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]):
            if layer:
                yield total_row(f"  {layer}", list(layers[layer].values()))
            indent = "    " if layer else "  "
            for rest, entry in layers[layer].items():
                norm = f"norm {entry['norm']:.6g}" if "norm" in entry else ""
                yield indent + rest, str(entry["shape"]), entry["dtype"], human_bytes(size_of(entry)), norm


def total_row(name: str, members: list[dict[str, Any]]) -> tuple[str, ...]:
    size = sum(map(size_of, members))
    return name, f"{sum(map(count_of, members)):,} elements", f"{len(members)} tensors", human_bytes(size), ""


def print_plainly(figures: dict[str, Any], whole: bool) -> None:
    print("\n".join(head_lines(figures)))
    rows = list(tree_rows(figures["tensors"], whole))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    print()
    for name, shape, dtype, size, norm in rows:
        print(f"{name:{widths[0]}}  {shape:>{widths[1]}}  {dtype:{widths[2]}}  {size:>{widths[3]}}  {norm}".rstrip())
    if rows:
        shown = figures["tensors"]
        print(f"\n{len(shown)} tensors, {human_bytes(total_size(shown))}; the model has {figures['parameters']:,} parameters")
    else:
        print("no tensor has such a name")


def compared(config: InspectConfig) -> int:
    """--diff: the exit code, 1 when there is a difference."""
    from megatron_moe.conversion.differences import differences, is_same, rows_of

    first, second = (opened(config, Path(directory)) for directory in config.diff)
    found = differences(first, second, config.filter or "")
    if config.json:
        heads = [{"path": str(s.path), "format": format_of(s.path), "iteration": s.iteration} for s in (first, second)]
        print(json.dumps({"compared": heads} | found))
    else:
        for source in (first, second):
            print(f"{source.path} ({format_of(source.path)}), iteration {source.iteration}, {len(source.tensors)} tensors")
        print("\n".join(rows_of(found, SHOWN)))
    return 0 if is_same(found) else 1


def main(argv: list[str] | None = None) -> int:
    config = parse_tool(InspectConfig, PROG, argv)
    from megatron_moe.checkpoint.files import CheckpointError

    try:
        if config.diff:
            return compared(config)
        figures = summary(opened(config, Path(config.load)), config)
    except (ValueError, OSError, CheckpointError) as error:
        problems = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        print(format_problems(PROG, problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    try:
        if config.json:
            print(json.dumps(figures))
        else:
            print_plainly(figures, whole=bool(config.filter) or config.norms or config.expert is not None)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if figures["files"]["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
