"""memory of a conversion over its largest tensor: a synthetic Mixtral, hf -> native and native -> hf

4 GB of bfloat16 and 20 GB of disk, in the temporary folder ($TMPDIR). Each conversion runs in a process of its own, and counts from the memory
that this process has when everything is imported and the model of the configuration is built without memory. The largest tensor is one
stack of experts, in the type that it has on that side.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import Options, Report, say, spread, table

PEERS: dict[str, str] = {}
ROUNDS = 1
WAYS = (("hf", "native", "hf", "run"), ("native", "hf", "run", "back"))  # from, to, and their folders


@dataclass(frozen=True)
class Size:
    """Of the model. `total`: bytes of the folder, in bfloat16; there is at least one layer."""

    total: float
    hidden: int
    width: int
    experts: int
    vocab: int


FULL = Size(4e9, 1024, 3584, 8, 32000)  # a layer: 88 M weights
QUICK = Size(2e6, 64, 224, 8, 512)  # far too small to say anything of memory


def write_folder(directory: Path, size: Size) -> None:
    """Layers of zeros and a few random numbers, one file per layer."""
    import torch

    from megatron_moe.conversion.shards import write_shards

    D, F, E, V = size.hidden, size.width, size.experts, size.vocab
    layers = max(round(size.total / 2 / (3 * D * F * E)), 1)
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": E,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "vocab_size": V, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D], "lm_head.weight": [V, D]}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": [D], f"{at}post_attention_layernorm.weight": [D]}
        shapes |= {f"{at}self_attn.{x}_proj.weight": [D if x in "qo" else D // 4, D] for x in "qkvo"}
        shapes[f"{at}block_sparse_moe.gate.weight"] = [E, D]
        for e in range(E):
            for w in ("w1", "w2", "w3"):
                shapes[f"{at}block_sparse_moe.experts.{e}.{w}.weight"] = [D, F] if w == "w2" else [F, D]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: {"shape": shape, "dtype": "bfloat16"} for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)

    def numbers(names: list[str]):
        for name in names:
            tensor = torch.zeros(shapes[name], dtype=torch.bfloat16)
            some = tensor.view(-1)[:1024]
            some.copy_(torch.randn(len(some), generator=generator))
            yield tensor

    write_shards(directory, "model", tensors, 500_000_000, numbers)


def convert(words: list[str]) -> None:
    """One conversion; prints peak memory beyond the beginning, the largest tensor and the seconds."""
    from megatron_moe.conversion import hf, native
    from megatron_moe.conversion.fit import tensors_to_write
    from megatron_moe.conversion.source import size_of
    from tools import convert_checkpoint

    kind, load = words[1], Path(words[5])
    source = (hf if kind == "hf" else native).open_source(load)
    largest = max(map(size_of, tensors_to_write(source, False).values()))
    del source
    before, start = peak(), time.perf_counter()
    code = convert_checkpoint.main(words)
    print(json.dumps({"code": code, "bytes": peak() - before, "largest": largest, "seconds": time.perf_counter() - start}))


def peak() -> int:
    """Bytes. Of this process alone: what getrusage says begins with the peak of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def converted(words: list[str]) -> dict[str, float]:
    """By a process of its own. RuntimeError with what it said when it failed."""
    command = [sys.executable, "-m", "benchmarks.convert_memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"code": done.returncode}
    if found["code"]:
        raise RuntimeError(f"{' '.join(command)} ended with code {found['code']}:\n{done.stderr}")
    return found


def run(options: Options) -> Report:
    size, rounds = QUICK if options.quick else FULL, options.rounds_or(ROUNDS)
    report = Report("convert_memory", {**asdict(size), "rounds": rounds})
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_folder(base / "hf", size)
        in_files = sum(path.stat().st_size for path in (base / "hf").iterdir())
        for i in range(rounds):
            for kind, to, load, save in WAYS:
                say(f"round {i + 1} of {rounds}: {kind} -> {to}")
                words = ["--from", kind, "--to", to, "--load", str(base / load), "--save", str(base / save)]
                found.setdefault(f"{kind} -> {to}", []).append(converted(words))
            for folder in ("run", "back"):
                shutil.rmtree(base / folder)
    conclude(report, found, in_files)
    return report


def conclude(report: Report, found: dict[str, list[dict[str, float]]], in_files: int) -> None:
    report.figures = {"bytes": in_files}
    rows = []
    for way, conversions in found.items():
        ratio = spread(c["bytes"] / c["largest"] for c in conversions).median
        report.figures[way] = {"conversions": conversions, "beyond_over_largest": ratio}
        beyond, seconds = (spread(c[name] for c in conversions).median for name in ("bytes", "seconds"))
        rows.append([way, f"{beyond / 1e6:.0f}", f"{ratio:.2f}", f"{conversions[0]['largest'] / 1e6:.1f}", f"{seconds:.0f}"])
    columns = ["", "MB beyond the start", "x the largest tensor", "which has MB", "seconds"]
    report.tables.append(f"{in_files / 1e6:.0f} MB of bfloat16\n" + table(columns, rows))


if __name__ == "__main__":  # the processes of `run`
    convert(sys.argv[1:])
