"""What is said about sequences that cannot be cut, hybrid sharding that does not divide, and key/value heads that do not fit the ranks."""

from __future__ import annotations

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError

TINY = "--preset tiny --mock-data --train-iters 2 --micro-batch-size 1 --global-batch-size 24"  # 128 tokens, 4 heads
RING = "--context-parallel-size 2 --cp-comm-type p2p --attention-dropout 0"
CP2, SP = "--context-parallel-size 2", "--sequence-parallel"


def problems(words: str, world: int) -> list[str]:
    try:
        run = parse_args(f"{TINY} {words}".split()).run
    except ConfigError as error:
        return error.problems
    return [*run.world_problems(world), *run.train_problems()]


@pytest.mark.parametrize(
    ("words", "world", "said"),
    [
        (f"{CP2} --seq-length 126", 2, "--seq-length (126) must be divisible by 4, which 2 x --context-parallel-size (2) ask for; use 124 or 128"),
        (
            f"{SP} --tensor-model-parallel-size 4 --seq-length 30",
            4,
            "--seq-length (30) must be divisible by 4, which --tensor-model-parallel-size (4) of --sequence-parallel ask for; use 28 or 32",
        ),
        (
            f"{CP2} {SP} --tensor-model-parallel-size 4 --seq-length 4",
            8,
            "--seq-length (4) must be divisible by 8, which 2 x --context-parallel-size (2) and --tensor-model-parallel-size (4) of "
            "--sequence-parallel ask for; use 8",
        ),
        (
            f"{CP2} --curriculum-learning --curriculum-min-difficulty 10 --curriculum-total-step 4",
            2,
            "--curriculum-min-difficulty (10) must be divisible by 4, which 2 x --context-parallel-size (2) ask for; use 8 or 12",
        ),
        (
            f"{CP2} --curriculum-learning --curriculum-min-difficulty 8 --curriculum-total-step 4 --curriculum-difficulty-step 6",
            2,
            "--curriculum-difficulty-step (6) must be divisible by 4, which 2 x --context-parallel-size (2) ask for; use 4 or 8",
        ),
        (
            f"{CP2} --curriculum-learning --curriculum-schedule-type fixed_discrete --curriculum-difficulty 32 66 128 --curriculum-max-step 1 2",
            2,
            "--curriculum-difficulty (66) must be divisible by 4, which 2 x --context-parallel-size (2) ask for; use 64 or 68",
        ),
        (
            "--num-distributed-optimizer-instances 3",
            4,
            "--num-distributed-optimizer-instances (3) must divide the 4 data ranks (data-parallel size 4 x --context-parallel-size 1); "
            "use one of 1, 2, 4",
        ),
        (
            f"--data-parallel-replicate-degree 4 {CP2} --tensor-model-parallel-size 2",
            12,
            "--num-distributed-optimizer-instances (4) must divide the 6 data ranks (data-parallel size 3 x --context-parallel-size 2); "
            "use one of 1, 2, 3, 6",
        ),
        (
            "--num-distributed-optimizer-instances 2 --zero-stage 0",
            4,
            "--num-distributed-optimizer-instances (2) replicates what ZeRO shards, and --zero-stage 0 shards nothing; use --zero-stage 1, 2 "
            "or 3, or leave it out",
        ),
        (
            "--num-attention-heads 12 --num-key-value-heads 4 --hidden-size 96 --ffn-hidden-size 96 --make-vocab-size-divisible-by 48 "
            "--tensor-model-parallel-size 6",
            6,
            "--num-key-value-heads (4) must be divisible by --tensor-model-parallel-size (6) or divide it; use TP 1, 2, 4, 12",
        ),
        (f"{RING} --attention-dropout 0.1", 2, "--cp-comm-type p2p has no dropout of attention, and --attention-dropout is 0.1; set it to 0, or "
         "take --cp-comm-type all_gather"),
        (f"{RING} --reset-attention-mask", 2, "--cp-comm-type p2p has no masks of documents, which --reset-attention-mask asks for; leave one of "
         "them out"),
        (f"{RING} --compile", 2, "--cp-comm-type p2p is a loop that --compile does not trace; leave one of them out"),
        (f"{RING} --hidden-size 48 --num-attention-heads 4", 2, "--cp-comm-type p2p wants heads whose width is a multiple of 8, not 12; change "
         "--num-attention-heads, or take --cp-comm-type all_gather"),
        (CP2, 3, "the number of ranks (3) must be divisible by --tensor-model-parallel-size (1) x --pipeline-model-parallel-size (1) x "
         "--context-parallel-size (2) = 2; make the product one of 1, 3 or start another number of ranks"),
    ],
)  # fmt: skip
def test_one_sentence_with_the_rule_the_values_and_the_nearest_valid_ones(words, world, said):
    assert problems(words, world) == [said]


@pytest.mark.parametrize(
    ("words", "world"),
    [
        ("--seq-length 127 --tensor-model-parallel-size 4", 4),  # tensor parallelism alone cuts any number of tokens
        (f"{SP} --seq-length 127", 1),  # a switch that asks for nothing here
        (f"{CP2} --seq-length 4", 2),
        (RING, 2),
        ("--cp-comm-type p2p --attention-dropout 0.1", 1),  # nothing travels
        (f"{CP2} {SP} --tensor-model-parallel-size 2 --seq-length 4", 4),
        ("--num-key-value-heads 1 --tensor-model-parallel-size 4", 4),
        ("--num-key-value-heads 2 --tensor-model-parallel-size 4", 4),
        (f"--num-distributed-optimizer-instances 4 {CP2} --zero-stage 3", 8),
        (f"{CP2} --curriculum-learning --curriculum-min-difficulty 8 --curriculum-total-step 4", 2),
    ],
)
def test_what_fits_is_not_refused(words, world):
    assert problems(words, world) == []
