"""Two parts of a layer at once: neither needs the other, and alone neither keeps the bus busy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")

# With more tokens one part occupies the GPU by itself.
MOST_TOKENS = 64


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def beside(x_TH: torch.Tensor, part: Callable[[], T]) -> Callable[[], T]:
    """Have `part` computed, which reads x and what else is there by now. Returns what gives its
    result, to be asked once the rest has been launched: while a CUDA graph is captured, `part` is
    a branch of its own until then. `x_TH` decides: it has few tokens, or nothing runs beside."""
    few = x_TH.is_cuda and len(x_TH) <= MOST_TOKENS
    if not few or not torch.cuda.is_current_stream_capturing():
        result = part()
        return lambda: result
    current, other = torch.cuda.current_stream(x_TH.device), _stream(x_TH.device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        result = part()

    def wait() -> T:
        current.wait_stream(other)
        return result

    return wait
