"""Two parts of a layer at once: neither needs the other, and alone neither keeps the bus busy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

# With more tokens one part occupies the GPU by itself.
MOST_TOKENS = 64


@cache
def _other(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """A stream for what runs beside this one."""
    return torch.cuda.Stream(current.device)  # type: ignore[no-untyped-call]


def at_once(x_TH: torch.Tensor, part: Callable[[], S], rest: Callable[[], T]) -> tuple[S, T]:
    """What both give: two branches of the CUDA graph where one is captured, else one after the
    other, the rest first. `x_TH` decides: it has few tokens, or nothing runs beside. Neither may
    read or write what the other writes, scratch memory of kernels included."""
    few = x_TH.is_cuda and len(x_TH) <= MOST_TOKENS
    if not few or not torch.cuda.is_current_stream_capturing():
        found = rest()
        return part(), found
    current = torch.cuda.current_stream(x_TH.device)
    other = _other(current)
    other.wait_stream(current)
    try:
        with torch.cuda.stream(other):
            beside = part()
        found = rest()
    finally:  # or a capture that fails could not be ended
        current.wait_stream(other)
    return beside, found
