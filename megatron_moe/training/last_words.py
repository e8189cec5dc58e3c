"""What every rank was doing when one of them broke the run.

A rank that dies, hangs or raises leaves the others in a collective that never ends, and each of them only knows that it waits. So
the first one that notices raises an alarm on the key-value store of the rendezvous, which is there beside all collectives; every
rank that can still speak writes its last words there; and the one that raised the alarm puts them into a digest:

    what each rank was doing, the suspicious ones first:
      rank 1: has left no word: it was killed, is stopped, or its machine is gone
      rank 0: iteration 4, waits in all_reduce (number 57 of group 0, [33]); at training/step.py:95 in train_step
      rank 2: iteration 4, waits in all_reduce (number 57 of group 0, [33]); at training/step.py:95 in train_step
      look for rank 1 first

Collectives are read from torch's flight recorder (utils/compat.py). Nothing is sent while all is well, but for one look at the
store every half second.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.training.saving import GROUP
from megatron_moe.utils.compat import last_collective

LOOK_SECONDS, GRACE_SECONDS = 0.5, 3.0  # between two looks for an alarm; for the others to speak, and for the store to answer
SAME_ALARM_SECONDS = 15.0  # what comes so soon after an alarm follows from the same thing
LISTED_RANKS = 16
_PACKAGE = str(Path(__file__).resolve().parents[1])


class LastWords:
    """One per rank and run. `iteration` is the step under way, set by the loop. Alarms are counted: a step that was only slow may have
    raised one before."""

    def __init__(self, rank: int, size: int, store: dist.Store | None):
        self.rank, self.size, self.iteration = rank, size, 0
        self._store, self._alarms = store, 0
        self._watched, self._over, self._lock = threading.get_ident(), threading.Event(), threading.Lock()
        self._digest, self._spoken_at = "", -math.inf
        if store is not None:
            threading.Thread(target=self._listen, name="last words", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def digest(self, error: BaseException | None = None, is_cause: bool = True) -> str:
        """Raise the alarm. On the rank that is first to, the words of all ranks; on the others, who has them.

        `error`: what ends this rank; not `is_cause` where it follows from what another rank did. None: no step ends."""
        if self._store is None:
            return ""
        mine = self._words(error, is_cause)
        # a store on a rank that is stopped never answers: it must not take this one along
        no_answer = (
            f"{self._line(self.rank, mine)}\n  the store where the ranks met does not answer: rank 0, or the launcher that has it, is "
            "stopped or gone"
        )
        if not self._lock.acquire(timeout=2 * GRACE_SECONDS):
            return no_answer
        try:
            if time.monotonic() - self._spoken_at > SAME_ALARM_SECONDS:
                self._digest = _within(2 * GRACE_SECONDS, lambda: self._collect(mine)) or no_answer
            return self._digest
        finally:
            self._lock.release()

    def _collect(self, mine: dict[str, Any]) -> str:
        alarm = f"{self._alarms}"
        first = int(self._store.compare_set(f"{alarm}/alarm", "", str(self.rank)))
        self._say(mine, first)
        is_first = first == self.rank
        words = self._heard(alarm, GRACE_SECONDS) if is_first or self.rank == 0 else {}  # rank 0 may have the store: it leaves last
        return self._table(words) if is_first else self._digest

    def _say(self, words: dict[str, Any], first: int) -> None:
        """Words for the alarm that rank `first` has raised."""
        self._store.set(f"{self._alarms}/words/{self.rank}", json.dumps(words))
        self._alarms, self._spoken_at = self._alarms + 1, time.monotonic()
        self._digest = f"what each rank was doing stands in the message of rank {first}"

    def _listen(self) -> None:
        """Speak when another rank has raised the alarm; this one may wait in a collective, or compute."""
        try:
            while not self._over.wait(LOOK_SECONDS):
                if self._store.check([f"{self._alarms}/alarm"]) and self._lock.acquire(blocking=False):  # else it is speaking already
                    try:
                        if self._store.check([alarm := f"{self._alarms}/alarm"]):
                            self._say(self._words(), int(self._store.get(alarm)))
                    finally:
                        self._lock.release()
        except RuntimeError:
            return  # the store is gone: the collectives will say so

    def _heard(self, alarm: str, seconds: float) -> dict[int, dict[str, Any]]:
        """What the ranks have said, waiting so long for all of them."""
        missing, words, end = set(range(self.size)), {}, time.monotonic() + seconds
        while missing:
            for rank in sorted(missing):
                if self._store.check([key := f"{alarm}/words/{rank}"]):
                    words[rank] = json.loads(self._store.get(key))
            missing -= words.keys()
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
        return words

    def _table(self, words: dict[int, dict[str, Any]]) -> str:
        """The silent ranks, those that are in no collective, those that are behind; then the rest."""
        latest = max((w["sequence"] for w in words.values()), default=0)

        def guilt(rank: int) -> tuple:
            w = words.get(rank)
            return (0,) if w is None else (1,) if w["is_cause"] else (2,) if not w["is_waiting"] else (3, w["sequence"] - latest)

        ranks = sorted(range(self.size), key=lambda r: (guilt(r), r))
        lines = [self._line(r, words.get(r)) for r in ranks[:LISTED_RANKS]]
        if len(ranks) > LISTED_RANKS:
            lines.append(f"  and {len(ranks) - LISTED_RANKS} more ranks, which wait in collectives")
        silent = [r for r in ranks if r not in words]
        if silent:
            lines.append(f"  look for {'rank' if len(silent) == 1 else 'ranks'} {', '.join(map(str, silent[:LISTED_RANKS]))} first")
        return "\n".join(["what each rank was doing, the suspicious ones first:", *lines])

    def _line(self, rank: int, words: dict[str, Any] | None) -> str:
        if words is None:
            return f"  rank {rank}: has left no word: it was killed, is stopped, or its machine is gone"
        return f"  rank {rank}: iteration {words['iteration']}, {words['said']}; at {words['where']}"

    # ------------------------------------------------------------ this rank's own words

    def _words(self, error: BaseException | None = None, is_cause: bool = False) -> dict[str, Any]:
        """What this rank is doing; with an error, what it did when that came."""
        last = last_collective(but=GROUP)  # what is saved in the background has its own
        has_trace = error is not None and error.__traceback__ is not None
        frames = traceback.extract_tb(error.__traceback__) if has_trace else traceback.extract_stack(sys._current_frames()[self._watched])
        where, is_inside_torch = _place(frames)
        is_waiting = is_inside_torch if last is None else not last.is_completed
        if error is not None:
            is_waiting = not is_cause
        if error is not None and is_cause:
            said = f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        elif last is None:
            said = "its last collective is not known (this torch keeps no record)"
        else:
            said = f"{'waits in' if is_waiting else 'in no collective; the last was'} {last}"
        return {
            "iteration": self.iteration, "said": said, "is_cause": error is not None and is_cause, "is_waiting": is_waiting,
            "sequence": last.sequence if last else 0, "where": where,
        }  # fmt: skip


def _place(frames: traceback.StackSummary) -> tuple[str, bool]:
    """The innermost frame outside of torch, and whether there are frames of torch inside of it."""
    libraries = (f"{os.sep}torch{os.sep}", f"{os.sep}threading.py", str(Path(__file__)))
    own = [f for f in frames if not any(word in f.filename for word in libraries)]
    frame = own[-1] if own else frames[-1]
    path = frame.filename.removeprefix(_PACKAGE + os.sep) if frame.filename.startswith(_PACKAGE) else Path(frame.filename).name
    return f"{path}:{frame.lineno} in {frame.name}", not own or frames[-1] is not frame


def _within(seconds: float, work: Callable[[], str]) -> str | None:
    """`work()`, or None when it is not done in time or the store has gone."""
    result: list[str] = []

    def attempt() -> None:
        with suppress(RuntimeError):
            result.append(work())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def open_store(size: int) -> dist.Store | None:
    """A connection of one's own to the store where the ranks met; None where there is none: one process, or ranks that met in a file."""
    if size == 1 or "MASTER_PORT" not in os.environ or "RANK" not in os.environ:
        return None
    is_here = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
    host = "127.0.0.1" if is_here else os.environ.get("MASTER_ADDR", "127.0.0.1")
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
    except RuntimeError:
        return None
    return dist.PrefixStore(f"last_words/{attempt}", store)
