"""Pretrain a Mixture-of-Experts GPT: parse -> check -> train.

python pretrain_gpt_moe.py --help                                                            every flag
python pretrain_gpt_moe.py --preset tiny --mock-data --train-iters 20                        one process, no data needed
torchrun --nproc-per-node 2 pretrain_gpt_moe.py --preset tiny --mock-data --moe-expert-parallel-size 2
"""

import os
import sys

from megatron_moe.arguments import check_to_train, parse_args, report_and_exit
from megatron_moe.config.flags import ConfigError


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        parsed = parse_args()
        check_to_train(parsed, world_size)
        # torch is imported from here on: mistakes above are answered at once
        from megatron_moe.training.preflight import prepare

        prepared = prepare(parsed.run, world_size)
    except ConfigError as error:
        report_and_exit(error.problems, rank)
    from torch.distributed.elastic.multiprocessing.errors import record

    from megatron_moe.training.pretrain import pretrain

    record(pretrain)(prepared, parsed.warnings, sys.argv)


if __name__ == "__main__":
    main()
