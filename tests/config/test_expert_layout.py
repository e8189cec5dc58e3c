"""Flags about where experts live and how tokens travel: what goes together, and what is said about the rest."""

from __future__ import annotations

import pytest

from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.config.flags import ConfigError

TINY = "--preset tiny --mock-data --global-batch-size 32 --num-experts 8 --topk 2 --ffn-hidden-size 96"


def problems_of(words: str, world: int = 8) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_to_train(parse_args(f"{TINY} {words}".split()), world)
    return caught.value.problems


def warnings_of(words: str) -> list[str]:
    return parse_args(f"{TINY} {words}".split()).warnings


@pytest.mark.parametrize(
    ("words", "etp"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 4", 1),
        ("--tensor-model-parallel-size 4 --enable-expert-tensor-parallelism", 4),
        ("--tensor-model-parallel-size 4 --enable-expert-tensor-parallelism --expert-tensor-parallel-size 4", 4),
        ("--tensor-model-parallel-size 4 --expert-tensor-parallel-size 2", 2),
        ("--expert-tensor-parallel-size 8", 8),
    ],
)
def test_expert_tensor_parallel_size_is_that_of_tp_only_where_it_is_asked_for(words, etp):
    run = parse_args(f"{TINY} {words}".split()).run
    assert run.parallel.etp == etp
    assert list(run.world_problems(8)) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--tensor-model-parallel-size 4 --enable-expert-tensor-parallelism --expert-tensor-parallel-size 2",
            "--tensor-model-parallel-size (4), and --expert-tensor-parallel-size is 2; drop one of them",
        ),
        (
            "--expert-tensor-parallel-size 5",
            "width of the experts (96) must be divisible by the expert-tensor-parallel degree (5); use ETP 1, 2, 3, 4",
        ),
        (
            "--expert-tensor-parallel-size 4 --moe-expert-parallel-size 4",
            "ranks (8) must be divisible by the expert-parallel degree (4) x the expert-tensor-parallel degree (4) = 16; "
            "set --moe-expert-parallel-size to one of 1, 2",
        ),
        (
            "--expert-tensor-parallel-size 3",
            "x the expert-tensor-parallel degree (3) = 3; set --expert-tensor-parallel-size to one of 1, 2, 4, 8",
        ),
        (
            "--moe-token-dispatcher hierarchical --moe-node-size 3 --moe-expert-parallel-size 8",
            "ranks of a node (3) to divide the 8 ranks that hold the experts of a layer once",
        ),
        (
            "--moe-token-dispatcher fused --moe-pad-expert-input-to-capacity",
            "with --moe-token-dispatcher fused none does; drop one of the two",
        ),
        (
            "--moe-token-dispatcher fused --moe-overlap-chunks 2",
            "and --moe-token-dispatcher fused has none; use alltoall, hierarchical or auto",
        ),
        (
            "--moe-token-dispatcher fused --moe-expert-parallel-size 2 --expert-tensor-parallel-size 2",
            "the expert-tensor-parallel degree is 2; set --expert-tensor-parallel-size 1, or take --moe-token-dispatcher alltoall",
        ),
        (
            "--moe-token-dispatcher fused --moe-expert-parallel-size 2 --moe-latent-size 30 --bf16",
            "--moe-latent-size (30) times 2 bytes is not a multiple of that; use 24 or 32, or --moe-token-dispatcher alltoall",
        ),
        (
            "--moe-token-dispatcher alltoall --moe-fused-capacity worst --moe-fused-capacity-factor 2",
            "--moe-fused-capacity and --moe-fused-capacity-factor: about --moe-token-dispatcher fused, not alltoall",
        ),
        ("--moe-fused-capacity exact --moe-fused-capacity-factor 2", "(2) is about --moe-fused-capacity static, not exact; drop one"),
        ("--moe-token-dispatcher hierarchical --moe-pad-expert-input-to-capacity", "use alltoall or auto, or drop the padding"),
        (
            "--moe-overlap-chunks 2 --moe-pad-expert-input-to-capacity --moe-expert-parallel-size 2",
            "--moe-overlap-chunks (2) cuts the tokens",
        ),
        ("--moe-overlap-chunks 2 --moe-token-dispatcher allgather --moe-expert-parallel-size 2", "use alltoall, hierarchical or auto"),
        ("--moe-overlap-chunks 0", "--moe-overlap-chunks must be at least 1, not 0"),
        ("--moe-token-dispatcher hierarchicall", "did you mean 'hierarchical'?"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(words, said):
    (problem,) = problems_of(words)
    assert said in problem


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--num-experts 1 --topk 1 --expert-tensor-parallel-size 2",
            "--expert-tensor-parallel-size has no effect without experts; see --num-experts",
        ),
        (
            "--num-experts 1 --topk 1 --tensor-model-parallel-size 2 --enable-expert-tensor-parallelism",
            "--enable-expert-tensor-parallelism has no effect without experts; see --num-experts",
        ),
        ("--enable-expert-tensor-parallelism", "--enable-expert-tensor-parallelism has no effect with --tensor-model-parallel-size 1"),
        (
            "--moe-node-size 4 --moe-token-dispatcher alltoall",
            "--moe-node-size (4) has no effect with --moe-token-dispatcher alltoall",
        ),
        ("--moe-overlap-chunks 2", "--moe-overlap-chunks (2) has no effect with --moe-expert-parallel-size 1: no rows are exchanged"),
    ],
)
def test_what_has_no_effect_is_warned_about(words, said):
    assert said in warnings_of(words)


def test_the_ranks_of_a_node_are_those_of_the_launcher_unless_somebody_says_so(monkeypatch):
    run = parse_args(f"{TINY} --moe-token-dispatcher hierarchical".split()).run
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert run.node_size(16) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert run.node_size(16) == 4
    assert parse_args(f"{TINY} --moe-token-dispatcher hierarchical --moe-node-size 2".split()).run.node_size(16) == 2
    auto = "--moe-expert-parallel-size 8 --num-experts 8"
    assert parse_args(f"{TINY} {auto}".split()).run.node_size(16) == 4
    assert parse_args(f"{TINY} {auto} --moe-node-size 3".split()).run.node_size(16) is None  # no two stages, and no error
    assert parse_args(f"{TINY} {auto} --moe-token-dispatcher alltoall".split()).run.node_size(16) is None


def test_fused_stays_on_a_node(monkeypatch):
    words = "--moe-token-dispatcher fused --moe-expert-parallel-size 8"
    assert parse_args(f"{TINY} {words}".split()).run.moe.moe_fused_capacity == "static"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    (said,) = problems_of(words)
    assert "8 ranks of an expert-parallel group do not share nodes of 4 ranks" in said
    assert "--moe-expert-parallel-size to one of 1, 2, 4" in said and "hierarchical" in said
    assert list(parse_args(f"{TINY} {words.replace('8', '4')}".split()).run.world_problems(8)) == []
