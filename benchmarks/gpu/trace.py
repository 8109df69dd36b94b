"""What a trace of GPU steps says: time by kernel, overlaps, gaps. Arithmetic only, no GPU.

With programmatic dependent launch a kernel begins while the one before still runs, and waits for
it. A step's kernels together then take longer than the step: so each is also counted from the
end of all that began before it, which gives every microsecond to one kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from quire.errors import UsageError

NAME_WIDTH = 58


class Event(NamedTuple):
    """A kernel, copy or fill on the device; microseconds."""

    name: str
    start: float
    end: float


def split(events: Iterable[Event], marker: str, count: int) -> list[list[Event]]:
    """The last `count` steps. A step is what begins after an event with `marker` in its name, up
    to the next such event. Raises UsageError where the trace does not have them."""
    steps: list[list[Event]] = []
    for event in sorted(events, key=lambda event: event.start):
        if marker in event.name:
            steps.append([])
        elif steps:
            steps[-1].append(event)
    found = [step for step in steps[-count:] if step]
    if len(found) < count:
        raise UsageError(
            "invalid_value",
            f"the profiler recorded {len(found)} of {count} steps",
            why="another program traces this GPU, or the driver lets only administrators do it",
            fix="end the other program, or run this as an administrator",
        )
    return found


def counted_once(step: Sequence[Event]) -> Iterator[tuple[Event, float]]:
    """Events in order of start, each with its microseconds after the end of all before it."""
    reached = float("-inf")
    for event in sorted(step, key=lambda event: event.start):
        yield event, max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)


def summarize(steps: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """Means over steps that were traced, microseconds: `device_us` from a step's first event to its
    last end; of that `busy_us` under at least one event (`kernels_us` is the sum of all, overlaps
    counted twice) and `gaps_us` under none. `kernels` by name, the longest first: `launches` a
    step, `mean_us` of one, `step_us` and `once_us` of a step, the latter counted once, and its
    `share` of device_us."""
    launches: dict[str, int] = defaultdict(int)
    whole: dict[str, float] = defaultdict(float)
    once: dict[str, float] = defaultdict(float)
    device = 0.0
    for step in steps:
        device += max(event.end for event in step) - min(event.start for event in step)
        for event, alone in counted_once(step):
            launches[event.name] += 1
            whole[event.name] += event.end - event.start
            once[event.name] += alone
    count, busy = len(steps), sum(once.values())
    return {
        "device_us": device / count,
        "kernels_us": sum(whole.values()) / count,
        "busy_us": busy / count,
        "gaps_us": (device - busy) / count,
        "launches": sum(launches.values()) / count,
        "kernels": [
            {
                "name": name,
                "launches": launches[name] / count,
                "mean_us": whole[name] / launches[name],
                "step_us": whole[name] / count,
                "once_us": once[name] / count,
                "share": once[name] / device,
            }
            for name in sorted(once, key=lambda name: (-once[name], name))
        ],
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines for people, of what `summarize` gives."""

    def line(name: str, launches: float, mean: str, step: float, once: float, share: float) -> str:
        short = name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}..."
        counts = f"{launches:>9.4g}{mean:>10}{step:>10.1f}{once:>10.1f}{share:>8.1%}"
        return f"{short:{NAME_WIDTH}}{counts}"

    device, gaps = found["device_us"], found["gaps_us"]
    heads = f"{'launches':>9}{'mean us':>10}{'us/step':>10}{'once':>10}{'share':>8}"
    lines = [f"{'kernel':{NAME_WIDTH}}{heads}"]
    for row in found["kernels"]:
        mean, *rest = f"{row['mean_us']:.2f}", row["step_us"], row["once_us"], row["share"]
        lines.append(line(row["name"], row["launches"], mean, *rest))
    busy = found["kernels_us"], found["busy_us"], found["busy_us"] / device
    lines.append(line("all kernels", found["launches"], "", *busy))
    lines.append(f"{'gaps between them':{NAME_WIDTH}}{gaps:>39.1f}{gaps / device:>8.1%}")
    return lines
