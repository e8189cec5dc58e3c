"""Why a run stops before its end: a signal, its time, --kill-switch-file, or --exit-interval. All ranks stop at the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_moe.config.training import TrainingConfig
from megatron_moe.data.loader import STOP_SIGNALS


class Stopper:
    """Asked after every step and inside evaluation; the ranks agree by one small reduction, if there is anything to agree on.

    A first signal is only remembered; another one ends the process at once. Ctrl-C under torchrun arrives twice, from the
    terminal and from the launcher, so what follows within two seconds is the same signal.

    asks: further questions that the same reduction settles; `answers` are True where a rank said so at the last one.
    """

    SAME_SIGNAL_SECONDS = 2.0

    def __init__(self, config: TrainingConfig, group: dist.ProcessGroup, asks: Sequence[Callable[[], bool]] = ()):
        self.config, self.group, self.start = config, group, time.monotonic()
        self.asks, self.answers = list(asks), [False] * len(asks)
        self.received, self.received_at = 0, 0.0
        self._listener = _Listener(self._remember) if config.exit_signal_handler else None

    def _remember(self, number: int) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self.received_at = number, now
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                os.write(2, f"{name}: stopping after this step, with a checkpoint if there is --save; once more ends at once\n".encode())
        elif now - self.received_at > self.SAME_SIGNAL_SECONDS:
            os._exit(128 + number)  # no clean-up: it may be what hangs

    def agreed(self) -> str | None:
        """Signal, time or file: the reason, equal on every rank, or None."""
        c = self.config
        if not (c.exit_signal_handler or c.exit_duration_in_mins is not None or c.kill_switch_file is not None or self.asks):
            return None
        late = c.exit_duration_in_mins is not None and time.monotonic() - self.start >= 60 * c.exit_duration_in_mins
        killed = c.kill_switch_file is not None and os.path.exists(c.kill_switch_file)  # one node may see it before the others
        flags = torch.tensor([self.received, int(late), int(killed), *(int(ask()) for ask in self.asks)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        number, late, killed, *answers = flags.tolist()
        self.answers = [bool(answer) for answer in answers]
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
        if self._listener:
            self._listener.close()


class _Listener:
    """Calls `heard(number)` for every one of STOP_SIGNALS, in a thread of its own.

    Python runs signal handlers in the main thread between two instructions: never, while that waits in a collective for a
    rank that hangs. The interpreter also writes the number to a pipe, at once, and that is read here.
    """

    def __init__(self, heard):
        self._heard = heard
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {s: signal.signal(s, lambda *_: None) for s in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number in STOP_SIGNALS:
                self._heard(number)

    def close(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.write(self._write, b"\0")  # not the end of the pipe: data workers hold copies of it
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
