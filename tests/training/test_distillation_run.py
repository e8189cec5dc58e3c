"""A Mixture-of-Students run: a teacher is trained, a student learns from it for a while and goes on alone."""

from __future__ import annotations

import json

import pytest
import torch
from distributed_pool import run_distributed

from megatron_moe.arguments import parse_args
from megatron_moe.checkpoint.files import read_manifest, write_manifest
from megatron_moe.config.flags import ConfigError
from megatron_moe.metrics.reader import read_records
from megatron_moe.training.preflight import prepare
from training import runs

pytestmark = pytest.mark.distributed

TEACHER = "--num-layers 4 --num-experts 1 2 4 4"
STUDENT = "--num-layers-teacher 4 --num-experts-teacher 1 2 4 4 --kd-temp 2 --kd-beta-ce 0.5 --mos"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus_text_document")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, text):
    """Six steps at two ranks, in a layout that no student here has."""
    save = tmp_path_factory.mktemp("teacher") / "run"
    train(
        2, save, text, f"{TEACHER} {runs.FP64} --train-iters 6 --zero-stage 2 --moe-expert-parallel-size 2 --tensor-model-parallel-size 2"
    )
    return save


def train(world, save, text, flags):
    data = f"--data-path {text} --vocab-size 64 --split 80,20,0"
    return run_distributed(runs.train_here, world, f"{data} --save {save} {flags}")[0]


def logged(save, *keys, event="train") -> list[tuple]:
    return [tuple(r[k] for k in keys) for r in read_records(save / "metrics.jsonl") if r["event"] == event]


def different(a, b) -> list[str]:
    assert a["tensors"].keys() == b["tensors"].keys()
    return [name for name, t in a["tensors"].items() if not torch.equal(t, b["tensors"][name])]


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (2, "--zero-stage 3 --moe-expert-parallel-size 2"),
        pytest.param(2, "--zero-stage 2 --tensor-model-parallel-size 2", marks=pytest.mark.matrix),
    ],
)
def test_a_staged_run_resumes_bit_for_bit_in_both_stages(world, flags, text, teacher, tmp_path):
    flags = f"{STUDENT} {runs.FP64} --load-teacher {teacher} --train-iters 12 --kd-stop-iters 8 {flags}"
    straight = train(world, tmp_path / "straight", text, flags)
    train(world, tmp_path / "stopped", text, f"{flags} --exit-interval 5")  # stops at 5 and, resumed, at 10
    train(world, tmp_path / "stopped", text, f"{flags} --exit-interval 5 --load {tmp_path / 'stopped'}")
    resumed = train(world, tmp_path / "stopped", text, f"{flags} --load {tmp_path / 'stopped'}")
    assert resumed["progress"].iteration == 12
    assert different(straight, resumed) == []
    keys = ("iteration", "lm_loss", "grad_norm", "kd_loss")
    assert logged(tmp_path / "straight", *keys) == logged(tmp_path / "stopped", *keys)
    distances = [kd for (kd,) in logged(tmp_path / "straight", "kd_loss")]
    assert all(kd > 0 for kd in distances[:8]) and distances[8:] == [None] * 4
    assert all("kd_loss" not in r for r in read_records(tmp_path / "straight" / "metrics.jsonl") if r["event"] == "eval")


def test_the_end_of_the_stage_is_a_restart_without_a_teacher(text, teacher, tmp_path):
    flags = f"{runs.FP64} --train-iters 9"
    staged = train(1, tmp_path / "staged", text, f"{flags} {STUDENT} --load-teacher {teacher} --kd-stop-tokens {5 * 4 * 16}")
    train(1, tmp_path / "by_hand", text, f"{flags} {STUDENT} --load-teacher {teacher} --exit-interval 5")
    by_hand = train(1, tmp_path / "by_hand", text, f"{flags} --load {tmp_path / 'by_hand'}")
    assert different(staged, by_hand) == []


def test_a_teacher_without_weight_leaves_no_trace(text, teacher, tmp_path):
    """Neither in the draws of the student, nor in its statistics, nor in its losses: with noise, with dropping, with a batch loss."""
    noise = (
        "--moe-noisy-gate-policy Jitter --attention-dropout 0.1 --moe-train-capacity-factor 0.6 --moe-global-loss-coeff 0.1 --train-iters 4"
    )
    flags = f"{runs.FP64} {noise} --moe-expert-parallel-size 2"
    alone = train(2, tmp_path / "alone", text, flags)
    taught = train(2, tmp_path / "taught", text, f"{flags} {STUDENT} --kd-beta-ce 0 --load-teacher {teacher}")
    assert different(alone, taught) == []
    keys = ("iteration", "lm_loss", "grad_norm", "moe_aux_loss", "moe")
    assert logged(tmp_path / "alone", *keys) == logged(tmp_path / "taught", *keys)
    assert logged(tmp_path / "alone", "lm_loss", event="eval") == logged(tmp_path / "taught", "lm_loss", event="eval")


def test_a_student_comes_nearer_to_its_teacher(text, teacher, tmp_path):
    """Distillation alone (no language-model loss) on noiseless layers: the distance falls."""
    flags = f"{STUDENT} {runs.FP64} --kd-alpha-ce 0 --kd-beta-ce 1 --hidden-dropout 0 --train-iters 30 --eval-iters 0"
    train(1, tmp_path / "run", text, f"{flags} --load-teacher {teacher}")
    distances = [kd for (kd,) in logged(tmp_path / "run", "kd_loss")]
    assert sum(distances[-5:]) < 0.5 * sum(distances[:5])


# ---------------------------------------------------------------- refused before anything starts


def problems_or_none(text, flags: str) -> list[str]:
    run = parse_args(f"{runs.SMALL} --data-path {text} --vocab-size 64 --split 80,20,0 --train-iters 3 {flags}".split()).run
    try:
        prepare(run, 1)
    except ConfigError as refused:
        return refused.problems
    return []


def problems_of(text, flags: str) -> list[str]:
    problems = problems_or_none(text, flags)
    assert problems, "not refused"
    return problems


def test_another_architecture_is_refused_with_what_differs(text, teacher):
    (problem,) = problems_of(text, f"{STUDENT} {runs.FP64} --load-teacher {teacher} --num-layers-teacher 3 --num-experts-teacher 1 2 4")
    assert "is not the teacher of these flags" in problem and "--num-layers-teacher" in problem
    rows = [line.split() for line in problem.splitlines()[1:]]
    assert rows[0] == ["flag", "checkpoint", "now"] and ["--num-layers", "4", "3"] in rows
    assert any(row[0] == "--num-experts" for row in rows)


def test_settings_that_leave_no_trace_in_the_weights_are_compared_too(text, teacher):
    problems = problems_of(text, f"{STUDENT} --topk 2 --load-teacher {teacher}")
    (problem,) = problems
    assert "settings that the teacher shares with the student" in problem
    assert {line.split()[0] for line in problem.splitlines()[2:]} == {"--params-dtype", "--topk"}


def test_all_that_is_wrong_is_said_at_once(text, tmp_path):
    (tmp_path / "empty").mkdir()
    for directory, said in ((tmp_path / "nowhere", "there is no such directory"), (tmp_path / "empty", "there is no checkpoint in it")):
        problems = problems_of(text, f"{STUDENT} --load-teacher {directory} --load {tmp_path / 'other'}")
        assert len(problems) == 2 and any(p.startswith(f"--load-teacher {directory}: {said}") for p in problems)


def test_a_teacher_of_another_tokenizer_is_refused_with_both_fingerprints(text, teacher, tmp_path):
    copy = tmp_path / "iter_0000006"
    copy.mkdir()
    manifest = read_manifest(teacher / copy.name)
    manifest.meta["tokenizer"] = {"fingerprint": "0123456789abcdef"}
    write_manifest(copy, manifest)
    flags = f"{STUDENT} {runs.FP64} --load-teacher {tmp_path}"
    assert not [p for p in problems_or_none(text, flags) if "tokenizer" in p]  # this run names none: nothing to compare
    of_vocabulary, problem = problems_of(text, f"{flags} --tokenizer-type NullTokenizer")  # which adds an eod to the 64
    assert "--vocab-size  64          65" in of_vocabulary
    assert "trained with another tokenizer (fingerprint 0123456789abcdef) than this run has (fingerprint " in problem


def test_a_damaged_manifest_is_named(text, teacher, tmp_path):
    copy = tmp_path / "teacher" / "iter_0000006"
    copy.mkdir(parents=True)
    (copy / "manifest.json").write_text("{")
    (problem,) = problems_of(text, f"{STUDENT} --load-teacher {tmp_path / 'teacher'}")
    assert "manifest.json: cut off or damaged" in problem


def test_one_checkpoint_of_several_may_be_named(text, teacher, tmp_path):
    train(1, tmp_path / "run", text, f"{STUDENT} {runs.FP64} --train-iters 4 --load-teacher {teacher / 'iter_0000006'}")
    (loaded,) = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "load"]
    assert loaded == {"event": "load", "teacher": str(teacher / "iter_0000006")}


# ---------------------------------------------------------------- iterations counted anew


def test_reset_iteration_keeps_the_optimizer_and_the_place_in_the_data(text, tmp_path):
    first = train(1, tmp_path / "first", text, f"{runs.FP64} --train-iters 6")
    flags = f"{runs.FP64} --load {tmp_path / 'first'} --save {tmp_path / 'second'} --reset-iteration"
    second = run_distributed(runs.train_here, 1, f"--data-path {text} --vocab-size 64 --split 80,20,0 {flags} --train-samples 40")[0]
    assert first["progress"].consumed == (6, 24, 24 * 16)
    assert second["progress"].consumed == (4, 40, 40 * 16)  # samples of the first run count
    steps = {int(t) for name, t in second["tensors"].items() if name.startswith("optimizer.step.")}
    assert steps == {10}
    with pytest.raises(ConfigError, match="does not go on from the newest"):
        prepare(
            parse_args(
                f"{runs.SMALL} --mock-data --train-iters 3 --reset-iteration --load {tmp_path / 'first'} --save {tmp_path / 'first'}".split()
            ).run,
            1,
        )
    assert json.loads((tmp_path / "second" / "exit.json").read_text())["is_done"]
