"""Pretrain a Mixture-of-Experts GPT: parse -> check -> train.

python pretrain_gpt_moe.py --help                                                            every flag
python pretrain_gpt_moe.py --list-presets                                                    named settings and their sizes
python pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20                        one process, no data needed
torchrun --nproc-per-node 2 pretrain_gpt_moe.py --preset tiny --mock-data --moe-expert-parallel-size 2
python pretrain_gpt_moe.py --preset gpt-350m-moe-128 --dry-run --dry-run-world-size 64       what 64 ranks would train, as JSON

--dry-run prints one JSON object, or ends with exit code 2 and all problems; megatron_moe/training/plan.py names its keys.
"""

import os
import sys

from megatron_moe.arguments import Parsed, check_to_train, parse_args, report_and_exit
from megatron_moe.config.flags import ConfigError


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        parsed = parse_args()
        if parsed.command.list_presets or parsed.command.dry_run:
            if rank == 0:
                look(parsed, world_size)
            return
        check_to_train(parsed, world_size)
        # Large CPU tensors in huge pages: a step makes and frees many, and a tenth of its time went into mapping 4 KiB pages.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it is imported
        # torch is imported from here on: mistakes above are answered at once
        from megatron_moe.training.preflight import prepare

        prepared = prepare(parsed.run, world_size)
    except ConfigError as error:
        report_and_exit(error.problems, rank)
    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_moe.training.pretrain import pretrain

    record(pretrain)(prepared, parsed.warnings, sys.argv)


def look(parsed: Parsed, world_size: int) -> None:
    """--list-presets and --dry-run: to standard output what was asked for, and nothing else."""
    if parsed.command.list_presets:
        from megatron_moe.training.preset_table import preset_table

        print(preset_table())
        return
    from megatron_moe.training.plan import as_json, build_plan

    ranks = parsed.command.dry_run_world_size or world_size
    missing = [file.path for file in parsed.missing]
    plan = build_plan(parsed.run, ranks, parsed.given, missing, parsed.not_yet, parsed.warnings)
    for warning in parsed.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(as_json(plan))


if __name__ == "__main__":
    main()
