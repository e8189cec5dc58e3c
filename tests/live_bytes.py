"""Bytes of tensors alive on the CPU, from the allocation events of torch's profiler: operators that nothing else sees among them.

with LiveBytes() as live:
    loss = model(...)
    live.mark()        # what is alive here, above what was alive at the start
    loss.backward()
live.peak, live.marks
"""

from __future__ import annotations

import torch
from torch.autograd.profiler import profile


class LiveBytes:
    def __enter__(self) -> LiveBytes:
        self.marks: list[int] = []
        self._profile = profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def mark(self) -> None:
        with torch.profiler.record_function("live_bytes.mark"):
            pass

    def __exit__(self, *error) -> None:
        self._profile.__exit__(*error)
        alive = self.peak = 0
        for event in sorted(self._profile.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                self.peak = max(self.peak, alive)
            elif event.name() == "live_bytes.mark":
                self.marks.append(alive)
