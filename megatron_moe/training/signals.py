"""Why a run stops before its end: a signal, its time, --kill-switch-file, or --exit-interval. All ranks stop at the same step."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from megatron_moe.config.training import TrainingConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopper:
    """Asked after every step and inside evaluation; the ranks agree by one small reduction, if there is anything to agree on.

    A first signal is only remembered; another one ends the process at once. Ctrl-C under torchrun arrives twice, from the
    terminal and from the launcher, so what follows within two seconds is the same signal.
    """

    SAME_SIGNAL_SECONDS = 2.0

    def __init__(self, config: TrainingConfig, group: dist.ProcessGroup):
        self.config, self.group, self.start = config, group, time.monotonic()
        self.received, self.received_at = 0, 0.0
        if config.exit_signal_handler:
            self._previous = {s: signal.signal(s, self._remember) for s in SIGNALS}

    def _remember(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.received and now - self.received_at > self.SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self.received_at = number, now

    def agreed(self) -> str | None:
        """Signal, time or file: the reason, equal on every rank, or None."""
        c = self.config
        if not c.exit_signal_handler and c.exit_duration_in_mins is None and c.kill_switch_file is None:
            return None
        late = c.exit_duration_in_mins is not None and time.monotonic() - self.start >= 60 * c.exit_duration_in_mins
        killed = c.kill_switch_file is not None and os.path.exists(c.kill_switch_file)  # one node may see it before the others
        flags = torch.tensor([self.received, int(late), int(killed)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        number, late, killed = flags.tolist()
        if number:
            return f"signal {signal.Signals(number).name}"
        if killed:
            return f"--kill-switch-file {c.kill_switch_file} is there"
        return f"--exit-duration-in-mins {c.exit_duration_in_mins:g} is over" if late else None

    def reason(self, iteration: int) -> str | None:
        """After a step: why to save and stop now, or None to go on."""
        interval = self.config.exit_interval
        if interval and iteration % interval == 0:
            return f"--exit-interval {interval}"
        return self.agreed()

    def close(self) -> None:
        if self.config.exit_signal_handler:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
