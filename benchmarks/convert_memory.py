"""Peak memory of a conversion over its largest tensor, for a synthetic Mixtral: hf -> native and native -> hf.

  python benchmarks/convert_memory.py                 4 GB of bfloat16, 20 GB of disk
  python benchmarks/convert_memory.py --gigabytes 0.2

Each conversion runs in a process of its own, and counts from the memory that this process has when everything is imported and the
model of the configuration is built without memory. The largest tensor is one stack of experts, in the type that it has on that side.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_moe.config.flags import checked, flag, parse_tool

HIDDEN, WIDTH, EXPERTS, VOCAB = 1024, 3584, 8, 32000  # a layer: 176 M weights


@dataclass(frozen=True)
class BenchmarkConfig:
    """Memory of a conversion."""

    gigabytes: float = flag(4.0, "size of the folder that is converted, in bfloat16", above=0)
    scratch: str | None = flag(None, "where to write; the system's temporary directory when not given", metavar="DIR")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self):
        return iter(())


def write_folder(directory: Path, size: float) -> None:
    """Layers of zeros and a few random numbers, one file per layer."""
    import torch

    from megatron_moe.conversion.shards import write_shards

    layers = max(round(size / 2 / (3 * HIDDEN * WIDTH * EXPERTS)), 1)
    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "vocab_size": VOCAB, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [VOCAB, HIDDEN], "model.norm.weight": [HIDDEN], "lm_head.weight": [VOCAB, HIDDEN]}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": [HIDDEN], f"{at}post_attention_layernorm.weight": [HIDDEN]}
        shapes |= {f"{at}self_attn.{x}_proj.weight": [HIDDEN if x in "qo" else HIDDEN // 4, HIDDEN] for x in "qkvo"}
        shapes[f"{at}block_sparse_moe.gate.weight"] = [EXPERTS, HIDDEN]
        for e in range(EXPERTS):
            for w in ("w1", "w2", "w3"):
                shapes[f"{at}block_sparse_moe.experts.{e}.{w}.weight"] = [HIDDEN, WIDTH] if w == "w2" else [WIDTH, HIDDEN]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: {"shape": shape, "dtype": "bfloat16"} for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)

    def numbers(names: list[str]):
        for name in names:
            tensor = torch.zeros(shapes[name], dtype=torch.bfloat16)
            tensor.view(-1)[:1024] = torch.randn(1024, generator=generator).bfloat16()
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    if sys.argv[1:2] == ["--from"]:
        convert(sys.argv[1:])
        return 0
    config = parse_tool(BenchmarkConfig, "benchmarks/convert_memory.py")
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
        base = Path(scratch)
        write_folder(base / "hf", config.gigabytes * 1e9)
        size = sum(path.stat().st_size for path in (base / "hf").iterdir())
        for kind, to, load, save in (("hf", "native", "hf", "run"), ("native", "hf", "run", "back")):
            words = ["--from", kind, "--to", to, "--load", str(base / load), "--save", str(base / save)]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found = json.loads(done.stdout.splitlines()[-1])
            ratio = found["bytes"] / found["largest"]
            print(f"{kind:>6} -> {to:<6} {size / 1e9:.2f} GB: {found['bytes'] / 1e6:.0f} MB beyond the start, {ratio:.2f} x the largest tensor "
                  f"({found['largest'] / 1e6:.0f} MB), {found['seconds']:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
