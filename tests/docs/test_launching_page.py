"""The plan that docs/launching.md shows is the plan that its command prints."""

import shlex
from pathlib import Path

from megatron_moe.arguments import parse_args
from megatron_moe.training.plan import as_json, build_plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "launching.md"


def test_the_shown_plan_is_the_printed_one():
    page = PAGE.read_text(encoding="utf-8")
    before, shown = page.split("```json\n")[0], page.split("```json\n")[1].split("```")[0]
    command = before.rstrip().splitlines()[-4]
    assert command.startswith("python pretrain_gpt_moe.py ")
    parsed = parse_args(shlex.split(command)[2:])
    plan = build_plan(parsed.run, parsed.command.dry_run_world_size, parsed.given)
    printed = as_json(plan).splitlines()
    lines = [line for line in shown.splitlines() if line.strip() != "..."]
    assert len(lines) > 30
    assert [line for line in lines if line not in printed] == []
