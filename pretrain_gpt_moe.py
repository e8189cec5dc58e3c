"""Pretrain a Mixture-of-Experts GPT: parse -> check -> train.

python pretrain_gpt_moe.py --help                                                            every flag
python pretrain_gpt_moe.py --list-presets                                                    named settings and their sizes
python pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20                        one process, no data needed
torchrun --nproc-per-node 2 pretrain_gpt_moe.py --preset tiny --mock-data --moe-expert-parallel-size 2
python pretrain_gpt_moe.py --preset gpt-350m-moe-128 --dry-run --dry-run-world-size 64       what 64 ranks would train, as JSON
python pretrain_gpt_moe.py --preset gpt-350m-moe-128 --verify-parallelism --exit-after-verify  does that layout train the same model?

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
        if parsed.command.exit_after_verify:
            verify(parsed, world_size)
            return
        check_to_train(parsed, world_size)
        # torch is imported from here on: mistakes above are answered at once
        from megatron_moe.training.preflight import prepare

        prepared = prepare(parsed.run, world_size)
    except ConfigError as error:
        report_and_exit(error.problems, rank)
    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_moe.training.pretrain import pretrain

    record(pretrain)(prepared, parsed.warnings, sys.argv, parsed.command.verify_parallelism)


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


def verify(parsed: Parsed, world_size: int) -> None:
    """--exit-after-verify: on the ranks of a launcher, or in one process for ranks that are not here. Needs no data."""
    command, ranks = parsed.command, world_size
    if world_size == 1:
        ranks = command.verify_world_size
    problems = [
        *map(str, parsed.missing),
        *parsed.not_yet,
        *(parsed.run.world_problems(ranks) if ranks else ()),
    ]
    if world_size > 1 and command.verify_world_size:
        problems.append(
            f"--verify-world-size ({command.verify_world_size}) is for one process, and this is one of {world_size}; leave it out"
        )
    if problems:
        raise ConfigError(problems)
    from megatron_moe.training.verify.folded import verify_folded
    from megatron_moe.training.verify.ranks import verify_here
    from megatron_moe.utils.logging import setup_logging

    setup_logging()
    if world_size > 1:
        verify_here(parsed.run)
    elif code := verify_folded(parsed.run, ranks):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
