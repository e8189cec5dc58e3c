"""--verify-parallelism as a user starts it: on the ranks of a launcher before a run, and alone in one process for ranks that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moe.arguments import parse_args
from megatron_moe.config.flags import ConfigError
from training import launches

ROOT = Path(__file__).resolve().parents[2]
FAULTY = ROOT / "tests" / "training" / "faulty_verify.py"
# Nothing of it is on this machine: no data, no tokenizer, no 64 ranks.
CLUSTER = (
    "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 --num-experts 32 64 "
    "--mlp-type residual --topk 2 --moe-expert-parallel-size 64 --tensor-model-parallel-size 8 --micro-batch-size 4 --global-batch-size 256 "
    "--data-path /cluster/data --vocab-file /cluster/vocab.json --merge-file /cluster/merges.txt --train-tokens 300000000000 --bf16 "
    "--zero-stage 2 --disable-moe-token-dropping --checkpoint-activations --lr 2e-4 --verify-parallelism --exit-after-verify"
)
EP2 = "--moe-expert-parallel-size 2 --verify-parallelism"


def alone(flags: str, tmp_path: Path, fault: str = "none") -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"FAULT": fault, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FAULTY), *flags.split(), "--save", str(tmp_path / "run")]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


def test_one_process_proves_the_command_for_sixty_four_gpus(tmp_path):
    done = alone(f"{CLUSTER} --verify-world-size 64", tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("4 process(es) in place of 64 ranks", "TP 8 -> 2", "EP 32 -> 2", "EP 64 -> 4", "data ranks 8 -> 2", "num-layers 24 -> 4",
                  "bfloat16 -> float64", "the layout: step 2 of 2", "the layout trains the model that one device trains"):  # fmt: skip
        assert words in done.stderr, done.stderr
    table = [line for line in done.stderr.splitlines() if " 1e-10 " in line]
    assert {word for line in table for word in ("loss", "routing", "gradient", "weight") if f"  {word} " in line} == {
        "loss",
        "routing",
        "gradient",
        "weight",
    }
    assert "redistributing" not in done.stderr, "torch's advice on how whole tensors are gathered is not for users"
    assert os.listdir(tmp_path) == [], "nothing is written"


@pytest.mark.parametrize(("fault", "said"), [
    ("expert gradients doubled", "moe.experts"), pytest.param("raises", "Input/output error", marks=pytest.mark.matrix),
    pytest.param("dies", "rank 1: ended with exit code 7", marks=pytest.mark.matrix),
])  # fmt: skip
def test_one_process_says_what_is_wrong_and_exits_with_3(tmp_path, fault, said):
    flags = f"{launches.TINY} --moe-expert-parallel-size 4 --verify-parallelism --exit-after-verify --verify-world-size 4"
    done = alone(flags, tmp_path, fault)
    assert done.returncode == 3, done.stderr
    assert "MISMATCH" in done.stderr and said in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.matrix
@pytest.mark.parametrize(("fault", "code"), [("none", 0), ("sums of nodes lost", 3)])
def test_two_stages_that_auto_takes_are_compared(tmp_path, fault, code):
    flags = (
        f"{launches.TINY} --num-experts 8 --topk 2 --moe-expert-parallel-size 4 --moe-node-size 2 --verify-parallelism --exit-after-verify"
    )
    done = alone(f"{flags} --verify-world-size 4", tmp_path, fault)
    assert done.returncode == code and "auto -> hierarchical" in done.stderr, done.stderr


@pytest.mark.matrix
def test_a_process_that_hangs_does_not_keep_the_others(tmp_path):
    started = time.monotonic()
    done = alone(f"{launches.TINY} --moe-expert-parallel-size 2 --verify-parallelism --exit-after-verify", tmp_path, "hangs")
    assert done.returncode == 3 and "no answer from rank" in done.stderr, done.stderr
    assert time.monotonic() - started < 90


def ended(flags: str, fault: str, scratch: Path) -> tuple[int, str]:
    process = launches.start(
        f"{launches.TINY} --train-iters 2 --save {scratch}/run {flags}", ranks=2, scratch=scratch, program=FAULTY, FAULT=fault
    )
    try:
        return launches.end(process, scratch)
    finally:
        launches.clear(process)


def test_a_run_is_proved_on_its_own_ranks_and_then_trains(tmp_path):
    code, text = ended(EP2, "none", tmp_path)
    assert code == 0, text
    assert text.index("the layout trains the model that one device trains") < text.index("experts of width"), "proof first, then the run"
    assert text.count("the layout: step 1 of 2") == 1, "one rank speaks"
    assert [r["iteration"] for r in launches.records(tmp_path / "run", "train")] == [1, 2]


def test_a_run_whose_layout_is_wrong_does_not_start(tmp_path):
    code, text = ended(EP2, "expert gradients doubled", tmp_path)
    assert code == 1, text  # torchrun's; of the ranks it is 3
    assert "exitcode  : 3" in text and "exitcode: 3" in text.replace("  ", ""), text
    assert "MISMATCH: gradient of layers.2.moe.experts" in text and "it is 2 times what it should be" in text, text
    assert "no run is started" in text and not (tmp_path / "run").exists()
    assert "Traceback" not in text[: text.index("MISMATCH")]


def test_the_proof_alone_under_a_launcher_needs_no_data(tmp_path):
    code, text = ended(f"{EP2} --exit-after-verify", "none", tmp_path)
    assert code == 0 and "the layout trains the model" in text, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "said"), [
    ("--exit-after-verify", "--exit-after-verify needs --verify-parallelism"),
    ("--verify-parallelism --verify-world-size 8", "--verify-world-size (8) needs"),
    ("--check-replicas-interval 0", "--check-replicas-interval must be at least 1, not 0"),
])  # fmt: skip
def test_mistakes_are_named(flags, said):
    with pytest.raises(ConfigError) as caught:
        parse_args(f"--preset tiny --mock-data {flags}".split())
    assert any(said in problem for problem in caught.value.problems)


def test_a_layout_that_is_not_built_or_does_not_divide_is_refused_before_anything(tmp_path):
    done = alone(f"{launches.TINY} --moe-expert-parallel-size 4 --verify-parallelism --exit-after-verify --verify-world-size 6", tmp_path)
    assert done.returncode == 2 and "expert-parallel degree (4)" in done.stderr, done.stderr
