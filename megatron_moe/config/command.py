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

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        if self.dry_run_world_size is not None and not self.dry_run:
            yield f"--dry-run-world-size ({self.dry_run_world_size}) needs --dry-run: it says for how many ranks to plan, not how many to start"
