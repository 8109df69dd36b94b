"""How long the device worked on steps, and how long it waited for the next."""

from __future__ import annotations

from itertools import pairwise

import torch


class DeviceClock:
    """Events before and after each step on the stream. Only benchmarks pay for them."""

    def __init__(self) -> None:
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """A step's first work is about to be launched."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._steps.append((events[0], events[1]))
        events[0].record()

    def end(self) -> None:
        """A step's last work has been launched."""
        self._steps[-1][1].record()

    def read(self) -> tuple[float, float]:
        """(busy, idle) seconds of all steps since the last reading, once they are done."""
        torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        busy = sum(begin.elapsed_time(end) for begin, end in steps)
        idle = sum(last.elapsed_time(begin) for (_, last), (begin, _) in pairwise(steps))
        return busy / 1e3, idle / 1e3
