"""The flags of distillation: what the teacher is, and what is said before anything starts."""

from __future__ import annotations

import pytest

from megatron_moe.arguments import check_to_train, parse_args
from megatron_moe.config.flags import ConfigError

TINY = ["--preset", "tiny", "--mock-data"]
TEACHER = "--load-teacher x --num-layers-teacher 8 --num-experts-teacher 4 4 8 8"


def run_of(words: str):
    return parse_args([*TINY, *words.split()]).run


def test_what_has_no_flag_of_the_teachers_is_the_students():
    run = run_of(f"--mos {TEACHER} --topk 2 --swiglu --moe-expert-parallel-size 8 --checkpoint-activations --moe-router-z-loss-coeff 1")
    teacher = run.teacher()
    assert teacher.moe.experts_per_layer(teacher.model.num_layers) == (1, 4, 1, 4, 1, 8, 1, 8)
    assert (teacher.moe.topk, teacher.moe.mlp_type, teacher.model.swiglu, teacher.model.hidden_size) == (2, "residual", True, 128)
    assert (teacher.moe.moe_loss_coeff, teacher.moe.moe_router_z_loss_coeff, teacher.training.recompute) == (0, 0, None)
    assert run.expert_degrees() == [4, 8]


def test_an_mlp_width_that_follows_the_hidden_size_follows_the_teachers():
    words = f"--kd {TEACHER} --hidden-size-teacher 256 --num-attention-heads-teacher 8"
    assert run_of(words).teacher().model.ffn_size == 1024
    assert run_of(f"{words} --ffn-hidden-size 300").teacher().model.ffn_size == 300
    assert run_of(words).teacher().model.head_dim == 32


def test_without_its_flag_the_teacher_is_dense_as_upstream():
    assert not run_of("--mos --load-teacher x").teacher().moe.has_experts


def test_problems_of_the_teacher_are_said_in_its_own_flags_and_only_once():
    with pytest.raises(ConfigError) as refused:
        run_of(
            "--mos --load-teacher x --hidden-size-teacher 130 --num-experts-teacher 3 5 7 --num-layers-teacher 8 --lr 1 --min-lr 2 --kd-temp 0"
        )
    assert refused.value.problems == ["--min-lr (2) must not exceed --lr (1)", "--kd-temp must be greater than 0, not 0.0"]
    with pytest.raises(ConfigError) as refused:
        run_of("--mos --load-teacher x --hidden-size-teacher 130 --num-layers-teacher 8 --lr 1 --min-lr 2")
    assert refused.value.problems == [
        "--min-lr (2) must not exceed --lr (1)",
        "the teacher: --hidden-size-teacher (130) must be divisible by --num-attention-heads (4), or give --kv-channels".replace("heads (", "heads-teacher ("),
    ]  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        run_of("--mos --load-teacher x --num-experts-teacher 3 5 7 --num-layers-teacher 8")
    assert any(p.startswith("the teacher: ") and "--num-experts-teacher" in p for p in refused.value.problems)


def test_degrees_of_the_teachers_experts_must_divide_the_ranks():
    run = run_of(
        "--mos --load-teacher x --num-experts 1 --num-layers-teacher 4 --num-experts-teacher 4 --moe-expert-parallel-size 4 --global-batch-size 16"
    )
    assert list(run.world_problems(4)) == []
    (problem,) = run_of(
        "--mos --load-teacher x --num-experts 2 --num-layers-teacher 4 --num-experts-teacher 4 --moe-expert-parallel-size 4 --global-batch-size 24"
    ).world_problems(6)
    assert "expert-parallel degree (4)" in problem


@pytest.mark.parametrize("switch", ["--mos", "--kd"])
def test_a_teacher_that_is_not_given_keeps_from_training_and_not_from_a_plan(switch):
    parsed = parse_args([*TINY, switch])
    with pytest.raises(ConfigError) as refused:
        check_to_train(parsed, 1)
    assert refused.value.problems == ["the teacher is missing: give --load-teacher DIR, the run directory in which it was trained"]


def test_both_weights_zero_is_refused():
    with pytest.raises(ConfigError, match="nothing would be learned"):
        run_of("--mos --load-teacher x --kd-alpha-ce 0 --kd-beta-ce 0")


def test_mos_with_a_dense_student_warns():
    assert any("plain distillation" in w for w in parse_args([*TINY, "--mos", "--load-teacher", "x", "--num-experts", "1"]).warnings)
    assert not any("plain distillation" in w for w in parse_args([*TINY, "--kd", "--load-teacher", "x", "--num-experts", "1"]).warnings)


@pytest.mark.parametrize(
    ("iteration", "tokens", "is_over"), [(0, 0, False), (9, 99, False), (10, 0, True), (0, 100, True), (11, 101, True), (9, 100, True)]
)
def test_the_stage_ends_with_whichever_comes_first(iteration, tokens, is_over):
    distillation = run_of("--mos --load-teacher x --kd-stop-iters 10 --kd-stop-tokens 100").distillation
    assert distillation.is_over(iteration, tokens) is is_over
    assert not run_of("--mos --load-teacher x").distillation.is_over(10**9, 10**15)


@pytest.mark.parametrize(
    ("words", "said"), [("", "needs --load DIR"), ("--load a --save b --finetune", "--finetune starts both anew; drop one")]
)
def test_reset_iteration_is_about_what_is_loaded(words, said):
    with pytest.raises(ConfigError, match=said):
        run_of(f"--reset-iteration {words}")
