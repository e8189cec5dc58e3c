"""tools/plan.py as people and programs use it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import plan as tool  # noqa: E402

from megatron_moe.arguments import parse_args  # noqa: E402
from megatron_moe.training.plan import build_plan  # noqa: E402

MODEL = "--preset tiny --mock-data"


def run_tool(capsys, command: str) -> tuple[int, str, str]:
    try:
        code = tool.main(shlex.split(command))
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_laptop_gets_a_table_flags_and_reasons(capsys):
    code, out, _ = run_tool(capsys, f"--machine cpu --devices 2 {MODEL} --top 3")
    assert code == 0
    assert "2 x cpu" in out
    assert "Flags, to be put behind the command" in out
    assert "Left out, combinations by reason" in out


def test_json_has_bytes_seconds_and_flags_that_pass_a_dry_run(capsys):
    code, out, _ = run_tool(capsys, f"--machine h100-sxm --devices 8 {MODEL} --top 4 --json")
    told = json.loads(out)
    assert code == 0
    assert len(told["layouts"]) == 4
    for layout in told["layouts"]:
        memory, seconds = layout["memory"], layout["seconds"]
        assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"), abs=8)
        assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k not in ("total", "hidden")))
        assert layout["bound_by"] in seconds
        parsed = parse_args([*MODEL.split(), *layout["flags"], "--dry-run"])
        per_rank = build_plan(parsed.run, 8, parsed.given)["per_rank"]["fullest"]["bytes"]
        assert memory["parameters"] == per_rank["parameters"]
        assert memory["optimizer"] == per_rank["optimizer"]
    assert told["counts"]["valid"] == told["counts"]["fitting"] > 20


def test_a_launch_command_is_read_without_its_launcher(capsys):
    words = f"torchrun --nproc-per-node 8 pretrain_gpt_moe.py {MODEL} --global-batch-size 16"
    code, out, _ = run_tool(capsys, f"--devices 4 --fixed zero micro-batch-size --top 2 --json -- {words}")
    assert code == 0
    told = json.loads(out)
    assert told["global_batch_size"] == 16
    assert {(one["layout"]["zero"], one["layout"]["micro_batch"]) for one in told["layouts"]} == {(1, 4)}


def test_what_does_not_fit_is_told_with_what_would_have_to_change(capsys):
    _, out, _ = run_tool(capsys, f"--devices 2 --device-memory-gb 0.0001 {MODEL} --json")
    leanest = json.loads(out)["nearest"]["memory"]["total"] / 1e9
    code, out, _ = run_tool(capsys, f"--devices 2 --device-memory-gb {0.95 * leanest / 0.9} {MODEL}")
    assert code == 1
    for words in ("no layout fits", "--device-memory-gb", "fewer parameters on a rank", "devices instead of 2"):
        assert words in out
    code, out, _ = run_tool(capsys, f"--devices 2 --device-memory-gb {1.01 * leanest / 0.9} {MODEL} --json")
    assert code == 0


def test_a_figure_that_is_given_replaces_that_of_the_machine(capsys):
    _, out, _ = run_tool(capsys, f"--devices 2 {MODEL} --json --peak-tflops 100 --devices-per-node 2 --load-skew 2 --matmul-efficiency 0.5")
    told = json.loads(out)
    assert (told["machine"]["peak_tflops"], told["machine"]["devices_per_node"], told["machine"]["memory_gb"]) == (100, 2, 80)
    assert (told["assumptions"]["load_skew"], told["assumptions"]["matmul_efficiency"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (MODEL, "--devices N is missing"),
        (f"--devices 2 --machine h100-smx {MODEL}", "did you mean 'h100-sxm'?"),
        (f"--devices 2 --fixed zer {MODEL}", "did you mean 'zero'?"),
        (f"--device 2 {MODEL}", "unknown flag --device (did you mean '--devices'?)"),
        (f"--devices 2 --hidden-siz 64 {MODEL}", "unknown flag --hidden-siz (did you mean '--hidden-size'?)"),
        (f"--devices 2 --load-skew 0.5 {MODEL}", "--load-skew must be at least 1, not 0.5"),
        ("--devices 2 --preset tinny", "did you mean 'tiny'?"),
    ],
)
def test_a_mistake_gets_one_sentence_with_what_is_near(capsys, command, said):
    code, out, err = run_tool(capsys, command)
    assert (code, out) == (2, "")
    assert said in err
    assert "1 problem with this command" in err


def test_mistakes_about_machine_and_model_are_told_together(capsys):
    code, _, err = run_tool(capsys, "--devices 0 --topk two --hidden-size 65")
    assert code == 2
    assert "2 problems" in err or "3 problems" in err
    assert "--devices must be at least 1, not 0" in err
    assert "--topk wants a whole number" in err


def test_help_teaches_with_examples(capsys):
    code, out, _ = run_tool(capsys, "--help")
    assert code == 0
    assert "a laptop with 2 processes" in out
    assert "64 H100" in out
    assert "--load-skew" in out
