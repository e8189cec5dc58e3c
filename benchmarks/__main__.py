"""python -m benchmarks [NAME [--quick] [--rounds N] [--out DIR]]: without a name, what there is."""

from __future__ import annotations

import importlib
import os
import sys

# Read when torch is imported: threads that wait must not count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.harness import Options, missing, print_report, write_report
from megatron_moe.config.flags import format_problems, parse_tool

NAMES = (
    "preprocess", "data_reading", "step", "dialects", "dropping", "digits", "async_saving", "convert_memory", "scale_model", "startup", "fused",
    "grouped_gemm", "moe_layer", "overlap", "generation", "checkpoint", "optimizer", "expert_parallel", "data_wait",
)  # fmt: skip


def listing() -> str:
    """One line per benchmark, and what each can be compared with."""
    lines = ["python -m benchmarks NAME [--quick] [--rounds N] [--out DIR]", ""]
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        lines.append(f"  {name:16}{module.__doc__.splitlines()[0]}")
        for peer, use in module.PEERS.items():
            there = "not installed" if missing({peer: use}) else "installed"
            lines.append(f"  {'':16}peer: {peer} ({there}): {use}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = argv
    if name not in NAMES:
        print(format_problems("python -m benchmarks", [f"there is no benchmark {name!r}; use one of {', '.join(NAMES)}"]), file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{name}")
    options = parse_tool(getattr(module, "Options", Options), f"python -m benchmarks {name}", rest)
    report = module.run(options)
    print_report(report)
    print(f"\n{write_report(report, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
