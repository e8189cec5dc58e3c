"""What to do with a command besides training it. Part of no run: a YAML file or a checkpoint does not hold these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.flags import checked, flag


@dataclass(frozen=True)
class CommandConfig:
    """Looking before training."""

    dry_run: bool = flag(
        False, "check the command, print what it would train as JSON and exit; starts nothing, and files that are not here are only listed"
    )
    # NOTE: the bound is the plan's patience: meshes of 16384 ranks take half a minute to lay out on one machine.
    dry_run_world_size: int | None = flag(None, "ranks that --dry-run plans for; WORLD_SIZE or 1 when not given", minimum=1, maximum=16384)
    list_presets: bool = flag(False, "print a table of the presets and exit")
    verify_parallelism: bool = flag(
        False, "before training, prove the layout: two steps of a small model with all the switches of this one, in float64, on one device and "
        "on these ranks; loss, every gradient, norm and weights must be equal, or nothing is started (exit code 3)")  # fmt: skip
    exit_after_verify: bool = flag(
        False, "the proof alone, without data. In one process the ranks of the command are not there: every degree above 1 becomes 2 (expert "
        "parallelism of a pyramid 2 and 4), and at most 8 processes on this machine stand in for them")  # fmt: skip
    verify_world_size: int | None = flag(
        None, "ranks that the command is for, with --exit-after-verify in one process; more than one data rank when not given", minimum=1
    )

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.dry_run_world_size is not None and not self.dry_run:
            yield f"--dry-run-world-size ({self.dry_run_world_size}) needs --dry-run: it says for how many ranks to plan, not how many to start"
        if self.exit_after_verify and not self.verify_parallelism:
            yield "--exit-after-verify needs --verify-parallelism: without it there is nothing to do before the exit"
        if self.verify_world_size is not None and not self.exit_after_verify:
            yield (f"--verify-world-size ({self.verify_world_size}) needs --verify-parallelism --exit-after-verify: it says for how many ranks "
                   "the command is, not how many to start")  # fmt: skip
