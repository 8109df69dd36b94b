"""Timing GPU kernels: CUDA-graph replays over rotating inputs, medians, share of a ceiling.

Each `benchmarks/gpu/<area>.py` builds Timed cases and prints them with `report`:

    python -m benchmarks.gpu.norm
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from quire.hardware.machine import find_gpu

Work = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """One thing to time. `runs` do the same work on different memory, together several times the
    L2 cache, so that nothing is timed from there; `nbytes` and `flops` are what one must do."""

    name: str
    runs: Sequence[Work]
    nbytes: float = 0.0
    flops: float = 0.0


def command(about: str | None, **words: Sequence[str]) -> list[str]:
    """The command line's words in their order, "" where one is left out; each is one of its
    choices, or any text without. Ends the program on --help, and as `need_gpu` does."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in words.items():
        parser.add_argument(name, nargs="?", choices=choices or None)
    given = parser.parse_args()
    need_gpu(parser)
    return [word or "" for word in vars(given).values()]


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """End the program with exit code 1, and the reason, where there is no GPU."""
    gpu, why = find_gpu()
    if gpu is None:
        parser.exit(1, f"error: these kernels are timed on a GPU\n  why: {why}\n")


def microseconds(runs: Sequence[Work], repeats: int = 7) -> float:
    """Median time of one run, launched from a CUDA graph that holds each of `runs` once or more."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    times = max(1, 20 // len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for run in runs:
                run()
    graph.replay()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / (times * len(runs)))
    return statistics.median(found)


@cache
def ceilings() -> tuple[float, float]:
    """(bytes/s of a large copy, bf16 FLOP/s of a large product), measured here."""
    a, b = (torch.randn(2**29, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    # Not copy_: in a graph that is done by a copy engine, at half the speed.
    copy = microseconds([lambda: torch.neg(a, out=b)])
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds([lambda: x @ y])
    return 2 * a.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6


def report(cases: Sequence[Timed]) -> None:
    """Time and print: microseconds, GB/s and TFLOP/s with their shares of the ceilings."""
    bandwidth, compute = ceilings()
    print(f"ceilings: {bandwidth / 1e9:.0f} GB/s, {compute / 1e12:.0f} TFLOP/s bf16")
    for case in cases:
        try:
            took = microseconds(case.runs)
        except Exception as error:  # one case that cannot run must not lose the others
            print(f"{case.name:<52} failed: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        line = f"{case.name:<52} {took:9.2f} us"
        if case.nbytes:
            rate = case.nbytes / took * 1e6
            line += f"  {rate / 1e9:6.0f} GB/s {rate / bandwidth:6.1%}"
        if case.flops:
            rate = case.flops / took * 1e6
            line += f"  {rate / 1e12:6.1f} TFLOP/s {rate / compute:6.1%}"
        print(line, flush=True)
